"""What one can write wrongly in npu_moe_distribute_dispatch_v2, and what one reads."""

from __future__ import annotations

from typing import Any

import commfuse

from .bases import (
    A2,
    A2_HIERARCHY,
    A3,
    A3_ALONE,
    A3_V2,
    ELASTIC,
    ELASTIC_SHARED,
    INT8,
    MASKED,
    MASKED_PAIRS,
    PAIR,
    PARTNERS,
    PLAIN,
    SHARED,
    SHRUNK,
    SPECIAL,
    TWO_SHARED,
)
from .case import COMBINE, DISPATCH, Misuse


def case(name: str, wrong: str, *says: str, **more: Any) -> Misuse:
    return Misuse(id=name, operator=DISPATCH, wrong=wrong, says=says, **{"base": PLAIN, **more})


def pair(name: str, wrong: str, *says: str) -> Misuse:
    """Two processes are enough to see this."""
    return case(name, wrong, *says, base=PAIR)


def mismatch(name: str, wrong: str, *says: str, **more: Any) -> Misuse:
    """Process 2 alone writes ``wrong``."""
    return case(name, wrong, *says, **{"on_rank": 2, "error": commfuse.MismatchError, **more})


A2_RANKS = "ep_world_size = 4"  # what every call under the rules of A2 reads here: a test has no 16 ranks

KINDS = [
    pair("x-a-list", "x = x.tolist()", "x = [[", "must be a tensor, got list"),
    pair("x-none", "x = None", "x = None", "must be a tensor (BS, H), 2-D"),
    pair("expert-ids-a-list", "expert_ids = expert_ids.tolist()", "expert_ids = [[", "must be a tensor, got list"),
    pair("expert-ids-none", "expert_ids = None", "expert_ids = None", "must be a tensor (BS, K), 2-D"),
    case("scales-a-number", "scales = 0.5", "scales = 0.5", "must be a tensor or None, got float", base=INT8),
    pair(
        "mask-a-list",
        "x_active_mask = [True, True, False]",
        "x_active_mask = [True, True, False]",
        "must be a tensor or None, got list",
    ),
    pair(
        "expert-scales-a-list",
        "expert_scales = [1.0, 0.5, 0.25]",
        "expert_scales = [1.0, 0.5, 0.25]",
        "must be a tensor or None, got list",
    ),
    pair(
        "expert-scales-an-array",
        "expert_scales = np.ones((3, 3))",
        "expert_scales = array(",
        "must be a tensor or None, got ndarray",
    ),
    pair("elastic-info-a-list", "elastic_info = [0] * 12", "elastic_info = [0, 0,", "must be a tensor or None, got list"),
    pair(
        "performance-info-a-list",
        "performance_info = [0, 0, 0, 0]",
        "performance_info = [0, 0, 0, 0]",
        "must be a tensor or None, got list",
    ),
    pair("world-size-text", "ep_world_size = '4'", "ep_world_size = '4'", "must be an int, got str"),
    pair("rank-id-none", "ep_rank_id = None", "ep_rank_id = None", "must be an int, got NoneType"),
    pair("expert-num-a-float", "moe_expert_num = 8.0", "moe_expert_num = 8.0", "must be an int, got float"),
    pair("group-tp-a-number", "group_tp = 0", "group_tp = 0", "must be the name of a group or a ProcessGroup, got int"),
    pair("tp-world-size-text", "tp_world_size = ''", "tp_world_size = ''", "must be an int, got str"),
    pair("tp-rank-id-text", "tp_rank_id = '0'", "tp_rank_id = '0'", "must be an int, got str"),
    pair("shard-type-none", "expert_shard_type = None", "expert_shard_type = None", "must be an int, got NoneType"),
    pair("shared-num-a-list", "shared_expert_num = [1]", "shared_expert_num = [1]", "must be an int, got list"),
    pair("shared-rank-num-a-float", "shared_expert_rank_num = 0.0", "shared_expert_rank_num = 0.0", "must be an int, got float"),
    pair("quant-mode-text", "quant_mode = 'int8'", "quant_mode = 'int8'", "must be an int, got str"),
    pair("global-bs-a-float", "global_bs = 12.0", "global_bs = 12.0", "must be an int, got float"),
    pair("nums-type-text", "expert_token_nums_type = 'counts'", "expert_token_nums_type = 'counts'", "must be an int, got str"),
    pair("comm-alg-none", "comm_alg = None", "comm_alg = None", "must be a str, got NoneType"),
    pair("zero-num-none", "zero_expert_num = None", "zero_expert_num = None", "must be an int, got NoneType"),
    pair("copy-num-a-float", "copy_expert_num = 1.5", "copy_expert_num = 1.5", "must be an int, got float"),
    pair("const-num-text", "const_expert_num = '1'", "const_expert_num = '1'", "must be an int, got str"),
    pair("y-dtype-text", "y_dtype = 'int8'", "y_dtype = 'int8'", "must be None, an int or a torch.dtype, got str"),
    pair("x-dtype-text", "x_dtype = 'bfloat16'", "x_dtype = 'bfloat16'", "must be None, an int or a torch.dtype, got str"),
    pair(
        "scales-dtype-text",
        "scales_dtype = 'float32'",
        "scales_dtype = 'float32'",
        "must be None, an int or a torch.dtype, got str",
    ),
]

