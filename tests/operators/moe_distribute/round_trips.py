"""Run a `RoundTrip` on real ranks, and the same through the golden in one process."""

from __future__ import annotations

import pickle
from typing import Any

import torch
import torch.distributed as dist

import commfuse
from commfuse.operators.moe_distribute import reference
from commfuse.operators.moe_distribute.cases import RoundTrip

Result = dict[str, Any]

_groups: dict[tuple[int, int], tuple[list[Any], list[Any]]] = {}


def groups_of(case: RoundTrip) -> tuple[list[Any], list[Any]]:
    """EP groups by tp index and TP groups by ep index; every rank of the world calls it."""
    tp = max(case.tp_world_size, 1)
    key = (case.world_size, tp)
    if key not in _groups:
        ep_groups = [dist.new_group([ep * tp + i for ep in range(case.world_size)]) for i in range(tp)]
        tp_groups = [dist.new_group([ep * tp + i for i in range(tp)]) for ep in range(case.world_size)]
        _groups[key] = ep_groups, tp_groups
    return _groups[key]


def on_ranks(rank: int, cases: list[RoundTrip], settings: dict[str, Any]) -> bytes:
    """Dispatch, experts, combine on this rank for each case; pickled results (None where this rank does not call)."""
    with commfuse.config.override(**settings):
        return pickle.dumps([_one(rank, case) for case in cases])


def _one(rank: int, case: RoundTrip) -> Result | None:
    ep_groups, tp_groups = groups_of(case)
    tp = max(case.tp_world_size, 1)
    ep_rank, tp_rank = divmod(rank, tp)
    if (tp_rank, ep_rank) not in case.calls():
        return None
    names = {"group_ep": ep_groups[tp_rank].group_name}
    if tp == 2:
        names["group_tp"] = tp_groups[ep_rank].group_name
    args = case.dispatch_args(ep_rank, tp_rank)
    out = commfuse.npu_moe_distribute_dispatch_v2(**args, **names)
    y = experts(case, ep_rank, tp_rank, out)
    back = case.combine_args(ep_rank, tp_rank, out, y)
    x = commfuse.npu_moe_distribute_combine_v2(**back, **names)
    return {"dispatch": out, "combine": x, "waited": [args.get("performance_info"), back.get("performance_info")]}


def experts(case: RoundTrip, ep_rank: int, tp_rank: int, out: Any) -> torch.Tensor:
    total = case.total_rows(ep_rank, out)
    return case.experts(ep_rank, out[0], out[1], out[3], total, tp_rank)


def golden(case: RoundTrip, **options: Any) -> dict[tuple[int, int], dict[str, Any]]:
    """{(tp_rank, ep_rank): {"dispatch": [(tensor, valid)], "combine": [(tensor, valid)]}}"""
    calls = case.calls()
    dispatched = reference.dispatch_v2(
        [{**case.dispatch_args(ep, tp)} for tp, ep in calls], **{k: v for k, v in options.items() if k == "product"}
    )
    backs = []
    for (tp, ep), outputs in zip(calls, dispatched, strict=True):
        tensors = [tensor for tensor, _ in outputs]
        backs.append(case.combine_args(ep, tp, tensors, experts(case, ep, tp, tensors)))
    combined = reference.combine_v2(backs, **options)
    return {
        call: {"dispatch": out, "combine": x} for call, out, x in zip(calls, dispatched, combined, strict=True)
    }
