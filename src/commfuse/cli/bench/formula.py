"""What a round trip must return, from the formulas, in one process. A test holds these few lines against the operators' goldens."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...compare import difference
from .workload import Workload, all_inputs

# Peers sum in other orders, and some with bfloat16 weights or partial sums: at most four roundings to the row's type, each half a
# unit in the last place of what is summed. commfuse itself promises bits.
_ROUNDINGS = 4
_HALF_STEP = 0.5 + 2**-8  # of an int8 row: rounding errs by half a step, float32 by a little more


@dataclass(frozen=True, kw_only=True)
class Expected:
    """One rank's results, and what it takes to judge those of others. n rows are received."""

    rows: torch.Tensor  # [n, hidden] row_dtype or int8, by expert, then source rank, then token
    scales: torch.Tensor | None  # [n] float32 with int8 rows
    unquantised: torch.Tensor  # [n, hidden] row_dtype
    y: torch.Tensor  # [n, hidden] row_dtype, what the stand-in experts make of the rows
    out: torch.Tensor  # [num_tokens, hidden] row_dtype
    size: torch.Tensor  # [num_tokens, hidden] float32, the sum of the terms' absolute values
    rows_from_ranks: tuple[int, ...]  # how many of the n rows come from each rank

    def wrong_exactly(self, rows: torch.Tensor, scales: torch.Tensor | None, out: torch.Tensor) -> list[str]:
        """Return what differs in any bit."""
        found = [difference("rows", self.rows, rows), difference("sums", self.out, out)]
        if self.scales is not None:
            found.append(difference("scales", self.scales, scales))
        return [text for text in found if text]

    def wrong_beyond_rounding(self, rows: torch.Tensor, scales: torch.Tensor | None, out: torch.Tensor) -> list[str]:
        """Return what differs by more than roundings explain: of int8 rows, and of sums in another order."""
        found = [difference("rows", self.rows, rows) if self.scales is None else self._wrong_int8(rows, scales)]
        bound = _ROUNDINGS * torch.finfo(self.out.dtype).eps / 2 * self.size
        far = (out.float() - self.out.float()).abs()
        found.append(_beyond("sums", far, bound))
        return [text for text in found if text]

    def _wrong_int8(self, rows: torch.Tensor, scales: torch.Tensor | None) -> str:
        if scales is None or rows.dtype != torch.int8 or rows.shape != self.rows.shape or scales.shape != (len(rows),):
            return f"rows: expected {tuple(self.rows.shape)} int8 with scales, got {tuple(rows.shape)} {rows.dtype}"
        far = (rows.float() * scales[:, None] - self.unquantised.float()).abs()
        step = self.unquantised.float().abs().amax(1, keepdim=True) / 127
        return _beyond("rows", far, _HALF_STEP * step.expand_as(far))


def expected(workload: Workload, rank: int) -> Expected:
    """Return what ``rank`` receives and returns."""
    sources = torch.cat([torch.full((workload.num_tokens,), source) for source in range(workload.ranks)])
    x = torch.cat([part.x for part in all_inputs(workload)])
    ids = torch.cat([part.expert_ids for part in all_inputs(workload)])
    first = rank * workload.experts_per_rank
    experts, tokens = (
        (ids[:, None] == torch.arange(first, first + workload.experts_per_rank)[:, None]).any(2).T.nonzero().unbind(1)
    )
    unquantised = x[tokens]
    rows, scales = quantise(unquantised) if workload.quantised else (unquantised, None)
    terms = _terms(workload, rank)
    total = torch.zeros(terms.shape[1:])
    for term in terms:
        total += term
    return Expected(
        rows=rows,
        scales=scales,
        unquantised=unquantised,
        y=stand_in(unquantised, first + experts),
        out=total.to(workload.row_dtype),
        size=terms.abs().sum(0),
        rows_from_ranks=tuple(torch.bincount(sources[tokens], minlength=workload.ranks).tolist()),
    )


def stand_in(rows: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
    """Return what the experts make of ``rows`` [n, hidden]: each multiplies by a number of its own, so that a mix-up shows.

    ``experts``: [n], whose row it is. The row is taken before quantisation, so that combine has the same work and result with int8.
    """
    return (rows.float() * (0.5 + (experts * 37 % 64)[:, None] / 64)).to(rows.dtype)


def quantise(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return int8 rows and their scales: d = 127 / max|row|, q = row * d rounded half to even, scale = 1 / d."""
    wide = rows.float()
    largest = wide.abs().amax(1)
    factors = torch.full_like(largest, 127) / largest  # torch turns 127 / largest into a product with the reciprocal
    return (wide * factors[:, None]).round().to(torch.int8), 1 / factors


def _terms(workload: Workload, rank: int) -> torch.Tensor:
    """Return [top_k, num_tokens, hidden] float32: weight times row, rounded, of every choice of every token of ``rank``."""
    own = all_inputs(workload)[rank]
    rows = [stand_in(own.x, own.expert_ids[:, k]).float() for k in range(workload.top_k)]
    return torch.stack([row * own.expert_scales[:, k, None] for k, row in enumerate(rows)])


def _beyond(name: str, far: torch.Tensor, bound: torch.Tensor) -> str:
    if not far.numel():
        return ""
    over = torch.nan_to_num(far / (bound + 1e-30), nan=torch.inf)
    place = divmod(int(over.argmax()), far.shape[1])
    if over[place] <= 1:
        return ""
    count = f"{int((over > 1).sum())} of {far.numel()} values are off"
    return f"{name}: {count}; the worst at {place} by {far[place]:.3g}, allowed there {bound[place]:.3g}"