SHAPES = [
    case("x-1d", "x = x[0]", "x.shape = (8,)", "must be (BS, H), 2-D"),
    case("x-3d", "x = x[None]", "x.shape = (1, 3, 8)", "must be (BS, H), 2-D"),
    case("x-without-columns", "x = x[:, :0]", "H = 0 (x.shape[1])", "must be at least 1"),
    case("expert-ids-1d", "expert_ids = expert_ids.flatten()", "expert_ids.shape = (9,)", "must be (BS, K), 2-D"),
    case("expert-ids-of-fewer-tokens", "expert_ids = expert_ids[:2]", "expert_ids.shape = (2, 3)", "must be (BS, K) = (3, 3)"),
    case(
        "expert-ids-without-columns",
        "expert_ids = expert_ids[:, :0]",
        "K = 0 (expert_ids.shape[1])",
        "must be in 1..all_experts = 1..8",
    ),
    case("more-ids-than-experts", "expert_ids = torch.arange(9).int().repeat(3, 1)", "K = 9", "1..8"),
    case("scales-1d", "scales = scales[0]", "scales.shape = (8,)", "must be (E_s + moe_expert_num, H), 2-D", base=INT8),
    case("scales-short", "scales = scales[:7]", "scales.shape = (7, 8)", "= (8, 8)", base=INT8),
    case(
        "scales-without-shared-rows",
        "quant_mode = 2; scales = torch.ones(6, 8)",
        "scales.shape = (6, 8)",
        "= (7, 8)",
        base=SHARED,
    ),
    case(
        "mask-3d",
        "x_active_mask = x_active_mask[None, None]",
        "x_active_mask.shape = (1, 1, 3)",
        "must be (BS,), 1-D or (BS, K), 2-D",
        base=MASKED,
    ),
    case("mask-short", "x_active_mask = x_active_mask[:2]", "x_active_mask.shape = (2,)", "must be (BS,) = (3,)", base=MASKED),
    case(
        "mask-narrow",
        "x_active_mask = x_active_mask[:, :1]",
        "x_active_mask.shape = (3, 1)",
        "must be (BS, K) = (3, 3)",
        base=MASKED_PAIRS,
    ),
    case("expert-scales-1d", "expert_scales = torch.ones(9)", "expert_scales.shape = (9,)", "must be (BS, K), 2-D"),
    case("expert-scales-wide", "expert_scales = torch.ones(3, 4)", "expert_scales.shape = (3, 4)", "must be (BS, K) = (3, 3)"),
    case("elastic-info-short", "elastic_info = elastic_info[:11]", "elastic_info.shape = (11,)", "= (12,)", base=ELASTIC),
    case(
        "elastic-info-2d",
        "elastic_info = elastic_info[None]",
        "elastic_info.shape = (1, 12)",
        "must be (4 + 2 * ep_world_size,), 1-D",
        base=ELASTIC,
    ),
    case(
        "performance-info-short",
        "performance_info = torch.zeros(3, dtype=torch.int64)",
        "performance_info.shape = (3,)",
        "= (4,)",
    ),
    case(
        "performance-info-2d",
        "performance_info = torch.zeros(1, 4, dtype=torch.int64)",
        "performance_info.shape = (1, 4)",
        "must be (ep_world_size,), 1-D",
    ),
]

