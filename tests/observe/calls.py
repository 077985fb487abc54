"""Calls to be observed, on the ranks of a test: a late rank, a refused call, a round trip under the profiler."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

import commfuse
from commfuse.checking.moe_distribute import experts
from commfuse.operators.moe_distribute.cases import RoundTrip

BARRIER = "_npu_distribute_barrier"
LATE_S = 0.2
TRIP = RoundTrip(id="observed", world_size=2, num_tokens=(3, 3), hidden=8)


def new_group() -> str:
    """A group that nothing has been noted about; every rank calls it."""
    return str(dist.new_group().group_name)


def barrier(group: str) -> torch.Tensor:
    return commfuse._npu_distribute_barrier(torch.zeros(2, 3), group, dist.get_world_size())


def barriers_with_a_late_rank(rank: int, backend: str, late: int) -> commfuse.Stats:
    """Three barriers, to the second of which rank ``late`` comes late; what this rank has seen."""
    with commfuse.config.override(backend=backend):
        group = new_group()
        barrier(group)
        if rank == late:
            time.sleep(LATE_S)  # it has other work to do
        barrier(group)
        barrier(group)
        return commfuse.stats(group)


def round_trip(rank: int, group: str, base: RoundTrip = TRIP) -> None:
    """Dispatch and combine."""
    out = commfuse.npu_moe_distribute_dispatch_v2(**base.dispatch_args(rank), group_ep=group)
    back = base.combine_args(rank, 0, out, experts(base, rank, 0, out))
    commfuse.npu_moe_distribute_combine_v2(**back, group_ep=group)


def refused(rank: int, group: str) -> None:
    """A dispatch that every rank refuses."""
    args = replace(TRIP, moe_expert_num=8).dispatch_args(rank)
    args["expert_ids"][0, 0] = 99
    with pytest.raises(commfuse.ArgumentError):
        commfuse.npu_moe_distribute_dispatch_v2(**args, group_ep=group)


def right_and_wrong(rank: int, backend: str) -> commfuse.Stats:
    """A round trip, a refused dispatch, and another round trip."""
    with commfuse.config.override(backend=backend):
        group = new_group()
        round_trip(rank, group)
        refused(rank, group)
        round_trip(rank, group)
        return commfuse.stats(group)


def profiled(rank: int, backend: str, late: int, work: Any = round_trip) -> dict[str, float]:
    """The ranges of one round trip to which rank ``late`` comes late: microseconds by name."""
    with commfuse.config.override(backend=backend):
        group = new_group()
        work(rank, group)
        barrier(group)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
            if rank == late:
                time.sleep(LATE_S)
            work(rank, group)
        return {event.key: event.cpu_time_total for event in found.key_averages() if event.key.startswith("commfuse::")}
