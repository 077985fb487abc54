"""What one can write wrongly in the halves of dispatch and combine, and what one reads."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import commfuse

from .bases import PAIR
from .case import Misuse
from .chains import SPLIT, wrong_kinds

SETUP, TEARDOWN, BACK, TOTAL = SPLIT
ROWS = {SETUP: "x", TEARDOWN: "x", BACK: "expand_x", TOTAL: "expand_x"}
TRIO = replace(PAIR, id="trio", world_size=3, num_tokens=(3,) * 3, moe_expert_num=6)
INT8 = replace(PAIR, id="pair-int8", quant_mode=2, smooth=True)
MASKED = replace(PAIR, id="pair-masked", mask="1d", seed=1)
SHARED = replace(PAIR, id="pair-shared", shared_expert_rank_num=1, moe_expert_num=4)
SHARED_ROWS = replace(PAIR, id="pair-shared-rows", shared_expert_x=2)
A3 = replace(PAIR, id="pair-a3", num_tokens=(2, 2), hidden=1024)
A3_TRIO = replace(A3, id="trio-a3", world_size=3, num_tokens=(2,) * 3, moe_expert_num=6)
A3_ALONE = replace(A3, id="alone-a3", world_size=1, num_tokens=(2,))
A3_SHARED = replace(A3, id="pair-a3-shared", shared_expert_rank_num=1, moe_expert_num=4)


def case(operator: str, name: str, wrong: str, *says: str, **more: Any) -> Misuse:
    return Misuse(id=f"{operator[19:]}-{name}", operator=operator, wrong=wrong, says=says, **{"base": PAIR, **more})


def a3(operator: str, name: str, wrong: str, *says: str, **more: Any) -> Misuse:
    return case(operator, f"a3-{name}", wrong, "under the rules of A3", *says, **{"base": A3, "product": "A3", **more})


def mismatch(operator: str, name: str, wrong: str, *says: str, **more: Any) -> Misuse:
    """Process 1 alone writes ``wrong``; all read it in the teardown."""
    return case(operator, f"other-{name}", wrong, *says, **{"on_rank": 1, "error": commfuse.MismatchError, **more})


def kinds(operator: str) -> list[Misuse]:
    return [replace(one, id=f"{operator[19:]}-{one.id}") for one in wrong_kinds(operator, PAIR)]


def in_every_half(operator: str) -> list[Misuse]:
    rows = ROWS[operator]
    many = f"{rows} = torch.zeros(513, 1024).bfloat16(); expert_ids = torch.arange(3).int().repeat(513, 1)"
    many_of_few = "moe_expert_num = 20; expert_ids = torch.arange(17).int().repeat(2, 1)"
    return [
        case(operator, "world-size-zero", "ep_world_size = 0", "ep_world_size = 0", "must be at least 1"),
        case(operator, "world-size-of-another-group", "ep_world_size = 1", "ep_world_size = 1", "the size of group_ep = 2"),
        case(operator, "rank-id-negative", "ep_rank_id = -1", "ep_rank_id = -1", "in 0..ep_world_size - 1 = 0..1"),
        case(operator, "rank-id-of-nobody", "ep_rank_id = 2", "ep_rank_id = 2", "this process's rank in group_ep = "),
        case(operator, "expert-num-zero", "moe_expert_num = 0", "moe_expert_num = 0", "must be at least 1"),
        case(operator, "expert-num-not-divisible", "moe_expert_num = 9", "moe_expert_num = 9", "shared_expert_rank_num = 2"),
        case(operator, "shard-type-one", "expert_shard_type = 1", "expert_shard_type = 1", "must be 0"),
        case(operator, "shared-num-negative", "shared_expert_num = -1", "shared_expert_num = -1", "must be at least 0"),
        case(operator, "shared-rank-num-negative", "shared_expert_rank_num = -1", "shared_expert_rank_num = -1", "in 0.."),
        case(operator, "shared-ranks-only", "shared_expert_rank_num = 2", "shared_expert_rank_num = 2", "0..1"),
        case(
            operator,
            "shared-ranks-not-a-multiple",
            "shared_expert_num = 2; shared_expert_rank_num = 1",
            "shared_expert_rank_num = 1: must be a positive multiple of shared_expert_num = 2",
        ),
        case(operator, "no-columns", f"{rows} = {rows}[:, :0]", "H = 0", "must be at least 1"),
        case(operator, "no-choice", "expert_ids = expert_ids[:, :0]", "K = 0", "must be in 1..all_experts = 1..8"),
        case(operator, "global-bs-below-own", "global_bs = 4", "global_bs = 4", "at least BS * ep_world_size = 6"),
        case(operator, "global-bs-odd", "global_bs = 13", "global_bs = 13", "a multiple of ep_world_size = 2"),
        case(operator, "global-bs-beyond-int32", "global_bs = 2**31", "A = 6442450944", "fit int32"),
        case(operator, "comm-alg-of-the-one-shot-path", "comm_alg = 'fullmesh_v1'", "comm_alg = 'fullmesh_v1': must be ''"),
        case(operator, "comm-type-three", "comm_type = 3", "comm_type = 3: must be one of 0, 1, 2"),
        case(operator, "a2", "# the product is A2", "product = 'A2': must be A3: A2 does not have this operator", product="A2"),
        a3(operator, "float32", f"{rows} = {rows}.float()", f"{rows}.dtype = 'float32'", "must be one of 'bfloat16', 'float16'"),
        a3(operator, "narrow", f"{rows} = {rows}[:, :512]", "H = 512", "must be in 1024..8192"),
        a3(operator, "too-many-tokens", many, "BS = 513", "must be in 1..512"),
        a3(operator, "top-17", many_of_few, "K = 17", "must be in 1..16"),
        a3(operator, "one-rank", "# the group has 1 rank", "ep_world_size = 1", "must be in 2..384", base=A3_ALONE),
        a3(operator, "too-many-experts", "moe_expert_num = 514", "moe_expert_num = 514", "must be in 1..512"),
        a3(operator, "too-many-shared-experts", "shared_expert_num = 5", "shared_expert_num = 5", "must be in 0..4"),
        a3(
            operator,
            "too-many-shared-ranks",
            "shared_expert_rank_num = 2",
            "shared_expert_rank_num = 2: must be in 0..ep_world_size // 2 = 0..1",
            "shared_expert_rank_num should be in [0, ep_world_size / 2]",
            base=A3_TRIO,
        ),
        a3(operator, "global-bs-too-large", "global_bs = 1026", "global_bs = 1026", "at most 512 * ep_world_size = 1024"),
        a3(operator, "comm-type-two", "comm_type = 2", "comm_type = 2: must be 0"),
        a3(operator, "small-buffer", "os.environ['HCCL_BUFFSIZE'] = '1'", "HCCL_BUFFSIZE = 1: must be at least 2 MB"),
        a3(operator, "odd-buffer", "os.environ['HCCL_BUFFSIZE'] = '1G'", "HCCL_BUFFSIZE = '1G'", "must be an integer"),
    ]


def in_every_setup(operator: str) -> list[Misuse]:
    rows = ROWS[operator]
    return [
        case(
            operator,
            "rank-id-of-a-peer",
            "ep_rank_id = 0",
            "refused on rank 2 of 3",
            "ep_rank_id = 0: must be this process's rank in group_ep = 2",
            base=TRIO,
            on_rank=2,
        ),
        mismatch(
            operator, "dtype", f"{rows} = {rows}.half()", f"{rows}.dtype: 'bfloat16' on rank 0 of 2; 'float16' on rank 1 of 2"
        ),
        mismatch(operator, "hidden-size", f"{rows} = {rows}[:, :7].contiguous()", "H: 8 on rank 0 of 2; 7 on rank 1 of 2"),
        mismatch(operator, "global-bs", "global_bs = 8", "global_bs: 0 on rank 0 of 2; 8 on rank 1 of 2"),
        mismatch(operator, "shared-num", "shared_expert_num = 0", "shared_expert_num: 1 on rank 0 of 2; 0 on rank 1 of 2"),
        mismatch(operator, "comm-type", "comm_type = 1", "comm_type: 0 on rank 0 of 2; 1 on rank 1 of 2"),
        mismatch(
            operator,
            "operator",
            "# npu_moe_distribute_dispatch_v2 is called instead",
            f"'{operator}' on rank 0 of 2; 'npu_moe_distribute_dispatch_v2' on rank 1 of 2",
            calls="npu_moe_distribute_dispatch_v2",
        ),
    ]


def in_every_teardown(operator: str) -> list[Misuse]:
    setup, kind = operator.replace("teardown", "setup"), 1 if operator == TEARDOWN else 2
    rows = ROWS[operator]
    return [
        case(
            operator,
            "another-half",
            "comm_cmd_info[1] = 3 - comm_cmd_info[1]",
            f"comm_cmd_info[1] = {3 - kind}",
            f"must be {kind}",
        ),
        case(operator, "of-another-group", "comm_cmd_info[2] = 7", "comm_cmd_info[2] = 7", "that of this group"),
        case(operator, "of-no-setup", "comm_cmd_info[0] += 1", "comm_cmd_info[0] = ", "must be that of a setup under way"),
        case(operator, "comm-cmd-info-short", "comm_cmd_info = comm_cmd_info[:-1]", "comm_cmd_info.shape = ("),
        case(operator, "changed-comm-type", "comm_type = 2", f"comm_type = 2: must be 0, as in {setup}"),
        case(operator, "changed-shared-rank-num", "shared_expert_rank_num = 0", "must be 1, as in ", base=SHARED)
        if operator == TOTAL
        else case(
            operator, "changed-quant-mode", "quant_mode = 0; y = y.new_zeros(len(y), 256).bfloat16()", "must be 2", base=INT8
        ),
        case(operator, "changed-ids", "expert_ids = expert_ids.flip(1)", "expert_ids = other values: must be those given to "),
        case(
            operator,
            "changed-dtype",
            f"{rows} = {rows}.half()" + "; y = y.half()" * (operator == TEARDOWN),
            "= float16 (",
            "bfloat16",
        ),
    ]


IN_DISPATCH_SETUP = [
    case(SETUP, "quant-mode-one", "quant_mode = 1", "quant_mode = 1: must be one of 0, 2"),
    case(SETUP, "scales-without-quantisation", "scales = torch.ones(8, 8)", "scales = ", "must be None", "when quant_mode == 0"),
    case(SETUP, "scales-short", "scales = scales[:7]", "scale_rows = 7", "= 8 or 9", base=INT8),
    case(SETUP, "scales-long", "scales = torch.ones(10, 8)", "scale_rows = 10", "= 8 or 9", base=INT8),
    case(SETUP, "y-dtype-given", "y_dtype = torch.int8", "y_dtype = torch.int8: must be None"),
    case(SETUP, "ids-too-large", "expert_ids[1, 0] = 8", "expert_ids[1, 0] = 8: must be in 0..7"),
    case(SETUP, "ids-negative", "expert_ids[2, 1] = -1", "expert_ids[2, 1] = -1: must be in 0..7"),
    case(SETUP, "ids-twice", "expert_ids[0, 2] = expert_ids[0, 0]", "expert_ids[0, 2] = ", "must differ from expert_ids[0, 0]"),
    case(SETUP, "ids-of-one-rank", "expert_ids[0, 0] = 99", "refused on rank 1 of 3", "expert_ids[0, 0] = 99", base=TRIO, on_rank=1),
    case(SETUP, "mask-of-pairs", "x_active_mask = torch.ones(3, 3).bool()", "x_active_mask.shape = (3, 3)", "1-D"),
    case(SETUP, "mask-order", "x_active_mask = torch.tensor([True, False, True])", "x_active_mask[2] = True after a False",
         settings={"check": True}),
    case(SETUP, "nan", "x[1, 3] = float('nan')", "x[1]: holds NaN or infinity", base=INT8, settings={"check": True}),
    case(SETUP, "ids-of-fewer-tokens", "expert_ids = expert_ids[:2]", "expert_ids.shape = (2, 3)", "= (3, 3)"),
    mismatch(SETUP, "expert-num", "moe_expert_num = 12", "moe_expert_num: 8 on rank 0 of 2; 12 on rank 1 of 2"),
    mismatch(SETUP, "top-k", "expert_ids = expert_ids[:, :2].contiguous()", "K: 3 on rank 0 of 2; 2 on rank 1 of 2"),
    mismatch(SETUP, "quant-mode", "quant_mode = 2", "quant_mode: 0 on rank 0 of 2; 2 on rank 1 of 2"),
    mismatch(SETUP, "smooth-factors", "scales = None", "scales is not None: True on rank 0 of 2; False on rank 1 of 2", base=INT8),
    mismatch(SETUP, "product", "commfuse.config.set(product='A3')", "product: 'portable' on rank 0 of 2; 'A3' on rank 1", base=A3),
]  # fmt: skip

IN_DISPATCH_TEARDOWN = [
    case(TEARDOWN, "quant-mode-one", "quant_mode = 1", "quant_mode = 1: must be one of 0, 2"),
    case(TEARDOWN, "nums-type-two", "expert_token_nums_type = 2", "expert_token_nums_type = 2: must be one of 0, 1"),
    case(TEARDOWN, "y-as-int8", "y = y.to(torch.int8)", "y.dtype = 'int8'", "x.dtype = bfloat16 with quant_mode 0"),
    case(TEARDOWN, "y-without-its-padding", "y = y[:, :8]", "y.shape = (12, 8)", "= (12, 256)"),
    case(TEARDOWN, "fewer-tokens", "x = x[:2]", "y.shape = (12, 256)", "= (8, 256)"),
]

IN_COMBINE_SETUP = [
    case(BACK, "comm-quant-mode-two", "comm_quant_mode = 2", "comm_quant_mode = 2: must be 0"),
    case(BACK, "assist-info-short", "assist_info_for_combine = assist_info_for_combine[:7]", "counts_length = 7",
         "at least ep_world_size * L = 8"),
    case(BACK, "assist-info-falling", "assist_info_for_combine[2] = -1", "assist_info_for_combine[2] = -1", "must be a prefix sum"),
    case(BACK, "fewer-rows-than-counted", "expand_x = expand_x[:1]", "rows: must be at most the rows of expand_x = 1"),
    a3(BACK, "fewer-rows-than-published", "expand_x = expand_x[:-1]", "rows = 11", "at least A = 12 on a MoE rank"),
    a3(BACK, "more-rows-on-a-shared-rank", "expand_x = torch.cat([expand_x, expand_x])", "refused under the rules of A3 on rank 0 of 2",
       "A = 4 on a shared-expert rank", base=A3_SHARED, on_rank=0),
    case(BACK, "expert-num-with-other-counts", "moe_expert_num = 16", "refused on rank 1 of 2", "assist_info_for_combine[", on_rank=1),
]  # fmt: skip

IN_COMBINE_TEARDOWN = [
    case(TOTAL, "comm-quant-mode-two", "comm_quant_mode = 2", "comm_quant_mode = 2: must be 0"),
    case(TOTAL, "shared-rows-beside-shared-ranks", "shared_expert_x = torch.ones(3, 8).bfloat16()",
         "None (shared experts have ranks of their own)", "when shared_expert_rank_num > 0", base=SHARED),
    case(TOTAL, "shared-rows-of-another-dtype", "shared_expert_x = shared_expert_x.half()",
         "shared_expert_x.dtype = 'float16': must be expand_x.dtype = bfloat16", base=SHARED_ROWS),
    case(TOTAL, "shared-rows-3d-of-fewer-tokens", "shared_expert_x = shared_expert_x[None, :2]",
         "shared_rows_0 * shared_rows_1 = 2: must be BS = 3", base=SHARED_ROWS),
    a3(TOTAL, "shared-rows-with-shared-num", "shared_expert_x = torch.ones(2, 1024).bfloat16()", "shared_expert_num = 1: must be 0",
       "when shared_expert_x is not None"),
    case(TOTAL, "expand-idx-changed", "expand_idx[4] += 1", "expand_idx[4] = ", "as dispatch returned it"),
    case(TOTAL, "weights-of-fewer-tokens", "expert_scales = expert_scales[:2]", "expert_scales.shape = (2, 3)", "= (3, 3)"),
    case(TOTAL, "weights-flat-of-fewer-tokens", "expert_scales = expert_scales[:2].flatten()", "expert_scales.shape = (6,)", "= (9,)"),
    case(TOTAL, "placeholder-of-other-rows", "quant_expand_x = quant_expand_x[:1]", "quant_expand_x.shape = (1, 512)"),
    case(TOTAL, "mask-order", "x_active_mask = torch.tensor([True, False, True])", "x_active_mask[2] = True after a False",
         settings={"check": True}),
]  # fmt: skip

CASES = [
    *(one for operator in SPLIT for one in (*kinds(operator), *in_every_half(operator))),
    *(one for operator in (SETUP, BACK) for one in in_every_setup(operator)),
    *(one for operator in (TEARDOWN, TOTAL) for one in in_every_teardown(operator)),
    *IN_DISPATCH_SETUP,
    *IN_DISPATCH_TEARDOWN,
    *IN_COMBINE_SETUP,
    *IN_COMBINE_TEARDOWN,
]