DTYPES = [
    pair("x-float64", "x = x.double()", "x.dtype = float64", "must be bfloat16 or float16 or float32"),
    pair("x-int8", "x = x.to(torch.int8)", "x.dtype = int8", "must be bfloat16 or float16 or float32"),
    pair("expert-ids-int64", "expert_ids = expert_ids.long()", "expert_ids.dtype = int64", "must be int32"),
    pair("expert-ids-float32", "expert_ids = expert_ids.float()", "expert_ids.dtype = float32", "must be int32"),
    case("scales-bfloat16", "scales = scales.bfloat16()", "scales.dtype = bfloat16", "must be float32", base=INT8),
    case("mask-int32", "x_active_mask = x_active_mask.int()", "x_active_mask.dtype = int32", "must be bool", base=MASKED),
    pair(
        "expert-scales-bfloat16",
        "expert_scales = torch.ones(3, 3).bfloat16()",
        "expert_scales.dtype = bfloat16",
        "must be float32",
    ),
    case("elastic-info-int64", "elastic_info = elastic_info.long()", "elastic_info.dtype = int64", "must be int32", base=ELASTIC),
    pair(
        "performance-info-int32",
        "performance_info = torch.zeros(2, dtype=torch.int32)",
        "performance_info.dtype = int32",
        "must be int64",
    ),
]

RANGES = [
    case("world-size-zero", "ep_world_size = 0", "ep_world_size = 0", "must be at least 1"),
    case("world-size-of-another-group", "ep_world_size = 2", "ep_world_size = 2", "must be the size of group_ep = 4"),
    case("rank-id-negative", "ep_rank_id = -1", "ep_rank_id = -1", "must be in 0..ep_world_size - 1 = 0..3"),
    case("rank-id-too-large", "ep_rank_id = 4", "ep_rank_id = 4", "must be in 0..ep_world_size - 1 = 0..3"),
    case(
        "rank-id-of-another-rank",
        "ep_rank_id = 0",
        "refused on rank 3 of 4",
        "ep_rank_id = 0",
        "this process's rank in group_ep = 3",
        on_rank=3,
    ),
    case("expert-num-zero", "moe_expert_num = 0", "moe_expert_num = 0", "must be at least 1"),
    case(
        "expert-num-not-divisible",
        "moe_expert_num = 9",
        "moe_expert_num = 9",
        "divisible by ep_world_size - shared_expert_rank_num = 4",
    ),
    case("expert-num-not-divisible-by-moe-ranks", "moe_expert_num = 8", "moe_expert_num = 8", "= 3", base=SHARED),
    case("shard-type-one", "expert_shard_type = 1", "expert_shard_type = 1", "must be 0"),
    case("shared-num-negative", "shared_expert_num = -1", "shared_expert_num = -1", "must be at least 0"),
    case(
        "shared-rank-num-negative",
        "shared_expert_rank_num = -1",
        "shared_expert_rank_num = -1",
        "must be in 0..ep_world_size - 1 = 0..3",
    ),
    case(
        "shared-ranks-only", "shared_expert_rank_num = 4", "shared_expert_rank_num = 4", "must be in 0..ep_world_size - 1 = 0..3"
    ),
    case(
        "shared-ranks-without-shared-experts",
        "shared_expert_num = 0",
        "shared_expert_rank_num = 1",
        "a positive multiple of shared_expert_num = 0",
        base=SHARED,
    ),
    case(
        "shared-ranks-not-a-multiple",
        "shared_expert_num = 2; shared_expert_rank_num = 3",
        "shared_expert_rank_num = 3",
        "a positive multiple of shared_expert_num = 2",
    ),
    case(
        "fewer-shared-ranks-than-experts",
        "shared_expert_num = 4",
        "shared_expert_rank_num = 2",
        "a positive multiple of shared_expert_num = 4",
        base=TWO_SHARED,
    ),
    case("zero-num-negative", "zero_expert_num = -1", "zero_expert_num = -1", "must be at least 0"),
    case("copy-num-negative", "copy_expert_num = -2", "copy_expert_num = -2", "must be at least 0"),
    case("const-num-negative", "const_expert_num = -3", "const_expert_num = -3", "must be at least 0"),
    case("too-many-special-experts", "zero_expert_num = 2**31 - 8", "all_experts = 2147483648", "must be at most 2147483647"),
    case("tp-world-size-three", "tp_world_size = 3", "tp_world_size = 3", "must be one of 0, 1, 2"),
    case("tp-rank-id-without-tp", "tp_rank_id = 1", "tp_rank_id = 1", "0 or 1 with tp_world_size 2, otherwise 0"),
    case("quant-mode-one", "quant_mode = 1", "quant_mode = 1", "must be one of 0, 2", "cannot support static quant now."),
    case("quant-mode-of-newer-products", "quant_mode = 4", "quant_mode = 4", "must be one of 0, 2"),
    case("nums-type-two", "expert_token_nums_type = 2", "expert_token_nums_type = 2", "must be one of 0, 1"),
    case(
        "comm-alg-unknown",
        "comm_alg = 'ring'",
        "comm_alg = 'ring'",
        "must be one of '', 'fullmesh', 'hierarchy', 'fullmesh_v1', 'fullmesh_v2', 'ccu'",
    ),
    case("global-bs-below-own", "global_bs = 8", "global_bs = 8", "at least BS * ep_world_size = 12"),
    case("global-bs-not-a-multiple", "global_bs = 13", "global_bs = 13", "a multiple of ep_world_size = 4"),
    case("global-bs-negative", "global_bs = -4", "global_bs = -4", "must be 0, or a multiple of ep_world_size = 4"),
    case("global-bs-huge", "global_bs = 2**40", "A = ", "rows' numbers fit int32"),
    case("y-dtype-given", "y_dtype = torch.int8", "y_dtype = torch.int8", "must be None"),
    case("x-dtype-given", "x_dtype = 1", "x_dtype = 1", "must be None"),
    case("scales-dtype-given", "scales_dtype = 1", "scales_dtype = 1", "must be None"),
    case(
        "scales-without-quantisation",
        "scales = torch.ones(8, 8)",
        "scales = ",
        "must be None",
        "quant_mode 2",
        "when quant_mode == 0",
    ),
    case(
        "many-mistakes-at-once",
        "x = x.double(); expert_ids = expert_ids[:2]; moe_expert_num = 9; quant_mode = 1; comm_alg = 'ring'",
        "x.dtype = float64",
        "expert_ids.shape = (2, 3)",
        "moe_expert_num = 9",
        "quant_mode = 1",
        "comm_alg = 'ring'",
    ),
]

