"""What a user of torch.distributed or MPI writes today, written well: buffers reused, one message a phase, a fast weighted sum."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch.nn.functional import embedding_bag

from .method import Problem, Received, routed_bytes_between_ranks


class Transport(Protocol):
    """The four collectives that the peers need; the first dimension of every tensor is what is divided among the ranks."""

    def all_to_all(self, out: torch.Tensor, given: torch.Tensor) -> None:
        """Exchange equal parts."""
        ...

    def all_to_all_v(self, out: torch.Tensor, given: torch.Tensor, out_rows: list[int], given_rows: list[int]) -> None:
        """Exchange parts of the given numbers of rows, by rank."""
        ...

    def all_gather(self, out: torch.Tensor, given: torch.Tensor) -> None:
        """Put everyone's ``given`` below one another."""
        ...

    def reduce_scatter(self, out: torch.Tensor, given: torch.Tensor) -> None:
        """Sum everyone's ``given`` (float32) and keep this rank's part."""
        ...


class Timed:
    """The collectives that move rows, and how long they have taken so far."""

    def __init__(self, transport: Transport) -> None:
        self.nanoseconds = 0
        self.all_to_all = transport.all_to_all  # counts
        self.all_to_all_v = self._timed(transport.all_to_all_v)
        self.all_gather = self._timed(transport.all_gather)
        self.reduce_scatter = self._timed(transport.reduce_scatter)

    def _timed(self, collective: Callable[..., None]) -> Callable[..., None]:
        def run(*args: Any) -> None:
            begin = time.perf_counter_ns()
            collective(*args)
            self.nanoseconds += time.perf_counter_ns() - begin

        return run


class AllToAll:
    """Permute by expert, exchange counts, exchange rows, permute; and all the way back."""

    def __init__(self, problem: Problem, transport: Transport) -> None:
        self._problem, self._transport = problem, Timed(transport)
        own, work = problem.inputs, problem.workload
        pairs, most = own.expert_ids.numel(), work.most_rows
        self._packer = RowPacker(problem, work.num_tokens)
        self._sent = torch.empty(pairs, self._packer.row_width, dtype=self._packer.dtype)
        self._arrived = torch.empty(most, self._packer.row_width, dtype=self._packer.dtype)
        self._rows = torch.empty(most, work.hidden, dtype=self._packer.dtype)
        self._scales = torch.empty(most, 1)
        self._back = torch.empty(most, work.hidden, dtype=work.row_dtype)
        self._returned = torch.empty(pairs, work.hidden, dtype=work.row_dtype)
        self._counts = torch.empty(work.num_experts, dtype=torch.int64)
        self._numbers = torch.arange(max(most, pairs))
        self._sums = torch.empty(0)

    def dispatch(self) -> None:
        """See `Method`."""
        work, keys = self._problem.workload, self._problem.inputs.expert_ids.view(-1)
        self._order = torch.argsort(keys, stable=True)
        counts = torch.bincount(keys, minlength=work.num_experts)
        self._transport.all_to_all(self._counts, counts)
        by_source = self._counts.view(work.ranks, work.experts_per_rank)
        self._given = counts.view(work.ranks, -1).sum(1).tolist()
        self._taken = by_source.sum(1).tolist()
        self._total = total = sum(self._taken)
        packed = self._packer.pack(self._problem.inputs.x)
        torch.index_select(packed, 0, self._order.div(work.top_k, rounding_mode="floor"), out=self._sent)
        arrived = self._arrived[:total]
        self._transport.all_to_all_v(arrived, self._sent, self._taken, self._given)
        self._by_expert = self._expert_order(by_source, total)
        self._packer.select(arrived, self._by_expert, self._rows[:total], self._scales[:total])

    def combine(self) -> None:
        """See `Method`."""
        total, numbers = self._total, self._numbers
        by_source = torch.empty_like(self._by_expert)
        by_source[self._by_expert] = numbers[:total]
        torch.index_select(self._problem.expected.y, 0, by_source, out=self._back[:total])
        self._transport.all_to_all_v(self._returned, self._back[:total], self._given, self._taken)
        place = torch.empty_like(self._order)
        place[self._order] = numbers[: len(place)]
        weights = self._problem.inputs.expert_scales
        self._sums = weighted_sum(self._returned, place.view(weights.shape), weights)

    def _expert_order(self, by_source: torch.Tensor, total: int) -> torch.Tensor:
        """Return where the i-th row by expert, then source, lies among rows by source, then expert."""
        begins = (self._counts.cumsum(0) - self._counts).view(by_source.shape).t().reshape(-1)
        sizes = by_source.t().reshape(-1)
        shifts = begins - (sizes.cumsum(0) - sizes)
        return torch.repeat_interleave(shifts, sizes, output_size=total) + self._numbers[:total]

    def received(self) -> Received:
        """See `Method`."""
        return self._packer.split(self._rows[: self._total], self._scales[: self._total])

    def sums(self) -> torch.Tensor:
        """See `Method`."""
        return self._sums

    def moved_ns(self) -> int | None:
        """See `Method`."""
        return self._transport.nanoseconds

    def bytes_between_ranks(self) -> int:
        """See `Method`."""
        return routed_bytes_between_ranks(self._problem)


