"""The split path, the first version and combine with RMS norm: round trips over real ranks, and the same through their goldens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from .. import backends, groups, ops
from ..operators import OPERATORS
from ..operators.moe_distribute import reference, reference_split, reference_v1
from ..operators.moe_distribute.cases import NAMED, RoundTrip, random_case
from .companion_args import Args, adapted, fits, norm_back, split_args, split_back, v1_args, v1_back
from .moe_distribute import experts, groups_of
from .results import Expected, RankRun

_PREFIX = "npu_moe_distribute"
# Of each flow, in the order of its results: the operator that they are counted for, and their names if they are not all its outputs.
_OUTPUTS: dict[str, list[tuple[str, tuple[str, ...]]]] = {
    "split": [
        (f"{_PREFIX}_dispatch_setup", ("expand_idx",)),
        (f"{_PREFIX}_dispatch_teardown", ()),
        (f"{_PREFIX}_combine_setup", ("x, by its teardown",)),
        (f"{_PREFIX}_combine_teardown", ()),
    ],
    "v1": [(f"{_PREFIX}_dispatch", ()), (f"{_PREFIX}_combine", ())],
    "norm": [(f"{_PREFIX}_combine_add_rms_norm", ())],
}
Names = dict[str, Any]
Golden = list[list[tuple[torch.Tensor | None, int]]]


@dataclass(frozen=True, kw_only=True)
class Companions:
    """One flow; see `checking.Family`. Its cases are those of v2 that it can carry out, or what is left of them."""

    flow: str
    name: str

    @property
    def operators(self) -> tuple[str, ...]:
        """See `checking.Family`."""
        return tuple(operator for operator, _ in _OUTPUTS[self.flow])

    def named_cases(self) -> Sequence[RoundTrip]:
        """See `checking.Family`."""
        return [self._named(case) for case in NAMED if fits(self.flow, case)]

    def random_case(self, seed: int) -> RoundTrip:
        """See `checking.Family`."""
        return self._named(adapted(self.flow, random_case(seed)))

    def _named(self, case: RoundTrip) -> RoundTrip:
        return replace(case, id=f"{self.flow}-{case.id}")

    def world_size(self, case: RoundTrip) -> int:
        """See `checking.Family`; rank = ep_rank_id * TP size + tp_rank_id."""
        return case.world_size * max(case.tp_world_size, 1)

    def run_on_rank(self, rank: int, case: RoundTrip) -> RankRun | None:
        """Make the flow's calls on this rank; None for a rank that the case has removed."""
        ep_groups, tp_groups = groups_of(case)  # also on a rank that does not call
        ep, tp = divmod(rank, max(case.tp_world_size, 1))
        if (tp, ep) not in case.calls():
            return None
        names: Names = {"group_ep": ep_groups[tp].group_name}
        if case.tp_world_size == 2:
            names["group_tp"] = tp_groups[ep].group_name
        outputs = _RUN[self.flow](case, ep, tp, names)
        return RankRun(outputs=outputs, backend=backends.of(groups.resolve(names["group_ep"]).among(case.alive)).name)

    def expected(self, case: RoundTrip) -> dict[int, list[Expected]]:
        """See `checking.Family`."""
        found = zip(case.calls(), _GOLDEN[self.flow](case), strict=True)
        return {ep * max(case.tp_world_size, 1) + tp: self._rows(results) for (tp, ep), results in found}

    def _rows(self, results: Sequence[tuple[torch.Tensor | None, int]]) -> list[Expected]:
        named = [
            (operator, name)
            for operator, names in _OUTPUTS[self.flow]
            for name in names or [row.name for row in OPERATORS[operator].outputs]
        ]
        return [
            Expected(operator=operator, name=name, tensor=tensor, valid=valid)
            for (operator, name), (tensor, valid) in zip(named, results, strict=True)
        ]


# --- on ranks ------------------------------------------------------------------------------------------------------------------------