PARTNER = [
    case(
        "tp-without-group",
        "group_tp = ''",
        "group_tp = ''",
        "the name of another group than group_ep",
        "when tp_world_size == 2",
        base=PARTNERS,
    ),
    case(
        "tp-group-is-ep-group",
        "group_tp = group_ep",
        "group_tp = ",
        "the name of another group than group_ep",
        base=PARTNERS,
        own_domain=True,
    ),
    case(
        "tp-group-unknown",
        "group_tp = 'nowhere'",
        "group_tp",
        "no group named 'nowhere' in this process; there are",
        base=PARTNERS,
        own_domain=True,
    ),
    case("tp-rank-id-two", "tp_rank_id = 2", "tp_rank_id = 2", "0 or 1 with tp_world_size 2", base=PARTNERS),
    case(
        "tp-rank-id-of-the-partner",
        "tp_rank_id = 1 - tp_rank_id",
        "tp_rank_id = 1",
        "must be this process's rank in group_tp = 0",
        base=PARTNERS,
    ),
    case(
        "tp-group-of-four",
        "group_tp = torch.distributed.group.WORLD",
        "group_tp",
        "has 4 ranks",
        "tp_world_size = 2",
        base=PARTNERS,
    ),
    case(
        "tp-with-two-experts-per-rank",
        "moe_expert_num = 4",
        "e = 2 (moe_expert_num // (ep_world_size - shared_expert_rank_num))",
        "must be 1",
        base=PARTNERS,
    ),
    case(
        "tp-with-elastic-info",
        "elastic_info = torch.zeros(8, dtype=torch.int32)",
        "elastic_info",
        "must be None when tp_world_size == 2",
        base=PARTNERS,
    ),
    case(
        "tp-bad-ids-on-one-process",
        "expert_ids[1, 0] = 2",
        "refused on rank 1 of 2",
        "expert_ids[1, 0] = 2",
        "0..1",
        base=PARTNERS,
        on_rank=3,
    ),
    case(
        "tp-quant-mode-on-one-process",
        "quant_mode = 1",
        "refused on rank 1 of 2",
        "quant_mode = 1",
        "one of 0, 2",
        base=PARTNERS,
        on_rank=3,
    ),
    mismatch(
        "tp-other-quant-mode-on-one-process", "quant_mode = 2", "quant_mode: 0 on rank 0 of 2; 2 on rank 1 of 2", base=PARTNERS
    ),
]

