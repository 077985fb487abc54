"""What tests of single calls need of the split path, the first version and combine with RMS norm in `commfuse.checking`."""

from __future__ import annotations

from commfuse.checking.companion_args import Args, adapted, fits, norm_back, split_args, split_back, v1_args, v1_back
from commfuse.operators.moe_distribute.cases import RoundTrip
from tests.operators.moe_distribute.round_trips import groups_of

__all__ = ["adapted", "fits", "norm_back", "split_args", "split_back", "v1_args", "v1_back", "where"]


def where(rank: int, case: RoundTrip) -> tuple[int, int, Args]:
    """EP rank, TP rank and the names of the groups."""
    ep_groups, tp_groups = groups_of(case)
    ep, tp = divmod(rank, max(case.tp_world_size, 1))
    names = {"group_ep": ep_groups[tp].group_name}
    if case.tp_world_size == 2:
        names["group_tp"] = tp_groups[ep].group_name
    return ep, tp, names
