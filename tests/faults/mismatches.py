"""What must be equal on all ranks, and how one rank alone writes it differently: rows for every operator and every such expression."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

import commfuse
from commfuse.operators import OPERATORS
from commfuse.operators.all_gather_mm.cases import GatherScatterCase
from commfuse.operators.moe_distribute.cases import RoundTrip
from tests.backends.cpu import matmul
from tests.operators.moe_distribute import companions
from tests.operators.moe_distribute.halves import MicroBatch, world
from tests.operators.moe_distribute.round_trips import experts

Args = dict[str, Any]
NAME = "npu_moe_distribute_{}".format
PLAIN = RoundTrip(id="pair", world_size=2, num_tokens=(3, 3), hidden=16, moe_expert_num=4, top_k=2)
SMOOTH = replace(PLAIN, id="smooth", quant_mode=2, smooth=True)
SPECIAL = replace(PLAIN, id="special", zero_expert_num=1, copy_expert_num=1, const_expert_num=1)
INT8 = GatherScatterCase(id="int8", x2_scale=torch.float32, x1_scale=True)


@dataclass(frozen=True, kw_only=True)
class Differ:
    """The last rank alone executes ``wrong`` on its arguments, by their names; all read about ``what``.

    ``refused``: that value is no valid one on a group of this size, so that its rank refuses it, and all read that.
    """

    operator: str
    what: str
    wrong: str
    case: Any = PLAIN  # a RoundTrip, or a case of the matmul operators
    refused: bool = False


_MORE_COUNTS = "; ep_send_counts = torch.cat([ep_send_counts, ep_send_counts[-1:].repeat(4)])"
_RANKS = {  # of every operator of the family
    "ep_world_size": "ep_world_size = 3",
    "expert_shard_type": "expert_shard_type = 1",
}
_BATCH = "BS if global_bs == 0 else None"
_MOE = {
    "product": "commfuse.config.set(product='A3,warn')",
    "moe_expert_num": "moe_expert_num = 8",
    "tp_world_size": "tp_world_size = 1",
    "shared_expert_num": "shared_expert_num = 2",
    "shared_expert_rank_num": "shared_expert_rank_num = 1",
    "global_bs": "global_bs = 12",
    "comm_alg": "comm_alg = 'fullmesh'",
    "zero_expert_num": "zero_expert_num = 3",
    "copy_expert_num": "copy_expert_num = 3",
    "const_expert_num": "const_expert_num = 3",
    "K": "expert_ids = expert_ids[:, :1]",
    _BATCH: "expert_ids = expert_ids[:2]",
}
_DISPATCH = {
    **_MOE,
    _BATCH: "x = x[:2]; expert_ids = expert_ids[:2]",
    "H": "x = x[:, :8]",
    "x.dtype": "x = x.half()",
    "quant_mode": "quant_mode = 2",
    "expert_scales is not None": "expert_scales = torch.ones(3, 2)",
}
_COMBINE = {
    **_MOE,
    "moe_expert_num": _MOE["moe_expert_num"] + _MORE_COUNTS,
    "shared_expert_rank_num": _MOE["shared_expert_rank_num"] + _MORE_COUNTS,
    "H": "expand_x = expand_x[:, :8]",
    "K": "expert_ids = expert_ids[:, :1]; expert_scales = expert_scales[:, :1]",
    _BATCH: "expert_ids = expert_ids[:2]; expert_scales = expert_scales[:2]",
    "expand_x.dtype": "expand_x = expand_x.half()",
    "comm_quant_mode": "comm_quant_mode = 2",
    "copy_expert_num": ("copy_expert_num = 3", SPECIAL),
    "const_expert_num": ("const_expert_num = 0; zero_expert_num = 2", SPECIAL),
}
_ONE_EXPERT_EACH = "expert_ids = torch.arange(3, dtype=torch.int32)[:, None]; expand_idx = torch.zeros(3, dtype=torch.int32)"
_V1_BACK = {
    **_COMBINE,
    "K": f"{_ONE_EXPERT_EACH}; expert_scales = expert_scales[:, :1]",
    _BATCH: f"{_COMBINE[_BATCH]}; expand_idx = expand_idx[:4]",
}
_NORM = {
    **_COMBINE,
    "H": "expand_x = expand_x[:, :8]; residual_x = residual_x[..., :8]; gamma = gamma[:8]",
    _BATCH: f"{_COMBINE[_BATCH]}; residual_x = residual_x[:2]",
    "expand_x.dtype": "expand_x = expand_x.half(); residual_x = residual_x.half(); gamma = gamma.half()",
    "norm_eps": "norm_eps = 0.5",
}
_MORE_SUMS = "; assist_info_for_combine[4:] = assist_info_for_combine[3]"
_SETUP_BACK = {
    **_MOE,
    "moe_expert_num": _MOE["moe_expert_num"] + _MORE_SUMS,
    "shared_expert_rank_num": _MOE["shared_expert_rank_num"] + _MORE_SUMS,
    "H": _COMBINE["H"],
    "expand_x.dtype": _COMBINE["expand_x.dtype"],
    "comm_quant_mode": _COMBINE["comm_quant_mode"],
}
_SCALES = {"scales is not None": ("scales = None", SMOOTH)}
_PRODUCT = {"product": _MOE["product"]}
_GMM = {
    **_PRODUCT,
    "ep_world_size": "ep_world_size = 3",
    "e": "gmm_weight = torch.cat([gmm_weight, gmm_weight]); send_counts = send_counts * 2; recv_counts = recv_counts * 2; "
    "gmm_x = torch.cat([gmm_x, gmm_x])",
    "gmm_x.dtype": "gmm_x = gmm_x.half(); gmm_weight = gmm_weight.half(); mm_x = mm_x.half(); mm_weight = mm_weight.half()",
}
_TABLES: dict[str, dict[str, Any]] = {
    NAME("dispatch_v2"): {**_DISPATCH, **_SCALES},
    NAME("combine_v2"): _COMBINE,
    NAME("dispatch"): {**_DISPATCH, **_SCALES},
    NAME("combine"): _V1_BACK,
    NAME("combine_add_rms_norm"): _NORM,
    NAME("dispatch_setup"): {**_DISPATCH, **_SCALES},
    NAME("combine_setup"): _SETUP_BACK,
    NAME("dispatch_teardown"): {},
    NAME("combine_teardown"): {},
    "npu_gmm_alltoallv": {**_GMM, "N1": "gmm_weight = gmm_weight[:, :, :8]"},
    "npu_alltoallv_gmm": {**_GMM, "H1": "gmm_x = gmm_x[:, :8]; gmm_weight = gmm_weight[:, :8]"},
    "npu_all_gather_base_mm": {
        **_PRODUCT,
        "world_size": "world_size = 3",
        "m": "input = input[:3]",
        "k": "input = input[:, :8]; x2 = x2[:8]",
        "input.dtype": "input = input.half(); x2 = x2.half(); bias = bias.half()",
        "x1_scale is not None": ("x1_scale = None", INT8),
    },
    "npu_mm_reduce_scatter_base": {
        **_PRODUCT,
        "world_size": "world_size = 3",
        "m": "input = input[:2]",
        "n": "x2 = x2[:, :8]; bias = bias[:8]",
        "result_dtype": "input = input.half(); x2 = x2.half(); bias = bias.half()",
    },
    "npu_mm_all_reduce_base": {
        **_PRODUCT,
        "x1.shape[:-1]": "x1 = x1[:, :3]; x3 = x3[:, :3]",
        "n": "x2 = x2[:, :8]; bias = bias[:8]; x3 = x3[..., :8]",
        "result_dtype": "x1 = x1.half(); x2 = x2.half(); bias = bias.half(); x3 = x3.half()",
    },
    "_npu_distribute_barrier": {**_PRODUCT, "world_size": "world_size = 3"},
}
_REFUSED = (*_RANKS, "world_size")
_REFUSED_BY_HALVES = ("comm_alg", "comm_quant_mode")


def _rows() -> list[Differ]:
    rows = []
    for operator, table in _TABLES.items():
        wanted = ("product", *OPERATORS[operator].agree) if table else ()
        for what in wanted:
            written = {**_RANKS, "comm_type": "comm_type = 1", **table}.get(what)
            if written is None:
                continue  # a test finds it missing
            plain = matmul.CASES.get(operator, PLAIN)
            refused = what in _REFUSED or (operator.endswith("setup") and what in _REFUSED_BY_HALVES)
            wrong, case = (written, plain) if isinstance(written, str) else written
            rows.append(Differ(operator=operator, what=what, wrong=wrong, case=case, refused=refused))
    return rows


ROWS = _rows()


def plain_args(operator: str, rank: int, case: Any) -> Args:
    """Every rank's arguments of a valid call, by name, after the calls that must come before."""
    if not isinstance(case, RoundTrip):
        args = {"input" if name == "self" else name: value for name, value in case.args(rank).items()}
        return {**args, OPERATORS[operator].group: world()}
    short = operator.removeprefix("npu_moe_distribute_")
    if short in ("dispatch_setup", "combine_setup"):
        return {**_batch(rank, case, short).args[short], "group_ep": world()}
    if short == "dispatch":
        return {**companions.v1_args(case, rank, 0), "group_ep": world()}
    if short == "combine":
        out = commfuse.npu_moe_distribute_dispatch(**companions.v1_args(case, rank, 0), group_ep=world())
        return {**companions.v1_back(case, rank, 0, out, experts(case, rank, 0, out)), "group_ep": world()}
    args = {**case.dispatch_args(rank), "group_ep": world()}
    if short == "dispatch_v2":
        return args
    out = commfuse.npu_moe_distribute_dispatch_v2(**args)
    y = experts(case, rank, 0, out)
    back = companions.norm_back(case, rank, 0, out, y) if "norm" in short else case.combine_args(rank, 0, out, y)
    return {**back, "group_ep": world()}


