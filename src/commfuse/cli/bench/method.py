"""What a method is, and what each rank gives it to work on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from .formula import Expected
from .workload import Inputs, Workload

Received = tuple[torch.Tensor, torch.Tensor | None]  # the valid rows and, of int8 rows, their scales


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One rank's part of a workload."""

    workload: Workload
    rank: int
    inputs: Inputs
    expected: Expected


class Method(Protocol):
    """One way to send rows to their experts and back. Buffers are made by the constructor and reused."""

    def dispatch(self) -> None:
        """Send and receive the rows. Timed."""
        ...

    def combine(self) -> None:
        """Send ``expected.y`` back, wherever the method wants it to lie, and sum. Timed."""
        ...

    def received(self) -> Received:
        """Return what `dispatch` has received. Not timed."""
        ...

    def sums(self) -> torch.Tensor:
        """Return what `combine` has summed, [num_tokens, hidden]. Not timed."""
        ...

    def moved_ns(self) -> int | None:
        """Return for how long rows have been on their way in all calls so far, without choosing where they go; None if not known."""
        ...

    def bytes_between_ranks(self) -> int:
        """Return how many bytes of rows this rank receives or reads from other ranks in a round trip."""
        ...


def logical_bytes(problem: Problem) -> int:
    """Return the bytes of the rows that this rank must end up with in a round trip, its own included."""
    workload = problem.workload
    returned = workload.num_tokens * workload.top_k * workload.combine_row_bytes
    return len(problem.expected.rows) * workload.dispatch_row_bytes + returned


def routed_bytes_between_ranks(problem: Problem) -> int:
    """Return the bytes of the rows that reach this rank from others, when each row travels for itself."""
    workload, rank = problem.workload, problem.rank
    arriving = sum(problem.expected.rows_from_ranks) - problem.expected.rows_from_ranks[rank]
    owners = problem.inputs.expert_ids // workload.experts_per_rank
    returning = int((owners != rank).sum())
    return arriving * workload.dispatch_row_bytes + returning * workload.combine_row_bytes