IDS = [
    case("id-negative", "expert_ids[2, 1] = -1", "expert_ids[2, 1] = -1", "must be in 0..7"),
    case("id-too-large", "expert_ids[1, 0] = 9  # moe_expert_num is 8", "expert_ids[1, 0] = 9", "must be in 0..7"),
    case(
        "id-behind-special-experts",
        "expert_ids[0, 2] = 11",
        "expert_ids[0, 2] = 11",
        "must be in 0..7 (moe_expert_num) or in 8..10 (zero, copy and constant experts)",
        base=SPECIAL,
    ),
    case("ids-wrong-in-many-places", "expert_ids[:] = 99", "expert_ids[0, 0] = 99", "expert_ids[0, 1] = 99", "must be in 0..7"),
    case(
        "id-twice",
        "expert_ids[1] = torch.tensor([4, 6, 4])",
        "expert_ids[1, 2] = 4",
        "must differ from expert_ids[1, 0]",
        "distinct within a row",
    ),
    case(
        "id-twice-special",
        "expert_ids[0] = torch.tensor([8, 3, 8])",
        "expert_ids[0, 2] = 8",
        "must differ from expert_ids[0, 0]",
        base=SPECIAL,
    ),
    case(
        "id-twice-active",
        "x_active_mask[0] = True; expert_ids[0] = 5",
        "expert_ids[0, 1] = 5",
        "must differ from expert_ids[0, 0]",
        base=MASKED_PAIRS,
    ),
    case(
        "id-active-and-too-large",
        "x_active_mask[:] = True; expert_ids[2] = torch.tensor([0, 1, 8])",
        "expert_ids[2, 2] = 8",
        "0..7",
        base=MASKED_PAIRS,
    ),
    case(
        "ids-bad-on-one-rank",
        "expert_ids[1, 0] = 8",
        "refused on rank 3 of 4",
        "expert_ids[1, 0] = 8",
        "must be in 0..7",
        on_rank=3,
    ),
    case(
        "id-of-a-lost-expert",
        "expert_ids[0] = torch.tensor([0, 6, 1])",
        "expert_ids[0, 1] = 6",
        "0..5",
        "(elastic_info[3], the experts left)",
        base=SHRUNK,
    ),
    case(
        "id-of-a-lost-expert-on-one-rank",
        "expert_ids[0] = torch.tensor([0, 6, 1])",
        "refused on rank 3",
        "expert_ids[0, 1] = 6",
        "0..5",
        base=SHRUNK,
        on_rank=3,
    ),
]

TABLES = [
    case("elastic-flag-two", "elastic_info[0] = 2", "elastic_info[0] = 2", "must be 0 (not shrunk) or 1", base=ELASTIC),
    case("elastic-nobody-alive", "elastic_info[1] = 0", "elastic_info[1] = 0 (ranks alive)", "1..4", base=ELASTIC),
    case("elastic-too-many-alive", "elastic_info[1] = 5", "elastic_info[1] = 5 (ranks alive)", "1..4", base=ELASTIC),
    case("elastic-wrong-number-alive", "elastic_info[1] = 3", "elastic_info[4:8] = [0, 1, 2, 3]", "3 living ranks", base=ELASTIC),
    case("elastic-id-twice", "elastic_info[5] = 0", "elastic_info[4:8] = [0, 0, 2, 3]", "0..3", base=ELASTIC),
    case("elastic-id-too-large", "elastic_info[7] = 4", "elastic_info[4:8] = [0, 1, 2, 4]", "0..3", base=ELASTIC),
    case(
        "elastic-tables-differ",
        "elastic_info[8] = 1; elastic_info[9] = 0",
        "elastic_info[8] = 1",
        "the rank whose id",
        base=ELASTIC,
    ),
    case("elastic-second-table-missing", "elastic_info[8:] = -1", "elastic_info[8] = -1", "the rank whose id", base=ELASTIC),
    case(
        "elastic-shared-ranks-without-shared-experts",
        "elastic_info[2] = 1",
        "elastic_info[2] = 1 (shared-expert ranks)",
        "must be 0",
        base=ELASTIC,
    ),
    case(
        "elastic-shared-ranks-lost",
        "elastic_info[2] = 0",
        "elastic_info[2] = 0 (shared-expert ranks)",
        "a positive multiple of shared_expert_num = 1",
        base=ELASTIC_SHARED,
    ),
    case(
        "elastic-only-shared-ranks",
        "elastic_info[2] = 4",
        "elastic_info[2] = 4 (shared-expert ranks)",
        "must leave a MoE rank among the 4",
        base=ELASTIC_SHARED,
    ),
    case(
        "elastic-expert-num",
        "elastic_info[3] = 7",
        "elastic_info[3] = 7 (MoE experts)",
        "2 on each of the 4 MoE ranks left = 8",
        base=ELASTIC,
    ),
]

