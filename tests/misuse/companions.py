"""What one can write wrongly in the first version of dispatch and combine and in combine with RMS norm, and what one reads."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import commfuse
from commfuse.operators.moe_distribute.cases import RoundTrip

from .bases import PAIR, PARTNERS, SPECIAL
from .case import Misuse
from .chains import COMBINE, DISPATCH, NORM, wrong_kinds

ROWS = {DISPATCH: "x", COMBINE: "expand_x", NORM: "expand_x"}
FOUR = replace(PAIR, id="four", world_size=4, num_tokens=(3,) * 4)
INT8 = replace(PAIR, id="pair-int8", quant_mode=2, smooth=True)
SHARED = replace(PAIR, id="pair-shared", shared_expert_rank_num=1, moe_expert_num=4)
SHARED_ROWS = replace(PAIR, id="pair-shared-rows", shared_expert_x=2)
A3_V1 = replace(PAIR, id="pair-a3-v1", num_tokens=(2, 2), hidden=7168)
A3_NORM = replace(A3_V1, id="pair-a3", hidden=1024)
A2 = replace(PAIR, id="pair-a2", num_tokens=(2, 2), hidden=64)
A2_PARTNERS = replace(PARTNERS, id="partners-a2", hidden=64)
HIERARCHY = "os.environ['HCCL_INTRA_PCIE_ENABLE'] = '1'; os.environ['HCCL_INTRA_ROCE_ENABLE'] = '0'"
NAMES = {DISPATCH: "v1-dispatch", COMBINE: "v1-combine", NORM: "norm"}


def case(operator: str, name: str, wrong: str, *says: str, **more: Any) -> Misuse:
    return Misuse(id=f"{NAMES[operator]}-{name}", operator=operator, wrong=wrong, says=says, **{"base": PAIR, **more})


def a3(operator: str, name: str, wrong: str, *says: str, **more: Any) -> Misuse:
    base = A3_NORM if operator == NORM else A3_V1
    return case(operator, f"a3-{name}", wrong, "under the rules of A3", *says, **{"base": base, "product": "A3", **more})


def a2(operator: str, name: str, wrong: str, *says: str, **more: Any) -> Misuse:
    """A test has no 16 ranks, so every call reads that too."""
    says = ("under the rules of A2", "ep_world_size = 2: must be one of 16, 32", *says)
    return case(operator, f"a2-{name}", wrong, *says, **{"base": A2, "product": "A2", **more})


def mismatch(operator: str, name: str, wrong: str, *says: str, **more: Any) -> Misuse:
    """Process 1 alone writes ``wrong``."""
    return case(operator, f"other-{name}", wrong, *says, **{"on_rank": 1, "error": commfuse.MismatchError, **more})


def kinds(operator: str) -> list[Misuse]:
    return [replace(one, id=f"{NAMES[operator]}-{one.id}") for one in wrong_kinds(operator, PAIR)]


def everywhere(operator: str) -> list[Misuse]:
    rows = ROWS[operator]
    tp = {"base": PARTNERS}
    found = [
        case(operator, "world-size-zero", "ep_world_size = 0", "ep_world_size = 0", "must be at least 1"),
        case(operator, "world-size-of-another-group", "ep_world_size = 1", "ep_world_size = 1", "the size of group_ep = 2"),
        case(operator, "rank-id-negative", "ep_rank_id = -1", "ep_rank_id = -1", "in 0..ep_world_size - 1 = 0..1"),
        case(operator, "rank-id-of-nobody", "ep_rank_id = 2", "ep_rank_id = 2", "this process's rank in group_ep = "),
        case(operator, "expert-num-zero", "moe_expert_num = 0", "moe_expert_num = 0", "must be at least 1"),
        case(operator, "expert-num-not-divisible", "moe_expert_num = 9", "moe_expert_num = 9", "shared_expert_rank_num = 2"),
        case(operator, "shard-type-one", "expert_shard_type = 1", "expert_shard_type = 1", "must be 0"),
        case(operator, "shared-num-negative", "shared_expert_num = -1", "shared_expert_num = -1", "must be at least 0"),
        case(operator, "shared-ranks-only", "shared_expert_rank_num = 2", "shared_expert_rank_num = 2", "0..1"),
        case(
            operator,
            "shared-ranks-not-a-multiple",
            "shared_expert_num = 2; shared_expert_rank_num = 1",
            "shared_expert_rank_num = 1: must be a positive multiple of shared_expert_num = 2",
        ),
        case(operator, "tp-world-size-three", "tp_world_size = 3", "tp_world_size = 3: must be one of 0, 1, 2"),
        case(
            operator,
            "tp-rank-id-without-tp",
            "tp_rank_id = 1",
            "tp_rank_id = 1: must be 0 or 1 with tp_world_size 2, otherwise 0",
        ),
        case(operator, "tp-without-group", "group_tp = ''", "group_tp = ''", "another group than group_ep", **tp),
        case(operator, "tp-with-two-experts", "moe_expert_num = 4", "e = 2", "must be 1", "when tp_world_size == 2", **tp),
        case(operator, "tp-rank-id-of-the-partner", "tp_rank_id = 1 - tp_rank_id", "this process's rank in group_tp", **tp),
        case(operator, "no-columns", f"{rows} = {rows}[:, :0]", "H = 0", "must be at least 1"),
        case(operator, "no-choice", "expert_ids = expert_ids[:, :0]", "K = 0", "must be in 1..all_experts = 1..8"),
        case(operator, "global-bs-below-own", "global_bs = 4", "global_bs = 4", "at least BS * ep_world_size = 6"),
        case(operator, "global-bs-beyond-int32", "global_bs = 2**31", "A = 6442450944", "fit int32"),
        case(operator, "ids-too-large", "expert_ids[1, 0] = 8", "expert_ids[1, 0] = 8: must be in 0..7"),
        case(operator, "ids-twice", "expert_ids[0, 2] = expert_ids[0, 0]", "expert_ids[0, 2] = ", "must differ from "),
        case(operator, "ids-on-one-rank", "expert_ids[0, 0] = 99", "refused on rank 1 of 2", "expert_ids[0, 0] = 99", on_rank=1),
        a3(operator, "too-many-tokens", many_tokens(operator), "BS = 513", "must be in 1..512"),
        a3(operator, "top-9", "expert_ids = torch.arange(9).int().repeat(2, 1)", "K = 9", "must be in 1..8"),
        a3(operator, "one-rank", "# the group has 1 rank", "ep_world_size = 1", "must be in 2..768", base=alone(operator)),
        a3(operator, "too-many-experts", "moe_expert_num = 1026", "moe_expert_num = 1026", "must be in 1..1024"),
        a3(operator, "too-many-experts-per-rank", "moe_expert_num = 2050", "e * ep_world_size = 2050", "must be in 1..2048"),
        a3(operator, "small-buffer", "os.environ['HCCL_BUFFSIZE'] = '1'", "HCCL_BUFFSIZE = 1: must be at least 2 MB"),
        mismatch(operator, "expert-num", "moe_expert_num = 16", "moe_expert_num: 8 on rank 0 of 2; 16 on rank 1 of 2"),
        mismatch(operator, "global-bs", "global_bs = 8", "global_bs: 0 on rank 0 of 2; 8 on rank 1 of 2"),
        mismatch(
            operator,
            "operator",
            "# npu_moe_distribute_dispatch_v2 is called instead",
            f"'{operator}' on rank 0 of 2; 'npu_moe_distribute_dispatch_v2' on rank 1 of 2",
            calls="npu_moe_distribute_dispatch_v2",
        ),
    ]
    if operator == DISPATCH:  # the others hold counts of other experts then
        return found
    return [one for one in found if "other-expert-num" not in one.id]


def many_tokens(operator: str) -> str:
    ids = "expert_ids = torch.arange(3).int().repeat(513, 1)"
    return f"x = torch.zeros(513, 7168).bfloat16(); {ids}" if operator == DISPATCH else ids


def alone(operator: str) -> RoundTrip:
    return replace(A3_NORM if operator == NORM else A3_V1, id="alone-a3", world_size=1, num_tokens=(2,))


def in_v1(operator: str) -> list[Misuse]:
    rows, length = ROWS[operator], 12 if operator == COMBINE else 2
    mask = "x_active_mask = torch.ones(len(expert_ids)).bool()"
    return [
        case(
            operator,
            "two-shared-experts",
            "shared_expert_num = 2; shared_expert_rank_num = 2",
            "shared_expert_num = 2: must be 1",
            "when shared_expert_rank_num > 0",
            base=FOUR,
        ),
        case(
            operator,
            "world-not-divisible-by-shared-ranks",
            "shared_expert_rank_num = 3",
            "ep_world_size = 4: must be divisible by shared_expert_rank_num = 3",
            base=FOUR,
        ),
        case(operator, "mask-with-shared-ranks", mask, "x_active_mask", "None with shared-expert ranks", base=SHARED),
        a3(operator, "mask", mask, "x_active_mask", "must be None"),
        a3(operator, "hidden-size", f"{rows} = {rows}[:, :1024]", "H = 1024", "must be 7168"),
        a3(operator, "float32", f"{rows} = {rows}.float()", f"{rows}.dtype = 'float32'", "must be one of 'bfloat16', 'float16'"),
        a2(operator, "mask", mask, "x_active_mask", "must be None"),
        a2(operator, "too-many-tokens", many_tokens(operator).replace("513", "257"), "BS = 257", "must be in 1..256"),
        a2(operator, "wide", f"{rows} = torch.zeros({length}, 7200).bfloat16()", "H = 7200",
           "must be in 1..7168 when algorithm == 'fullmesh'"),
        a2(operator, "hierarchy-wide", f"{HIERARCHY}; {rows} = torch.zeros({length}, 10272).bfloat16()", "H = 10272",
           "must be in 1..10240 when algorithm == 'hierarchy'", "must be one of 16, 32, 64 when algorithm == 'hierarchy'"),
        a2(operator, "odd-width", f"{rows} = {rows}[:, :40]", "H = 40", "must be a multiple of 32"),
        a2(operator, "too-many-experts", "moe_expert_num = 514", "moe_expert_num = 514", "must be in 1..512"),
        a2(operator, "too-many-experts-per-rank", "moe_expert_num = 50", "e = 25", "must be in 1..24 when algorithm == 'fullmesh'"),
        a2(operator, "shared-ranks", "shared_expert_rank_num = 1", "shared_expert_rank_num = 1: must be 0"),
        a2(operator, "tensor-parallel", "# the call has tp_world_size = 2", "tp_world_size = 2: must be one of 0, 1", base=A2_PARTNERS),
        a2(operator, "small-buffer", "os.environ['HCCL_BUFFSIZE'] = '1'", "HCCL_BUFFSIZE = 1: must be at least 5 MB"),
    ]  # fmt: skip


IN_V1_DISPATCH = [
    case(DISPATCH, "quant-mode-one", "quant_mode = 1", "quant_mode = 1: must be one of 0, 2"),
    case(DISPATCH, "nums-type-two", "expert_token_nums_type = 2", "expert_token_nums_type = 2: must be one of 0, 1"),
    case(
        DISPATCH, "scales-without-quantisation", "scales = torch.ones(8, 8)", "scales = ", "must be None", "when quant_mode == 0"
    ),
    case(DISPATCH, "scales-short", "scales = scales[:7]", "scales.shape = (7, 8)", "= (8, 8)", base=INT8),
    case(DISPATCH, "nan", "x[1, 3] = float('nan')", "x[1]: holds NaN or infinity", base=INT8, settings={"check": True}),
    a3(DISPATCH, "scales-not-contiguous", "quant_mode = 2; scales = torch.ones(7168, 8).t()", "scales", "must be contiguous"),
    a2(DISPATCH, "hierarchy-scales", f"{HIERARCHY}; quant_mode = 2; scales = torch.ones(8, 64)", "must be None when algorithm"),
    mismatch(DISPATCH, "dtype", "x = x.half()", "x.dtype: 'bfloat16' on rank 0 of 2; 'float16' on rank 1 of 2"),
    mismatch(DISPATCH, "quant-mode", "quant_mode = 2", "quant_mode: 0 on rank 0 of 2; 2 on rank 1 of 2"),
    mismatch(DISPATCH, "smooth-factors", "scales = None", "scales is not None: True on rank 0", base=INT8),
]

_TP_COUNTS = "tp_send_counts = torch.zeros(1, 1, 1, 1, dtype=torch.int64)"

IN_V1_COMBINE = [
    *(
        case(COMBINE, name.replace("_", "-"), f"{name} = torch.ones(1)", f"{name} = ", "must be None")
        for name in ("activation_scale", "weight_scale", "group_list")
    ),
    case(COMBINE, "shared-rows", "shared_expert_x = torch.ones(3, 8)", "shared_expert_x", "npu_moe_distribute_combine_v2 adds it"),
    case(COMBINE, "out-dtype", "out_dtype = 1", "out_dtype = 1: must be 0"),
    case(COMBINE, "group-list-type", "group_list_type = 1", "group_list_type = 1: must be 0"),
    case(COMBINE, "comm-quant-mode-one", "comm_quant_mode = 1", "comm_quant_mode = 1: must be one of 0, 2"),
    case(COMBINE, "comm-quant-with-tp", "comm_quant_mode = 2", "comm_quant_mode = 2: must be 0 when tp_world_size == 2", base=PARTNERS),
    case(COMBINE, "tp-without-counts", "tp_send_counts = None", "tp_send_counts = None: must be given", base=PARTNERS),
    case(COMBINE, "tp-counts-of-another-kind", _TP_COUNTS, "tp_send_counts.dtype = int64", "(1, 1, 1, 1)", base=PARTNERS),
    a2(COMBINE, "hierarchy-expand-scales", f"{HIERARCHY}; expand_scales = torch.ones(1, 1, 1, 1).half()", "expand_scales.dtype = float16",
       "expand_scales.shape = (1, 1, 1, 1)"),
    case(COMBINE, "tp-counts-swapped", "tp_send_counts[:] = torch.tensor([1, 99])", "tp_send_counts", base=PARTNERS),
    case(COMBINE, "counts-short", "ep_send_counts = ep_send_counts[:7]", "counts_length = 7", "= 8"),
    case(COMBINE, "counts-falling", "ep_send_counts[2] = -1", "ep_send_counts[2] = -1", "must be a prefix sum"),
    case(COMBINE, "counts-of-another-dispatch", "ep_send_counts += 1", "all must be those of one dispatch"),
    case(COMBINE, "fewer-rows-than-counted", "expand_x = expand_x[:1]", "rows: must be at most the rows of expand_x = 1"),
    case(COMBINE, "expand-idx-changed", "expand_idx[4] += 1", "expand_idx[4] = ", "as dispatch returned it"),
    case(COMBINE, "assist-info-of-v2", "expand_idx = torch.zeros(1536).int()", "expand_idx.shape = (1536,)", "= (9,)"),
    a3(COMBINE, "fewer-rows-than-published", "expand_x = expand_x[:-1]", "rows = 11", "at least A * copies = 12"),
    a2(COMBINE, "comm-quant-mode", "comm_quant_mode = 2", "comm_quant_mode = 2: must be 0 when algorithm == 'fullmesh'"),
    mismatch(COMBINE, "dtype", "expand_x = expand_x.half()", "expand_x.dtype: 'bfloat16' on rank 0 of 2; 'float16' on rank 1"),
    mismatch(COMBINE, "comm-quant-mode", "comm_quant_mode = 2", "comm_quant_mode: 0 on rank 0 of 2; 2 on rank 1 of 2"),
]  # fmt: skip

_CONST = replace(SPECIAL, id="pair-special", world_size=2, num_tokens=(3, 3))
_CONST_ROWS = ("ori_x", "const_expert_alpha_1", "const_expert_alpha_2", "const_expert_v")

IN_NORM = [
    *(
        case(NORM, name.replace("_", "-"), f"{name} = torch.ones(1)", f"{name} = ", "must be None")
        for name in ("activation_scale", "weight_scale", "group_list")
    ),
    *(
        case(NORM, f"without-{name.replace('_', '-')}", f"{name} = None", f"{name} = None: must be given when const_expert_num > 0",
             base=_CONST)
        for name in _CONST_ROWS
    ),
    *(
        case(NORM, f"{name.replace('_', '-')}-float16", f"{name} = {name}.half()", f"{name}.dtype = 'float16'", "= bfloat16", base=_CONST)
        for name in _CONST_ROWS
    ),
    *(
        case(NORM, f"{name}-of-another-kind-where-it-is-used", f"{name} = torch.zeros(1, 1, 1, 1, dtype=torch.int64)",
             f"{name}.dtype = int64", f"{name}.shape = (1, 1, 1, 1)", base=_CONST)
        for name in _CONST_ROWS
    ),
    case(NORM, "tp-counts-of-another-kind", _TP_COUNTS, "tp_send_counts.dtype = int64", "(1, 1, 1, 1)", base=PARTNERS),
    case(NORM, "alphas-of-different-dimensions", "const_expert_alpha_2 = torch.ones(1, 8).bfloat16()",
         "const_expert_alpha_2.ndim = 2: must be const_expert_alpha_1.ndim = 1", base=_CONST),
    case(NORM, "copy-experts-without-rows", "ori_x = None", "ori_x = None: must be given when copy_expert_num > 0", base=_CONST),
    case(NORM, "zero-num-negative", "zero_expert_num = -1", "zero_expert_num = -1: must be at least 0"),
    case(NORM, "copy-num-negative", "copy_expert_num = -1", "copy_expert_num = -1: must be at least 0"),
    case(NORM, "const-num-negative", "const_expert_num = -1", "const_expert_num = -1: must be at least 0"),
    case(NORM, "too-many-experts", "zero_expert_num = 2**31", "all_experts = 2147483656", "must be at most 2147483647"),
    case(NORM, "shared-rank-num-negative", "shared_expert_rank_num = -1", "shared_expert_rank_num = -1"),
    case(NORM, "tp-with-elastic-info", "elastic_info = torch.zeros(8).int()", "must be None when tp_world_size == 2", base=PARTNERS),
    case(NORM, "tp-without-counts", "tp_send_counts = None", "tp_send_counts = None: must be given", base=PARTNERS),
    case(NORM, "comm-alg-unknown", "comm_alg = 'ring'", "comm_alg = 'ring': must be one of ''"),
    case(NORM, "comm-quant-mode-one", "comm_quant_mode = 1", "comm_quant_mode = 1: must be one of 0, 2"),
    case(NORM, "comm-quant-with-tp", "comm_quant_mode = 2", "comm_quant_mode = 2: must be 0 when tp_world_size == 2", base=PARTNERS),
    case(NORM, "counts-short", "ep_send_counts = ep_send_counts[:7]", "counts_length = 7", "= 8"),
    case(NORM, "expand-idx-altered", "expand_idx[1] += 1", "must be that of the same dispatch"),
    case(NORM, "expand-idx-of-v1", "expand_idx = torch.zeros(9).int()", "expand_idx has 9 entries", "must have 3 for each"),
    case(NORM, "shared-rows-beside-shared-ranks", "shared_expert_x = torch.ones(3, 8).bfloat16()",
         "None (shared experts have ranks of their own)", base=SHARED),
    case(NORM, "shared-rows-of-another-dtype", "shared_expert_x = shared_expert_x.half()", "shared_expert_x.dtype = 'float16'",
         base=SHARED_ROWS),
    case(NORM, "shared-rows-3d-of-fewer-tokens", "shared_expert_x = shared_expert_x[None, :2]", "shared_rows_0 * shared_rows_1 = 2",
         base=SHARED_ROWS),
    case(NORM, "out-dtype", "out_dtype = 1", "out_dtype = 1: must be 0"),
    case(NORM, "group-list-type", "group_list_type = 1", "group_list_type = 1: must be 0"),
    case(NORM, "residual-2d", "residual_x = residual_x[:, 0]", "residual_x.shape = (3, 8)", "must be (BS, 1, H), 3-D"),
    case(NORM, "residual-of-float16-beside-bfloat16", "residual_x = residual_x.half()", "residual_x.dtype = 'float16'"),
    case(NORM, "gamma-of-float32-beside-bfloat16", "gamma = gamma.float()", "gamma.dtype = 'float32': must be expand_x.dtype = bfloat16"),
    case(NORM, "gamma-short", "gamma = gamma[:7]", "gamma.shape = (7,)", "= (8,)"),
    case(NORM, "eps-negative", "norm_eps = -1e-6", "norm_eps = -1e-06: must be at least 0"),
    case(NORM, "eps-not-a-number", "norm_eps = float('nan')", "norm_eps = nan: must be at least 0"),
    case(NORM, "a2", "# the product is A2", "product = 'A2': must be A3: A2 does not have this operator", base=A2, product="A2"),
    a3(NORM, "narrow", "expand_x = expand_x[:, :512]", "H = 512", "must be in 1024..8192"),
    a3(NORM, "float16", "expand_x = expand_x.half()", "expand_x.dtype = 'float16': must be 'bfloat16'"),
    a3(NORM, "mask-with-uneven-batches", "x_active_mask = torch.ones(2).bool(); global_bs = 8", "x_active_mask", "different batch sizes"),
    a3(NORM, "shared-num", "shared_expert_num = 0", "shared_expert_num = 0: must be 1"),
    a3(NORM, "shared-ranks", "shared_expert_rank_num = 1", "shared_expert_rank_num = 1: must be 0"),
    a3(NORM, "comm-quant-mode", "comm_quant_mode = 2", "comm_quant_mode = 2: must be 0"),
    a3(NORM, "comm-alg", "comm_alg = 'fullmesh_v1'", "comm_alg = 'fullmesh_v1': must be ''"),
    a3(NORM, "fewer-rows-than-published", "expand_x = expand_x[:-1]", "rows = 11", "at least A * copies = 12"),
    a3(NORM, "assist-info-short", "expand_idx = expand_idx[:-1]", "assist_length = 1535", "must be at least A * 128 = 1536"),
    mismatch(NORM, "eps", "norm_eps = 0.5", "norm_eps: 1e-05 on rank 0 of 2; 0.5 on rank 1 of 2"),
    mismatch(NORM, "dtype", "expand_x = expand_x.half(); residual_x = residual_x.half(); gamma = gamma.half()",
             "expand_x.dtype: 'bfloat16' on rank 0 of 2; 'float16' on rank 1 of 2"),
]  # fmt: skip

CASES = [
    *(one for operator in (DISPATCH, COMBINE, NORM) for one in (*kinds(operator), *everywhere(operator))),
    *(one for operator in (DISPATCH, COMBINE) for one in in_v1(operator)),
    *IN_V1_DISPATCH,
    *IN_V1_COMBINE,
    *IN_NORM,
]
