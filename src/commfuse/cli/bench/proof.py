"""Which way commfuse took, as the library itself tells it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch.distributed as dist

from ... import backends, groups


@dataclass(frozen=True, kw_only=True)
class Proof:
    """What one rank saw of one round trip, or of one call."""

    backend: str  # of the group
    exchanges: int  # messages that commfuse sent and received over process groups; the cpu backend needs none

    def wrong(self, backend: str) -> str:
        """Return in what this is not the way of ``backend``; '' when it is."""
        if self.backend != backend:
            return f"the group ran on {self.backend}, not on {backend}"
        if backend == "cpu" and self.exchanges:
            return f"{self.exchanges} messages went over the process group, not through windows"
        return ""


def proof_of(group: str, exchanges: list[int]) -> Proof:
    """Return the proof for the calls on ``group`` during which ``exchanges`` were counted."""
    return Proof(backend=backends.of(groups.resolve(group)).name, exchanges=sum(exchanges))


@contextlib.contextmanager
def counting_exchanges() -> Iterator[list[int]]:
    """Count the point-to-point messages over process groups within the block: a number for each batch of them."""
    counts: list[int] = []
    real = dist.batch_isend_irecv

    def counting(p2p_op_list: list[dist.P2POp]) -> list[dist.Work]:
        counts.append(len(p2p_op_list))
        return real(p2p_op_list)

    dist.batch_isend_irecv = counting
    try:
        yield counts
    finally:
        dist.batch_isend_irecv = real