CHECKED = [
    case(
        "mask-false-before-true",
        "x_active_mask = torch.tensor([True, False, True])  # with COMMFUSE_CHECK=1",
        "x_active_mask[2] = True after a False",
        "every True before every False",
        settings={"check": True},
    ),
    case(
        "mask-false-before-true-a3",
        "x_active_mask = torch.tensor([False, True])",
        "x_active_mask[1] = True after a False",
        "every True before every False",
        base=A3,
        product="A3",
    ),
    case(
        "nan-to-quantise",
        "x[2, 5] = float('nan')  # with COMMFUSE_CHECK=1",
        "x[2]",
        "NaN or infinity",
        "quant_mode 2",
        base=INT8,
        settings={"check": True},
    ),
    case(
        "infinity-to-quantise",
        "x[0, 0] = float('inf')  # with COMMFUSE_CHECK=1",
        "x[0]",
        "NaN or infinity",
        base=INT8,
        settings={"check": True},
        on_rank=1,
    ),
]


def a3(name: str, wrong: str, *says: str, **more: Any) -> Misuse:
    return case(f"a3-{name}", wrong, "under the rules of A3", *says, **{"base": A3, "product": "A3", **more})


def a3_v2(name: str, wrong: str, *says: str, **more: Any) -> Misuse:
    return a3(f"v2-{name}", wrong, *says, "when comm_alg == 'fullmesh_v2'", base=A3_V2, **more)


ON_A3 = [
    a3("float32", "x = x.float()", "x.dtype = 'float32'", "must be one of 'bfloat16', 'float16'"),
    a3("no-token", "x = x[:0]; expert_ids = expert_ids[:0]", "BS = 0 (x.shape[0])", "must be in 1..512"),
    a3(
        "too-many-tokens",
        "x = torch.zeros(513, 1024).bfloat16(); expert_ids = torch.arange(3).int().repeat(513, 1)",
        "BS = 513",
        "must be in 1..512",
    ),
    a3("narrow", "x = x[:, :512]", "H = 512 (x.shape[1])", "must be in 1024..8192", "xShape dims1(H) should be in [1024, 8192]"),
    a3("wide", "x = torch.zeros(2, 8200).bfloat16()", "H = 8200", "must be in 1024..8192"),
    a3(
        "top-17",
        "moe_expert_num = 20; expert_ids = torch.arange(17).int().repeat(2, 1)",
        "K = 17",
        "must be in 1..16",
    ),
    a3("one-rank", "# the group has 1 rank", "ep_world_size = 1", "must be in 2..768", base=A3_ALONE),
    a3("too-many-experts", "moe_expert_num = 1028", "moe_expert_num = 1028", "must be in 1..1024"),
    a3(
        "too-many-experts-per-rank",
        "shared_expert_rank_num = 3; moe_expert_num = 1024",
        "e * ep_world_size = 4096",
        "must be in 1..2048",
    ),
    a3("too-many-shared-experts", "shared_expert_num = 5", "shared_expert_num = 5", "must be in 0..4"),
    a3(
        "shared-experts-without-ranks",
        "shared_expert_num = 2",
        "shared_expert_num = 2",
        "must be one of 0, 1",
        "when shared_expert_rank_num == 0",
    ),
    a3(
        "mask-with-uneven-batches",
        "x_active_mask = torch.ones(2, dtype=torch.bool); global_bs = 16",
        "x_active_mask",
        "None (ranks have different batch sizes)",
    ),
    a3("performance-info", "performance_info = torch.zeros(4, dtype=torch.int64)", "performance_info", "must be None"),
    a3("buffer-not-a-number", "os.environ['HCCL_BUFFSIZE'] = '200M'", "HCCL_BUFFSIZE = '200M'", "must be an integer"),
    a3(
        "buffer-too-small",
        "os.environ['HCCL_BUFFSIZE'] = '1'",
        "HCCL_BUFFSIZE = 1",
        "at least 2 MB",
        "HCCL_BUFFSIZE is too SMALL",
    ),
    a3(
        "buffer-too-small-for-many-tokens",
        "global_bs = 2048; os.environ['HCCL_BUFFSIZE'] = '20'",
        "HCCL_BUFFSIZE = 20",
        "at least 26 MB",
    ),
    a3("scales-not-contiguous", "quant_mode = 2; scales = torch.ones(1024, 8).t()", "scales", "must be contiguous"),
    a3("comm-alg-of-a2", "comm_alg = 'fullmesh'", "comm_alg = 'fullmesh'", "must be one of '', 'fullmesh_v1', 'fullmesh_v2'"),
    a3(
        "refused-on-one-rank",
        "x = x[:, :512]",
        "refused under the rules of A3 on rank 1 of 4",
        "H = 512",
        "must be in 1024..8192",
        on_rank=1,
    ),
    a3_v2(
        "too-many-tokens",
        "x = torch.zeros(257, 1024).bfloat16(); expert_ids = torch.arange(3).int().repeat(257, 1)",
        "BS = 257",
        "must be in 1..256",
    ),
    a3_v2(
        "top-13",
        "moe_expert_num = 16; expert_ids = torch.arange(13).int().repeat(2, 1)",
        "K = 13",
        "must be in 1..12",
    ),
    a3_v2("tensor-parallel", "tp_world_size = 2", "tp_world_size = 2", "must be one of 0, 1"),
    a3_v2("mask", "x_active_mask = torch.ones(2, dtype=torch.bool)", "x_active_mask", "must be None"),
    a3_v2("special-experts", "zero_expert_num = 1", "zero_expert_num + copy_expert_num + const_expert_num = 1", "must be 0"),
    a3_v2("uneven-batches", "global_bs = 16", "global_bs = 16", "0 or BS * ep_world_size = 8"),
]


