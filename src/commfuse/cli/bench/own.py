"""The operators under test, through their public functions, and the memory's own limit."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist

import commfuse

from ... import groups
from .method import Problem, Received, logical_bytes, routed_bytes_between_ranks


class Commfuse:
    """What a user calls: npu_moe_distribute_dispatch_v2 and combine_v2, with all their checks, on a group of its own."""

    def __init__(self, problem: Problem, in_window: bool) -> None:
        self._problem = problem
        workload = problem.workload
        self.group: str = dist.new_group(list(range(workload.ranks))).group_name
        self._y = _empty((workload.most_rows, workload.hidden), workload.row_dtype, in_window)
        self._y[: len(problem.expected.y)] = problem.expected.y
        self._quant_mode = 2 if workload.quantised else 0
        self._made: Any = None
        self._sums = torch.empty(0)

    def dispatch(self) -> None:
        """See `Method`."""
        own, workload = self._problem.inputs, self._problem.workload
        self._made = commfuse.npu_moe_distribute_dispatch_v2(
            own.x,
            own.expert_ids,
            self.group,
            workload.ranks,
            self._problem.rank,
            workload.num_experts,
            quant_mode=self._quant_mode,
        )

    def combine(self) -> None:
        """See `Method`."""
        own, workload = self._problem.inputs, self._problem.workload
        _, _, assist, _, counts, _, _ = self._made
        self._sums = commfuse.npu_moe_distribute_combine_v2(
            self._y,
            own.expert_ids,
            assist,
            counts,
            own.expert_scales,
            self.group,
            workload.ranks,
            self._problem.rank,
            workload.num_experts,
        )

    def received(self) -> Received:
        """See `Method`."""
        rows, scales, _, _, counts, _, _ = self._made
        total = int(counts[-1])
        return rows[:total], scales[:total] if self._quant_mode else None

    def sums(self) -> torch.Tensor:
        """See `Method`."""
        return self._sums

    def moved_ns(self) -> int | None:
        """What the windows' counter says; portable has none."""
        windows = groups.resolve(self.group).shared.get("windows", [])
        return sum(domain.whole.channel.moved_ns for domain in windows) if windows else None

    def bytes_between_ranks(self) -> int:
        """See `Method`."""
        return routed_bytes_between_ranks(self._problem)


def _empty(shape: tuple[int, int], dtype: torch.dtype, in_window: bool) -> torch.Tensor:
    if not in_window:
        return torch.empty(shape, dtype=dtype)
    from ...windows import window_empty

    return window_empty(shape, dtype)


class Memcpy:
    """No exchange at all: copy, row by row, as many bytes as a rank must end up with. The same number of processes at once."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        workload = problem.workload
        num_rows, num_returned = len(problem.expected.rows), workload.num_tokens * workload.top_k
        self._phases = (
            _Rows(num_rows, workload.dispatch_row_bytes),
            _Rows(num_returned, workload.combine_row_bytes),
        )

    def dispatch(self) -> None:
        """See `Method`."""
        self._phases[0].copy()

    def combine(self) -> None:
        """See `Method`."""
        self._phases[1].copy()

    def received(self) -> Received:
        """Return the expected rows if the copy is one."""
        self._phases[0].check(logical_bytes(self._problem) - self._phases[1].num_bytes)
        return self._problem.expected.rows, self._problem.expected.scales

    def sums(self) -> torch.Tensor:
        """Return the expected sums if the copy is one."""
        self._phases[1].check(self._phases[1].num_bytes)
        return self._problem.expected.out

    def moved_ns(self) -> int | None:
        """All the time."""
        return sum(phase.nanoseconds for phase in self._phases)

    def bytes_between_ranks(self) -> int:
        """See `Method`."""
        return 0


class _Rows:
    """Rows, and where they are copied to."""

    def __init__(self, num_rows: int, row_bytes: int) -> None:
        self._num_rows, self._row_bytes = num_rows, row_bytes
        self.num_bytes = num_rows * row_bytes
        self._index = torch.arange(num_rows, dtype=torch.int32)
        self._source = torch.randint(1, 127, (self.num_bytes,), dtype=torch.uint8)
        self._copy = torch.zeros_like(self._source)
        out, source, index = (tensor.data_ptr() for tensor in (self._copy, self._source, self._index))
        self._arguments = out, row_bytes, source, self.num_bytes, row_bytes, index, num_rows, row_bytes
        from ... import _core

        self._copy_rows = _core.gather_rows
        self.nanoseconds = 0

    def copy(self) -> None:
        begin = time.perf_counter_ns()
        self._copy_rows(*self._arguments)
        self.nanoseconds += time.perf_counter_ns() - begin

    def check(self, num_bytes: int) -> None:
        if num_bytes != self.num_bytes or not torch.equal(self._copy, self._source):
            raise AssertionError("the copies that stand for the memory's limit are not complete")