def _split(case: RoundTrip, ep: int, tp: int, names: Names) -> list[torch.Tensor | None]:
    setup, teardown = split_args(case, ep)
    y, index, command = ops.npu_moe_distribute_dispatch_setup(**setup, **names)
    dispatched = ops.npu_moe_distribute_dispatch_teardown(y=y, comm_cmd_info=command, **teardown, **names)
    made = _split_experts(case, ep, list(dispatched))
    setup, teardown = split_back(case, ep, index, list(dispatched), made)
    placeholder, command = ops.npu_moe_distribute_combine_setup(**setup, **names)
    x = ops.npu_moe_distribute_combine_teardown(quant_expand_x=placeholder, comm_cmd_info=command, **teardown, **names)
    return [index, *dispatched, x, x]


def _split_experts(case: RoundTrip, ep: int, dispatched: list[Any]) -> torch.Tensor:
    expand_x, scales, assist, nums = dispatched
    counts = assist if assist.numel() else torch.zeros(case.world_size * len(nums), dtype=torch.int32)
    return experts(case, ep, 0, [expand_x, scales, assist, nums, counts, None, None])


def _v1(case: RoundTrip, ep: int, tp: int, names: Names) -> list[torch.Tensor | None]:
    out = ops.npu_moe_distribute_dispatch(**v1_args(case, ep, tp), **names)
    y = experts(case, ep, tp, out)
    return [*out, ops.npu_moe_distribute_combine(**v1_back(case, ep, tp, out, y), **names)]


def _norm(case: RoundTrip, ep: int, tp: int, names: Names) -> list[torch.Tensor | None]:
    out = ops.npu_moe_distribute_dispatch_v2(**case.dispatch_args(ep, tp), **names)
    back = norm_back(case, ep, tp, out, experts(case, ep, tp, out))
    return list(ops.npu_moe_distribute_combine_add_rms_norm(**back, **names))


_RUN: dict[str, Callable[[RoundTrip, int, int, Names], list[torch.Tensor | None]]] = {"split": _split, "v1": _v1, "norm": _norm}

# --- in the golden -------------------------------------------------------------------------------------------------------------------


def _split_golden(case: RoundTrip) -> Golden:
    ranks = [ep for _, ep in case.calls()]
    dispatched = reference_split.split_dispatch([{**split_args(case, ep)[1], **split_args(case, ep)[0]} for ep in ranks])
    backs = []
    for ep, outputs in zip(ranks, dispatched, strict=True):
        index, *rest = [tensor for tensor, _ in outputs]
        setup, teardown = split_back(case, ep, index, rest, _split_experts(case, ep, rest))
        backs.append({**setup, **teardown})
    combined = reference_split.split_combine(backs)
    return [[*out, *x, *x] for out, x in zip(dispatched, combined, strict=True)]


def _v1_golden(case: RoundTrip) -> Golden:
    dispatched = reference_v1.dispatch([v1_args(case, ep, tp) for tp, ep in case.calls()])
    combined = reference_v1.combine(_backs(case, dispatched, v1_back))
    return [[*out, *x] for out, x in zip(dispatched, combined, strict=True)]


def _norm_golden(case: RoundTrip) -> Golden:
    dispatched = reference.dispatch_v2([case.dispatch_args(ep, tp) for tp, ep in case.calls()])
    return list(reference.combine_add_rms_norm(_backs(case, dispatched, norm_back)))


def _backs(case: RoundTrip, dispatched: Golden, back: Callable[..., Args]) -> list[Args]:
    backs = []
    for (tp, ep), outputs in zip(case.calls(), dispatched, strict=True):
        tensors = [tensor for tensor, _ in outputs]
        backs.append(back(case, ep, tp, tensors, experts(case, ep, tp, tensors)))
    return backs


_GOLDEN: dict[str, Callable[[RoundTrip], Golden]] = {"split": _split_golden, "v1": _v1_golden, "norm": _norm_golden}

COMPANIONS = tuple(Companions(flow=flow, name=f"moe_distribute_{flow}") for flow in _OUTPUTS)