def a2(name: str, wrong: str, *says: str, **more: Any) -> Misuse:
    return case(f"a2-{name}", wrong, "under the rules of A2", A2_RANKS, *says, **{"base": A2, "product": "A2", **more})


def hierarchy(name: str, wrong: str, *says: str) -> Misuse:
    return a2(f"hierarchy-{name}", wrong, *says, "when algorithm == 'hierarchy'", base=A2_HIERARCHY)


ON_A2 = [
    a2("four-ranks", "# the group has 4 ranks", "must be one of 16, 32, 64, 128, 256", "when algorithm == 'fullmesh'"),
    a2("float32", "x = x.float()", "x.dtype = 'float32'", "must be one of 'bfloat16', 'float16'"),
    a2(
        "too-many-tokens",
        "x = torch.zeros(257, 64).bfloat16(); expert_ids = torch.arange(3).int().repeat(257, 1)",
        "BS = 257",
        "must be in 1..256",
    ),
    a2("wide", "x = torch.zeros(2, 7200).bfloat16()", "H = 7200", "must be in 1..7168"),
    a2("hidden-not-a-multiple", "x = x[:, :40]", "H = 40", "must be a multiple of 32"),
    a2(
        "top-17",
        "moe_expert_num = 20; expert_ids = torch.arange(17).int().repeat(2, 1)",
        "K = 17",
        "must be in 1..16",
    ),
    a2("too-many-experts", "moe_expert_num = 516", "moe_expert_num = 516", "must be in 1..512"),
    a2("too-many-experts-per-rank", "moe_expert_num = 100", "e = 25", "must be in 1..24", "when algorithm == 'fullmesh'"),
    a2("shared-ranks", "shared_expert_rank_num = 1; moe_expert_num = 6", "shared_expert_rank_num = 1", "must be 0"),
    a2("tensor-parallel", "tp_world_size = 2", "tp_world_size = 2", "must be one of 0, 1"),
    a2("comm-alg-of-a3", "comm_alg = 'fullmesh_v2'", "comm_alg = 'fullmesh_v2'", "must be one of '', 'fullmesh', 'hierarchy'"),
    a2("elastic-info", "elastic_info = torch.zeros(12, dtype=torch.int32)", "elastic_info", "must be None"),
    a2("constant-experts", "const_expert_num = 1", "const_expert_num = 1", "must be 0"),
    a2(
        "buffer-too-small",
        "os.environ['HCCL_BUFFSIZE'] = '4'",
        "HCCL_BUFFSIZE = 4",
        "at least 5 MB",
        "HCCL_BUFFSIZE is too SMALL",
    ),
    a2(
        "mask-with-uneven-batches",
        "x_active_mask = torch.ones(2, dtype=torch.bool); global_bs = 16",
        "x_active_mask",
        "None (ranks have different batch sizes)",
    ),
    a2("scales-not-contiguous", "quant_mode = 2; scales = torch.ones(64, 8).t()", "scales", "must be contiguous"),
    hierarchy("four-ranks", "# the group has 4 ranks", "must be one of 16, 32, 64"),
    hierarchy("by-environment", "comm_alg = ''; os.environ['HCCL_INTRA_PCIE_ENABLE'] = '1'", "must be one of 16, 32, 64"),
    hierarchy("wide", "x = torch.zeros(2, 10272).bfloat16()", "H = 10272", "must be in 1..10240"),
    hierarchy("zero-experts", "zero_expert_num = 1", "zero_expert_num = 1", "must be 0"),
    hierarchy("copy-experts", "copy_expert_num = 1", "copy_expert_num = 1", "must be 0"),
    hierarchy("mask", "x_active_mask = torch.ones(2, dtype=torch.bool)", "x_active_mask", "must be None"),
    hierarchy("smooth-factors", "quant_mode = 2; scales = torch.ones(8, 64)", "scales", "must be None"),
    hierarchy("without-expert-scales", "expert_scales = None", "expert_scales = None", "must be given"),
]

