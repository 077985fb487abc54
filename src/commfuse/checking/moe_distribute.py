"""Dispatch, experts and combine over real ranks, and the same through the goldens in one process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from .. import backends, groups, ops
from ..operators.moe_distribute import reference
from ..operators.moe_distribute.cases import NAMED, RoundTrip, random_case
from .results import Expected, RankRun

DISPATCH, COMBINE = "npu_moe_distribute_dispatch_v2", "npu_moe_distribute_combine_v2"

_DISPATCH_OUTPUTS = (
    "expand_x",
    "dynamic_scales",
    "assist_info_for_combine",
    "expert_token_nums",
    "ep_recv_counts",
    "tp_recv_counts",
    "expand_scales",
)
_groups: dict[tuple[int, int], tuple[list[Any], list[Any]]] = {}


class MoeDistribute:
    """npu_moe_distribute_dispatch_v2 and npu_moe_distribute_combine_v2; see `checking.Family`."""

    name = "moe_distribute"
    operators: tuple[str, ...] = (DISPATCH, COMBINE)

    def named_cases(self) -> Sequence[RoundTrip]:
        """See `checking.Family`."""
        return NAMED

    def random_case(self, seed: int) -> RoundTrip:
        """See `checking.Family`."""
        return random_case(seed)

    def world_size(self, case: RoundTrip) -> int:
        """See `checking.Family`; rank = ep_rank_id * TP size + tp_rank_id."""
        return case.world_size * _tp_size(case)

    def run_on_rank(self, rank: int, case: RoundTrip) -> RankRun | None:
        """Dispatch, experts, combine on this rank; None for a rank that the case has removed."""
        ep_groups, tp_groups = groups_of(case)
        ep_rank, tp_rank = divmod(rank, _tp_size(case))
        if (tp_rank, ep_rank) not in case.calls():
            return None
        names = {"group_ep": ep_groups[tp_rank].group_name}
        if case.tp_world_size == 2:
            names["group_tp"] = tp_groups[ep_rank].group_name
        out = ops.npu_moe_distribute_dispatch_v2(**case.dispatch_args(ep_rank, tp_rank), **names)
        back = case.combine_args(ep_rank, tp_rank, out, experts(case, ep_rank, tp_rank, out))
        x = ops.npu_moe_distribute_combine_v2(**back, **names)
        members = groups.resolve(names["group_ep"]).among(case.alive)
        return RankRun(outputs=[*out, x], backend=backends.of(members).name)

    def expected(self, case: RoundTrip) -> dict[int, list[Expected]]:
        """See `checking.Family`."""
        return {ep * _tp_size(case) + tp: _rows(found) for (tp, ep), found in golden(case).items()}


def groups_of(case: RoundTrip) -> tuple[list[Any], list[Any]]:
    """Return EP groups by tp index and TP groups by ep index; every rank of the world calls it."""
    tp = _tp_size(case)
    key = (case.world_size, tp)
    if key not in _groups:
        ep_groups = [dist.new_group([ep * tp + i for ep in range(case.world_size)]) for i in range(tp)]
        tp_groups = [dist.new_group([ep * tp + i for i in range(tp)]) for ep in range(case.world_size)]
        _groups[key] = ep_groups, tp_groups
    return _groups[key]


def experts(case: RoundTrip, ep_rank: int, tp_rank: int, out: Sequence[Any]) -> torch.Tensor:
    """Return the stand-in experts' output for what dispatch returned."""
    total = case.total_rows(ep_rank, out)
    return case.experts(ep_rank, out[0], out[1], out[3], total, tp_rank)


def golden(case: RoundTrip, **options: Any) -> dict[tuple[int, int], dict[str, Any]]:
    """Return {(tp_rank, ep_rank): {"dispatch": [(tensor, valid)], "combine": [(tensor, valid)]}}.

    ``options``: ``product`` and ``const_expert`` of the goldens.
    """
    calls = case.calls()
    dispatched = reference.dispatch_v2(
        [{**case.dispatch_args(ep, tp)} for tp, ep in calls], **{k: v for k, v in options.items() if k == "product"}
    )
    backs = []
    for (tp, ep), outputs in zip(calls, dispatched, strict=True):
        tensors = [tensor for tensor, _ in outputs]
        backs.append(case.combine_args(ep, tp, tensors, experts(case, ep, tp, tensors)))
    combined = reference.combine_v2(backs, **options)
    return {call: {"dispatch": out, "combine": x} for call, out, x in zip(calls, dispatched, combined, strict=True)}


def _rows(found: dict[str, Any]) -> list[Expected]:
    rows = [
        Expected(operator=DISPATCH, name=name, tensor=tensor, valid=valid)
        for name, (tensor, valid) in zip(_DISPATCH_OUTPUTS, found["dispatch"], strict=True)
    ]
    tensor, valid = found["combine"][0]
    return [*rows, Expected(operator=COMBINE, name="x", tensor=tensor, valid=valid)]


def _tp_size(case: RoundTrip) -> int:
    return max(case.tp_world_size, 1)
