"""The round trips of v2 as calls of the operators around it: which of them fit, and their arguments there.

A flow is "split", the setup and teardown halves, "v1", the first version, or "norm", combine with addition and RMS norm.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from ..operators.moe_distribute.cases import RoundTrip

Args = dict[str, Any]
_SPECIAL = ("zero_expert_num", "copy_expert_num", "const_expert_num")
_SPECIAL_INPUTS = ("ori_x", "const_expert_alpha_1", "const_expert_alpha_2", "const_expert_v")
_TP = ("tp_world_size", "tp_rank_id")


def without(args: Args, *names: str) -> Args:
    """Return ``args`` but for ``names``."""
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
    changes: Args = {
        **dict.fromkeys(_SPECIAL, 0),
        "alive": None,
        "elastic_flag_zero": False,
        "routing": "uniform" if case.routing == "special" else case.routing,
        "comm_alg": "",
        "shared_expert_x": None if flow == "v1" else case.shared_expert_x,
        "shared_expert_rank_num": 0 if drop_shared else shared,
        "moe_expert_num": experts_each * (case.world_size - (0 if drop_shared else shared)),
    }
    if flow == "split":
        mask = {"2d": "1d", "2d-false": "1d-false"}.get(case.mask or "", case.mask)
        changes |= {"mask": mask, "tp_world_size": 0, "with_expert_scales": False, "comm_quant_mode": 0}
    case = replace(case, **changes)
    return replace(case, top_k=min(case.top_k, case.moe_expert_num))


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
    """Arguments of the first version's dispatch."""
    return without(case.dispatch_args(ep, tp), "elastic_info", "performance_info", "comm_alg", *_SPECIAL)


def v1_back(case: RoundTrip, ep: int, tp: int, out: Any, y: Any) -> Args:
    """Arguments of the first version's combine, behind its dispatch's ``out`` and the experts' ``y``."""
    args = case.combine_args(ep, tp, out, y)
    index = args.pop("assist_info_for_combine")
    args = without(args, "elastic_info", "performance_info", "comm_alg", *_SPECIAL, *_SPECIAL_INPUTS)
    reserved = dict.fromkeys(("activation_scale", "weight_scale", "group_list"))
    return {**args, **reserved, "expand_idx": index, "out_dtype": 0, "group_list_type": 0}


def norm_back(case: RoundTrip, ep: int, tp: int, out: Any, y: Any) -> Args:
    """Arguments of combine with RMS norm, behind dispatch_v2's ``out`` and the experts' ``y``."""
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
