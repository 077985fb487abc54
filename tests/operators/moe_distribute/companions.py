"""The same round trips through the split path, the first version, and combine with RMS norm: on ranks and in the golden."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import Any

import torch

import commfuse
from commfuse.operators.moe_distribute import reference, reference_split, reference_v1
from commfuse.operators.moe_distribute.cases import RoundTrip
from tests.operators.moe_distribute.round_trips import experts, groups_of

Args = dict[str, Any]
_SPECIAL = ("zero_expert_num", "copy_expert_num", "const_expert_num")
_SPECIAL_INPUTS = ("ori_x", "const_expert_alpha_1", "const_expert_alpha_2", "const_expert_v")
_TP = ("tp_world_size", "tp_rank_id")


def without(args: Args, *names: str) -> Args:
    return {name: value for name, value in args.items() if name not in names}


def fits(flow: str, case: RoundTrip) -> bool:
    """Whether the operators of ``flow`` have every option that ``case`` uses."""
    plain = not (case.zero_expert_num or case.copy_expert_num or case.const_expert_num)
    elastic = case.alive is not None or case.elastic_flag_zero
    if flow == "norm":
        return not case.with_performance_info
    if flow == "split":
        one_dimensional = case.mask in (None, "1d", "1d-false")
        return (
            plain
            and not elastic
            and case.tp_world_size == 0
            and one_dimensional
            and case.comm_quant_mode == 0
            and not (case.with_expert_scales or case.with_performance_info or case.comm_alg)
        )
    shared = case.shared_expert_rank_num
    placed = not shared or (case.shared_expert_num == 1 and case.world_size % shared == 0 and case.mask is None)
    return plain and not elastic and placed and not case.with_performance_info and case.shared_expert_x is None


def adapted(flow: str, case: RoundTrip) -> RoundTrip:
    """The case without the options that the operators of ``flow`` do not have."""
    case = replace(case, with_performance_info=False)
    if flow == "norm":
        return case
    experts_each = case.moe_expert_num // (case.world_size - case.shared_expert_rank_num)
    shared, masked = case.shared_expert_rank_num, case.mask is not None
    drop_shared = flow == "v1" and shared > 0 and (case.shared_expert_num != 1 or case.world_size % shared > 0 or masked)
    case = replace(
        case,
        **dict.fromkeys(_SPECIAL, 0),
        alive=None,
        elastic_flag_zero=False,
        routing="uniform" if case.routing == "special" else case.routing,
        comm_alg="",
        shared_expert_x=None if flow == "v1" else case.shared_expert_x,
        shared_expert_rank_num=0 if drop_shared else shared,
        moe_expert_num=experts_each * (case.world_size - (0 if drop_shared else shared)),
    )
    if flow == "split":
        mask = {"2d": "1d", "2d-false": "1d-false"}.get(case.mask or "", case.mask)
        case = replace(case, mask=mask, tp_world_size=0, with_expert_scales=False, comm_quant_mode=0)
    return replace(case, top_k=min(case.top_k, case.moe_expert_num))


# --- arguments -----------------------------------------------------------------------------------------------------------------


def split_args(case: RoundTrip, ep: int) -> tuple[Args, Args]:
    """Arguments of dispatch_setup, and of dispatch_teardown without what the setup returns."""
    args = without(case.dispatch_args(ep), "expert_scales", "elastic_info", "performance_info", "comm_alg", *_TP, *_SPECIAL)
    setup = without(args, "expert_token_nums_type")
    teardown = without(args, "scales", "x_active_mask")
    return setup, teardown


def split_back(case: RoundTrip, ep: int, index: Any, dispatched: list[Any], y: Any) -> tuple[Args, Args]:
    """Arguments of combine_setup, and of combine_teardown without what the setup returns."""
    expand_x, scales, assist, nums = dispatched
    v2 = case.combine_args(ep, 0, [expand_x, scales, assist, nums, assist, None, None], y)
    args = without(
        v2, "elastic_info", "performance_info", "comm_alg", "expand_scales", "tp_send_counts", *_TP, *_SPECIAL, *_SPECIAL_INPUTS
    )
    setup = without(args, "expert_scales", "ep_send_counts", "x_active_mask", "shared_expert_x")
    teardown = without(args, "assist_info_for_combine", "ep_send_counts")
    return setup, {**teardown, "expand_idx": index}


def v1_args(case: RoundTrip, ep: int, tp: int) -> Args:
    return without(case.dispatch_args(ep, tp), "elastic_info", "performance_info", "comm_alg", *_SPECIAL)


def v1_back(case: RoundTrip, ep: int, tp: int, out: Any, y: Any) -> Args:
    args = case.combine_args(ep, tp, out, y)
    index = args.pop("assist_info_for_combine")
    args = without(args, "elastic_info", "performance_info", "comm_alg", *_SPECIAL, *_SPECIAL_INPUTS)
    reserved = dict.fromkeys(("activation_scale", "weight_scale", "group_list"))
    return {**args, **reserved, "expand_idx": index, "out_dtype": 0, "group_list_type": 0}


def norm_back(case: RoundTrip, ep: int, tp: int, out: Any, y: Any) -> Args:
    args = without(case.combine_args(ep, tp, out, y), "performance_info")
    index = args.pop("assist_info_for_combine")
    generator = torch.Generator().manual_seed(case.seed * 100 + ep)
    num_tokens, hidden = case.num_tokens[ep], case.hidden
    reserved = dict.fromkeys(("activation_scale", "weight_scale", "group_list"))
    return {
        **args,
        **reserved,
        "expand_idx": index,
        "residual_x": torch.randn(num_tokens, 1, hidden, generator=generator).to(case.dtype),
        "gamma": torch.randn(hidden, generator=torch.Generator().manual_seed(case.seed)).to(case.dtype),
        "norm_eps": 1e-5,
        "out_dtype": 0,
        "group_list_type": 0,
    }


# --- on ranks --------------------------------------------------------------------------------------------------------------------


def on_ranks(rank: int, flow: str, cases: list[RoundTrip], settings: dict[str, Any]) -> bytes:
    with commfuse.config.override(**settings):
        return pickle.dumps([_RUN[flow](rank, case) for case in cases])


def _where(rank: int, case: RoundTrip) -> tuple[int, int, Args] | None:
    groups_of(case)  # also on a rank that does not call
    ep, tp = divmod(rank, max(case.tp_world_size, 1))
    return where(rank, case) if (tp, ep) in case.calls() else None


def where(rank: int, case: RoundTrip) -> tuple[int, int, Args]:
    """EP rank, TP rank and the names of the groups."""
    ep_groups, tp_groups = groups_of(case)
    ep, tp = divmod(rank, max(case.tp_world_size, 1))
    names = {"group_ep": ep_groups[tp].group_name}
    if case.tp_world_size == 2:
        names["group_tp"] = tp_groups[ep].group_name
    return ep, tp, names


def _split(rank: int, case: RoundTrip) -> Any:
    found = _where(rank, case)
    if found is None:
        return None
    ep, _, names = found
    setup, teardown = split_args(case, ep)
    y, index, command = commfuse.npu_moe_distribute_dispatch_setup(**setup, **names)
    dispatched = commfuse.npu_moe_distribute_dispatch_teardown(y=y, comm_cmd_info=command, **teardown, **names)
    made = _split_experts(case, ep, list(dispatched))
    setup, teardown = split_back(case, ep, index, list(dispatched), made)
    placeholder, command = commfuse.npu_moe_distribute_combine_setup(**setup, **names)
    x = commfuse.npu_moe_distribute_combine_teardown(quant_expand_x=placeholder, comm_cmd_info=command, **teardown, **names)
    return [index, *dispatched, x]


def _split_experts(case: RoundTrip, ep: int, dispatched: list[Any]) -> torch.Tensor:
    expand_x, scales, assist, nums = dispatched
    counts = assist if assist.numel() else torch.zeros(case.world_size * len(nums), dtype=torch.int32)
    return experts(case, ep, 0, [expand_x, scales, assist, nums, counts, None, None])


def _v1(rank: int, case: RoundTrip) -> Any:
    found = _where(rank, case)
    if found is None:
        return None
    ep, tp, names = found
    out = commfuse.npu_moe_distribute_dispatch(**v1_args(case, ep, tp), **names)
    y = experts(case, ep, tp, out)
    return [*out, commfuse.npu_moe_distribute_combine(**v1_back(case, ep, tp, out, y), **names)]


def _norm(rank: int, case: RoundTrip) -> Any:
    found = _where(rank, case)
    if found is None:
        return None
    ep, tp, names = found
    out = commfuse.npu_moe_distribute_dispatch_v2(**case.dispatch_args(ep, tp), **names)
    back = norm_back(case, ep, tp, out, experts(case, ep, tp, out))
    return list(commfuse.npu_moe_distribute_combine_add_rms_norm(**back, **names))


_RUN = {"split": _split, "v1": _v1, "norm": _norm}

# --- in the golden -----------------------------------------------------------------------------------------------------------------


def golden(flow: str, case: RoundTrip) -> dict[tuple[int, int], list[tuple[Any, int]]]:
    return dict(zip(case.calls(), _GOLDEN[flow](case), strict=True))


def _split_golden(case: RoundTrip) -> list[Any]:
    ranks = [ep for _, ep in case.calls()]
    dispatched = reference_split.split_dispatch([{**split_args(case, ep)[1], **split_args(case, ep)[0]} for ep in ranks])
    backs = []
    for ep, outputs in zip(ranks, dispatched, strict=True):
        index, *rest = [tensor for tensor, _ in outputs]
        setup, teardown = split_back(case, ep, index, rest, _split_experts(case, ep, rest))
        backs.append({**setup, **teardown})
    combined = reference_split.split_combine(backs)
    return [[*out, *x] for out, x in zip(dispatched, combined, strict=True)]


def _v1_golden(case: RoundTrip) -> list[Any]:
    calls = case.calls()
    dispatched = reference_v1.dispatch([v1_args(case, ep, tp) for tp, ep in calls])
    backs = []
    for (tp, ep), outputs in zip(calls, dispatched, strict=True):
        tensors = [tensor for tensor, _ in outputs]
        backs.append(v1_back(case, ep, tp, tensors, experts(case, ep, tp, tensors)))
    return [[*out, *x] for out, x in zip(dispatched, reference_v1.combine(backs), strict=True)]


def _norm_golden(case: RoundTrip) -> list[Any]:
    calls = case.calls()
    dispatched = reference.dispatch_v2([case.dispatch_args(ep, tp) for tp, ep in calls])
    backs = []
    for (tp, ep), outputs in zip(calls, dispatched, strict=True):
        tensors = [tensor for tensor, _ in outputs]
        backs.append(norm_back(case, ep, tp, tensors, experts(case, ep, tp, tensors)))
    return list(reference.combine_add_rms_norm(backs))


_GOLDEN = {"split": _split_golden, "v1": _v1_golden, "norm": _norm_golden}
