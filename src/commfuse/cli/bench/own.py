"""The operators under test, through their public functions."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

import commfuse

from ... import groups
from .method import Problem, Received, routed_bytes_between_ranks


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