class AllGather:
    """All-gather every token with its ids and weights, pick the own experts' rows, sum what is here, reduce-scatter the sums.

    Sends less than `AllToAll` where tokens choose more experts than there are ranks. The weights are rounded to the row's type before
    the partial sums: less exact than the others, kept because it is fast.
    """

    def __init__(self, problem: Problem, transport: Transport) -> None:
        self._problem, self._transport = problem, Timed(transport)
        work, own = problem.workload, problem.inputs
        self._packer = RowPacker(problem, work.num_tokens, extra_bytes=8 * work.top_k)
        everyone = work.ranks * work.num_tokens
        self._everyone = torch.empty(everyone, self._packer.row_width, dtype=self._packer.dtype)
        self._extra_of_all = self._extra(self._everyone)
        self._rows = torch.empty(work.most_rows, work.hidden, dtype=self._packer.dtype)
        self._scales = torch.empty(work.most_rows, 1)
        self._partial, self._mine = torch.empty(everyone, work.hidden), torch.empty(own.x.shape)
        self._tokens = torch.arange(everyone)
        self._sums = torch.empty(0)

    def dispatch(self) -> None:
        """See `Method`."""
        work, own = self._problem.workload, self._problem.inputs
        packed = self._packer.pack(own.x)
        ids, weights = self._extra(packed)
        ids.copy_(own.expert_ids)
        weights.copy_(own.expert_scales)
        self._transport.all_gather(self._everyone, packed)
        ids, weights = self._extra_of_all
        keys = ids.reshape(-1) - self._problem.rank * work.experts_per_rank
        here = ((keys >= 0) & (keys < work.experts_per_rank)).nonzero().view(-1)
        here = here[torch.argsort(keys[here], stable=True)]
        self._token = here.div(work.top_k, rounding_mode="floor")
        self._weights = weights.reshape(-1)[here]
        total = len(here)
        self._packer.select(self._everyone, self._token, self._rows[:total], self._scales[:total])

    def combine(self) -> None:
        """See `Method`."""
        by_token = torch.argsort(self._token, stable=True)
        begins = torch.searchsorted(self._token[by_token], self._tokens)
        y = self._problem.expected.y
        weights = self._weights[by_token].to(y.dtype)
        self._partial.copy_(embedding_bag(by_token, y, begins, mode="sum", per_sample_weights=weights))
        self._transport.reduce_scatter(self._mine, self._partial)
        self._sums = self._mine.to(y.dtype)

    def _extra(self, packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the ids and the weights at the end of each packed row."""
        top_k = self._problem.workload.top_k
        tail = packed.view(torch.int8)[:, -8 * top_k :]
        return tail[:, : 4 * top_k].view(torch.int32), tail[:, 4 * top_k :].view(torch.float32)

    def received(self) -> Received:
        """See `Method`."""
        total = len(self._token)
        return self._packer.split(self._rows[:total], self._scales[:total])

    def sums(self) -> torch.Tensor:
        """See `Method`."""
        return self._sums

    def moved_ns(self) -> int | None:
        """See `Method`."""
        return self._transport.nanoseconds

    def bytes_between_ranks(self) -> int:
        """Everyone's packed rows, and as many float32 sums: what a ring moves to each rank."""
        others = self._problem.workload.ranks - 1
        packed = self._packer.row_width * self._packer.dtype.itemsize
        sums = 4 * self._problem.workload.hidden
        return others * self._problem.workload.num_tokens * (packed + sums)


class RowPacker:
    """Rows as they travel: with int8, the scale lies behind the row, so that one message carries both."""

    def __init__(self, problem: Problem, num_tokens: int, extra_bytes: int = 0) -> None:
        work = problem.workload
        self._hidden, self._quantised = work.hidden, work.quantised
        self.dtype = torch.int8 if work.quantised else work.row_dtype
        self.row_width = (work.dispatch_row_bytes + extra_bytes) // self.dtype.itemsize
        self._rows_alone = not work.quantised and not extra_bytes
        self._packed = torch.empty(0 if self._rows_alone else num_tokens, self.row_width, dtype=self.dtype)
        self._rows = self._packed[:, : work.hidden]
        self._wide = torch.empty(num_tokens if work.quantised else 0, work.hidden)
        if work.quantised:
            self._scales = self._scales_of(self._packed)[:, 0]

    def pack(self, x: torch.Tensor) -> torch.Tensor:
        """Return [num_tokens, row_width]; room for extra bytes is left as it is."""
        if self._rows_alone:
            return x
        if not self._quantised:
            self._rows.copy_(x)
            return self._packed
        largest = x.abs().amax(1).float()
        self._wide.copy_(x).mul_((127 / largest)[:, None]).round_()
        self._rows.copy_(self._wide)
        torch.div(largest, 127, out=self._scales)
        return self._packed

    def select(self, packed: torch.Tensor, index: torch.Tensor, rows: torch.Tensor, scales: torch.Tensor) -> None:
        """Write row ``index[i]`` to ``rows[i]`` and, with int8, its scale to ``scales[i]``."""
        torch.index_select(packed if self._rows_alone else packed[:, : self._hidden], 0, index, out=rows)
        if self._quantised:
            torch.index_select(self._scales_of(packed), 0, index, out=scales)

    def split(self, rows: torch.Tensor, scales: torch.Tensor) -> Received:
        """Return rows and scales as `Method.received` does."""
        return rows, scales[:, 0] if self._quantised else None

    def _scales_of(self, packed: torch.Tensor) -> torch.Tensor:
        return packed[:, self._hidden : self._hidden + 4].view(torch.float32)


def weighted_sum(rows: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return the sum over k of ``weights[t, k] * rows[index[t, k]]`` in the type of ``rows``.

    The fastest that torch has on the CPU: embedding_bag reads every row once and sums in float32, but takes its weights in the type of
    the rows. A float32 weight is therefore given as two: its rounding, and what the rounding left.
    """
    if rows.dtype == torch.float32:
        return embedding_bag(index, rows, mode="sum", per_sample_weights=weights)
    high = weights.to(rows.dtype)
    low = (weights - high).to(rows.dtype)
    both = torch.cat((high, low), 1)
    return embedding_bag(torch.cat((index, index), 1), rows, mode="sum", per_sample_weights=both)