def _batch(rank: int, case: RoundTrip, half: str) -> MicroBatch:
    batch = MicroBatch(rank, case)
    if half == "combine_setup":
        batch.call_all(last="dispatch_teardown")
    return batch


def call(operator: str, args: Args) -> list[torch.Tensor]:
    """Make the call; a setup together with its teardown, where peers are heard."""
    found = getattr(commfuse, operator)(**args)
    results = list(found) if isinstance(found, tuple) else [found]
    if operator.endswith("setup"):
        results += getattr(commfuse, operator.replace("setup", "teardown"))(**_teardown_args(operator, args, results))
    return results


def _teardown_args(operator: str, args: Args, results: list[torch.Tensor]) -> Args:
    teardown = OPERATORS[operator.replace("setup", "teardown")]
    common = {name: value for name, value in args.items() if name in teardown.names}
    if "dispatch" in operator:
        return {**common, "y": results[0], "comm_cmd_info": results[2]}
    ids, weights = args["expert_ids"].flatten(), torch.ones(args["expert_ids"].shape)
    index = torch.tensor([int((ids[:pair] == expert).sum()) for pair, expert in enumerate(ids)], dtype=torch.int32)
    return {**common, "quant_expand_x": results[0], "comm_cmd_info": results[1], "expand_idx": index, "expert_scales": weights}