MISMATCHES = [
    mismatch(
        "another-operator",
        "# npu_moe_distribute_combine_v2 is called instead",
        "operator",
        f"'{DISPATCH}' on ranks 0, 1, 3 of 4; '{COMBINE}' on rank 2 of 4",
        calls=COMBINE,
    ),
    mismatch("other-expert-num", "moe_expert_num = 12", "moe_expert_num: 8 on ranks 0, 1, 3 of 4; 12 on rank 2 of 4"),
    mismatch("other-dtype", "x = x.half()", "x.dtype: 'bfloat16' on ranks 0, 1, 3 of 4; 'float16' on rank 2 of 4"),
    mismatch("other-hidden-size", "x = x[:, :7]", "H: 8 on ranks 0, 1, 3 of 4; 7 on rank 2 of 4"),
    mismatch("other-top-k", "expert_ids = expert_ids[:, :2]", "K: 3 on ranks 0, 1, 3 of 4; 2 on rank 2 of 4"),
    mismatch("other-global-bs", "global_bs = 16", "global_bs: 0 on ranks 0, 1, 3 of 4; 16 on rank 2 of 4"),
    mismatch("other-quant-mode", "quant_mode = 2", "quant_mode: 0 on ranks 0, 1, 3 of 4; 2 on rank 2 of 4"),
    mismatch("other-comm-alg", "comm_alg = 'fullmesh_v1'", "comm_alg: '' on ranks 0, 1, 3 of 4; 'fullmesh_v1' on rank 2 of 4"),
    mismatch("other-shared-num", "shared_expert_num = 0", "shared_expert_num: 1 on ranks 0, 1, 3 of 4; 0 on rank 2 of 4"),
    mismatch(
        "other-shared-rank-num", "shared_expert_rank_num = 2", "shared_expert_rank_num: 0 on ranks 0, 1, 3 of 4; 2 on rank 2 of 4"
    ),
    mismatch("other-tp-world-size", "tp_world_size = 1", "tp_world_size: 0 on ranks 0, 1, 3 of 4; 1 on rank 2 of 4"),
    mismatch("other-zero-num", "zero_expert_num = 1", "zero_expert_num: 0 on ranks 0, 1, 3 of 4; 1 on rank 2 of 4"),
    mismatch("other-copy-num", "copy_expert_num = 1", "copy_expert_num: 0 on ranks 0, 1, 3 of 4; 1 on rank 2 of 4"),
    mismatch("other-const-num", "const_expert_num = 1", "const_expert_num: 0 on ranks 0, 1, 3 of 4; 1 on rank 2 of 4"),
    mismatch(
        "no-smooth-factors", "scales = None", "scales is not None: True on ranks 0, 1, 3 of 4; False on rank 2 of 4", base=INT8
    ),
    mismatch(
        "expert-scales-on-one-rank",
        "expert_scales = torch.ones(3, 3)",
        "expert_scales is not None: False on ranks 0, 1, 3 of 4; True on rank 2 of 4",
    ),
    mismatch(
        "other-product",
        "commfuse.config.set(product='A3')",
        "product: 'portable' on ranks 0, 1, 3 of 4; 'A3' on rank 2 of 4",
        base=A3,
    ),
    mismatch(
        "other-backend",
        "commfuse.config.set(backend='reference')",
        "'npu_moe_distribute_dispatch_v2' on ranks 0, 1, 3 of 4",
        "choice of a backend for 'reference'",
        "on rank 2 of 4",
    ),
    mismatch(
        "two-differences",
        "moe_expert_num = 16; quant_mode = 2",
        "moe_expert_num: 8 on ranks 0, 1, 3 of 4; 16 on rank 2 of 4",
        "quant_mode: 0 on",
    ),
    mismatch(
        "different-on-every-rank",
        "moe_expert_num = 8 + 4 * ep_rank_id",
        "moe_expert_num: 8 on rank 0 of 4; 12 on rank 1 of 4; 16 on rank 2 of 4; 20 on rank 3 of 4",
        on_rank=None,
    ),
    mismatch(
        "other-survivors", "elastic_info[:] = torch.tensor([1, 4, 0, 8, 1, 0, 2, 3, 1, 0, 2, 3])", "ranks alive", base=ELASTIC
    ),
]

CASES = [*KINDS, *SHAPES, *DTYPES, *RANGES, *PARTNER, *IDS, *TABLES, *CHECKED, *ON_A3, *ON_A2, *MISMATCHES]
