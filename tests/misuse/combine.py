"""What one can write wrongly in npu_moe_distribute_combine_v2, and what one reads."""

from __future__ import annotations

from typing import Any

import commfuse

from .bases import (
    A2,
    A2_HIERARCHY,
    A3,
    A3_ALONE,
    ELASTIC,
    MASKED,
    MASKED_PAIRS,
    PAIR,
    PARTNERS,
    PLAIN,
    SHARED,
    SHARED_ROWS,
    SHRUNK,
    SPECIAL,
)
from .case import COMBINE, DISPATCH, Misuse


def case(name: str, wrong: str, *says: str, **more: Any) -> Misuse:
    return Misuse(id=name, operator=COMBINE, wrong=wrong, says=says, **{"base": PLAIN, **more})


def pair(name: str, wrong: str, *says: str) -> Misuse:
    """Two processes are enough to see this."""
    return case(name, wrong, *says, base=PAIR)


def mismatch(name: str, wrong: str, *says: str, **more: Any) -> Misuse:
    """Process 2 alone writes ``wrong``."""
    return case(name, wrong, *says, **{"on_rank": 2, "error": commfuse.MismatchError, **more})


_INTS = (
    "ep_world_size",
    "ep_rank_id",
    "moe_expert_num",
    "tp_world_size",
    "tp_rank_id",
    "expert_shard_type",
    "shared_expert_num",
    "shared_expert_rank_num",
    "global_bs",
    "comm_quant_mode",
    "zero_expert_num",
    "copy_expert_num",
    "const_expert_num",
)

KINDS = [
    *(
        pair(f"{name}-a-list", f"{name} = {name}.tolist()", f"{name} = [", "must be a tensor, got list")
        for name in ("expand_x", "expert_ids", "assist_info_for_combine", "ep_send_counts", "expert_scales")
    ),
    *(
        pair(f"{name}-none", f"{name} = None", f"{name} = None", "must be a tensor (")
        for name in ("expand_x", "expert_ids", "assist_info_for_combine", "ep_send_counts", "expert_scales")
    ),
    *(
        pair(f"{name}-a-number", f"{name} = 1.0", f"{name} = 1.0", "must be a tensor or None, got float")
        for name in (
            "tp_send_counts",
            "x_active_mask",
            "expand_scales",
            "shared_expert_x",
            "elastic_info",
            "ori_x",
            "const_expert_alpha_1",
            "const_expert_alpha_2",
            "const_expert_v",
            "performance_info",
        )
    ),
    *(pair(f"{name}-text", f"{name} = 'one'", f"{name} = 'one'", "must be an int, got str") for name in _INTS),
    pair("group-tp-none", "group_tp = None", "group_tp = None", "must be the name of a group or a ProcessGroup, got NoneType"),
    pair("comm-alg-a-number", "comm_alg = 0", "comm_alg = 0", "must be a str, got int"),
]

SHAPES = [
    case("expand-x-1d", "expand_x = expand_x[0]", "expand_x.shape = (8,)", "must be (rows, H), 2-D"),
    case("expand-x-3d", "expand_x = expand_x[None]", "expand_x.shape = (1, 24, 8)", "must be (rows, H), 2-D"),
    case("expert-ids-1d", "expert_ids = expert_ids[0]", "expert_ids.shape = (3,)", "must be (BS, K), 2-D"),
    case(
        "assist-info-2d",
        "assist_info_for_combine = assist_info_for_combine.view(-1, 3)",
        "assist_info_for_combine.shape = (1024, 3)",
        "1-D",
    ),
    case("send-counts-2d", "ep_send_counts = ep_send_counts.view(2, 4)", "ep_send_counts.shape = (2, 4)", "1-D"),
    case("expert-scales-1d", "expert_scales = expert_scales.flatten()", "expert_scales.shape = (9,)", "must be (BS, K), 2-D"),
    case(
        "expert-scales-narrow", "expert_scales = expert_scales[:, :2]", "expert_scales.shape = (3, 2)", "must be (BS, K) = (3, 3)"
    ),
    case("expert-scales-empty", "expert_scales = torch.empty(0)", "expert_scales.shape = (0,)", "must be (BS, K), 2-D"),
    case("mask-short", "x_active_mask = x_active_mask[:2]", "x_active_mask.shape = (2,)", "= (3,)", base=MASKED),
    case(
        "mask-3d",
        "x_active_mask = x_active_mask[None, None]",
        "x_active_mask.shape = (1, 1, 3)",
        "must be (BS,), 1-D or (BS, K), 2-D",
        base=MASKED,
    ),
    case(
        "shared-rows-1d",
        "shared_expert_x = shared_expert_x[0]",
        "shared_expert_x.shape = (8,)",
        "must be (BS, H), 2-D or",
        base=SHARED_ROWS,
    ),
    case(
        "shared-rows-fewer",
        "shared_expert_x = shared_expert_x[:2]",
        "shared_expert_x.shape = (2, 8)",
        "must be (BS, H) = (3, 8)",
        base=SHARED_ROWS,
    ),
    case(
        "shared-rows-3d-fewer",
        "shared_expert_x = shared_expert_x[None, :2]",
        "shared_rows_0 * shared_rows_1 = 2",
        "must be BS = 3",
        base=SHARED_ROWS,
    ),
    case(
        "shared-rows-3d-narrow",
        "shared_expert_x = shared_expert_x[None, :, :7]",
        "shared_expert_x.shape = (1, 3, 7)",
        "(1, 3, 8)",
        base=SHARED_ROWS,
    ),
    case(
        "elastic-info-long",
        "elastic_info = torch.cat([elastic_info, elastic_info])",
        "elastic_info.shape = (24,)",
        "= (12,)",
        base=ELASTIC,
    ),
    case("elastic-info-2d", "elastic_info = elastic_info[None]", "elastic_info.shape = (1, 12)", "1-D", base=ELASTIC),
    case("ori-x-fewer", "ori_x = ori_x[:2]", "ori_x.shape = (2, 8)", "must be (BS, H) = (3, 8)", base=SPECIAL),
    case("ori-x-1d", "ori_x = ori_x[0]", "ori_x.shape = (8,)", "must be (BS, H), 2-D", base=SPECIAL),
    case(
        "alpha-1-of-more-experts",
        "const_expert_alpha_1 = torch.ones(2).bfloat16()",
        "const_expert_alpha_1.shape = (2,)",
        "(1,)",
        base=SPECIAL,
    ),
    case(
        "alpha-2-3d",
        "const_expert_alpha_2 = torch.ones(1, 1, 8).bfloat16()",
        "const_expert_alpha_2.shape = (1, 1, 8)",
        "must be (const_expert_num,), 1-D or (const_expert_num, H), 2-D",
        base=SPECIAL,
    ),
    case(
        "alphas-of-different-forms",
        "const_expert_alpha_2 = torch.ones(1, 8).bfloat16()",
        "const_expert_alpha_2.ndim = 2",
        "must be const_expert_alpha_1.ndim = 1",
        base=SPECIAL,
    ),
    case(
        "alpha-1-3d",
        "const_expert_alpha_1 = const_expert_alpha_1[None, None]",
        "const_expert_alpha_1.shape = (1, 1, 1)",
        "1-D or (const_expert_num, H), 2-D",
        base=SPECIAL,
    ),
    case(
        "v-1d",
        "const_expert_v = const_expert_v[0]",
        "const_expert_v.shape = (8,)",
        "must be (const_expert_num, H), 2-D",
        base=SPECIAL,
    ),
    case("v-narrow", "const_expert_v = const_expert_v[:, :7]", "const_expert_v.shape = (1, 7)", "= (1, 8)", base=SPECIAL),
    case(
        "performance-info-long", "performance_info = torch.zeros(8, dtype=torch.int64)", "performance_info.shape = (8,)", "(4,)"
    ),
    case(
        "performance-info-2d", "performance_info = torch.zeros(2, 2, dtype=torch.int64)", "performance_info.shape = (2, 2)", "1-D"
    ),
    case("tp-counts-2d", "tp_send_counts = tp_send_counts[None]", "tp_send_counts.shape = (1, 2)", "1-D", base=PARTNERS),
    case("tp-counts-of-one", "tp_send_counts = tp_send_counts[:1]", "tp_send_counts.shape = (1,)", "(2,)", base=PARTNERS),
]

DTYPES = [
    pair(
        "expand-x-int8", "expand_x = expand_x.to(torch.int8)", "expand_x.dtype = int8", "must be bfloat16 or float16 or float32"
    ),
    pair("expert-ids-int64", "expert_ids = expert_ids.long()", "expert_ids.dtype = int64", "must be int32"),
    pair(
        "assist-info-int64",
        "assist_info_for_combine = assist_info_for_combine.long()",
        "assist_info_for_combine.dtype = int64",
        "must be int32",
    ),
    pair("send-counts-int64", "ep_send_counts = ep_send_counts.long()", "ep_send_counts.dtype = int64", "must be int32"),
    pair(
        "expert-scales-bfloat16", "expert_scales = expert_scales.bfloat16()", "expert_scales.dtype = bfloat16", "must be float32"
    ),
    case(
        "mask-uint8",
        "x_active_mask = x_active_mask.to(torch.uint8)",
        "x_active_mask.dtype = uint8",
        "must be bool",
        base=MASKED_PAIRS,
    ),
    case(
        "shared-rows-float64",
        "shared_expert_x = shared_expert_x.double()",
        "shared_expert_x.dtype = float64",
        "must be bfloat16 or float16 or float32",
        base=SHARED_ROWS,
    ),
    case(
        "shared-rows-of-another-dtype",
        "shared_expert_x = shared_expert_x.float()",
        "shared_expert_x.dtype = 'float32'",
        "must be expand_x.dtype = bfloat16",
        base=SHARED_ROWS,
    ),
    case("elastic-info-int64", "elastic_info = elastic_info.long()", "elastic_info.dtype = int64", "must be int32", base=ELASTIC),
    case("ori-x-float64", "ori_x = ori_x.double()", "ori_x.dtype = float64", "must be bfloat16", base=SPECIAL),
    case(
        "ori-x-of-another-dtype",
        "ori_x = ori_x.half()",
        "ori_x.dtype = 'float16'",
        "must be expand_x.dtype = bfloat16",
        base=SPECIAL,
    ),
    *(
        case(f"{name}-float64", f"{name} = {name}.double()", f"{name}.dtype = float64", "must be bfloat16", base=SPECIAL)
        for name in ("const_expert_alpha_1", "const_expert_alpha_2", "const_expert_v")
    ),
    *(
        case(
            f"{name}-of-another-dtype",
            f"{name} = {name}.float()",
            f"{name}.dtype = 'float32'",
            "must be expand_x.dtype = bfloat16",
            base=SPECIAL,
        )
        for name in ("const_expert_alpha_1", "const_expert_alpha_2", "const_expert_v")
    ),
    pair(
        "performance-info-int32",
        "performance_info = torch.zeros(2, dtype=torch.int32)",
        "performance_info.dtype = int32",
        "must be int64",
    ),
    case(
        "tp-counts-int64",
        "tp_send_counts = tp_send_counts.long()",
        "tp_send_counts.dtype = int64",
        "must be int32",
        base=PARTNERS,
    ),
]

RANGES = [
    case("world-size-zero", "ep_world_size = 0", "ep_world_size = 0", "must be at least 1"),
    case("world-size-of-another-group", "ep_world_size = 8", "ep_world_size = 8", "must be the size of group_ep = 4"),
    case("rank-id-too-large", "ep_rank_id = 4", "ep_rank_id = 4", "0..3"),
    case(
        "rank-id-of-another-rank",
        "ep_rank_id = 3",
        "refused on rank 0 of 4",
        "ep_rank_id = 3",
        "this process's rank in group_ep = 0",
        on_rank=0,
    ),
    case("expert-num-zero", "moe_expert_num = 0", "moe_expert_num = 0", "must be at least 1"),
    case(
        "expert-num-not-divisible",
        "moe_expert_num = 10",
        "moe_expert_num = 10",
        "divisible by ep_world_size - shared_expert_rank_num = 4",
    ),
    case("shard-type-one", "expert_shard_type = 1", "expert_shard_type = 1", "must be 0"),
    case("shared-num-negative", "shared_expert_num = -1", "shared_expert_num = -1", "must be at least 0"),
    case("shared-rank-num-too-large", "shared_expert_rank_num = 5", "shared_expert_rank_num = 5", "0..3"),
    case(
        "shared-ranks-not-a-multiple",
        "shared_expert_num = 2",
        "shared_expert_rank_num = 1",
        "a positive multiple of shared_expert_num = 2",
        base=SHARED,
    ),
    case("zero-num-negative", "zero_expert_num = -1", "zero_expert_num = -1", "must be at least 0"),
    case("copy-num-negative", "copy_expert_num = -1", "copy_expert_num = -1", "must be at least 0"),
    case("const-num-negative", "const_expert_num = -1", "const_expert_num = -1", "must be at least 0"),
    case("too-many-special-experts", "zero_expert_num = 2**31 - 1", "all_experts = 2147483655", "must be at most 2147483647"),
    case("tp-world-size-four", "tp_world_size = 4", "tp_world_size = 4", "must be one of 0, 1, 2"),
    case("tp-rank-id-without-tp", "tp_rank_id = 1", "tp_rank_id = 1", "otherwise 0"),
    case("no-columns", "expand_x = expand_x[:, :0]", "H = 0 (expand_x.shape[1])", "must be at least 1"),
    case(
        "more-ids-than-experts",
        "moe_expert_num = 4; expert_ids = torch.arange(5).int().repeat(3, 1); expert_scales = torch.ones(3, 5)",
        "K = 5",
        "1..4",
    ),
    case("global-bs-below-own", "global_bs = 4", "global_bs = 4", "at least BS * ep_world_size = 12"),
    case("global-bs-huge", "global_bs = 2**40", "A = ", "rows' numbers fit int32"),
    case("comm-alg-unknown", "comm_alg = 'direct'", "comm_alg = 'direct'", "must be one of '', 'fullmesh', 'hierarchy'"),
    case(
        "comm-quant-mode-one",
        "comm_quant_mode = 1",
        "comm_quant_mode = 1",
        "must be one of 0, 2",
        "commQuantMode only support 0(default) or 2(int8 comm quant)",
    ),
    case(
        "counts-too-short",
        "ep_send_counts = ep_send_counts[:7]",
        "counts_length = 7 (ep_send_counts.shape[0])",
        "at least ep_world_size * L * copies = 8",
    ),
    case("counts-of-own-rows-only", "ep_send_counts = ep_send_counts[:2]", "counts_length = 2", "= 4", base=PARTNERS),
    case(
        "shared-rows-beside-shared-ranks",
        "shared_expert_x = torch.zeros(3, 8).bfloat16()",
        "shared_expert_x = ",
        "must be None",
        "when shared_expert_rank_num > 0",
        base=SHARED,
    ),
    case(
        "copy-experts-without-ori-x",
        "copy_expert_num = 1",
        "ori_x = None",
        "must be given when copy_expert_num > 0",
        "oriX must exist when copyExpertNum > 0",
    ),
    *(
        case(
            f"constant-experts-without-{name}",
            f"{name} = None",
            f"{name} = None",
            "must be given when const_expert_num > 0",
            base=SPECIAL,
        )
        for name in ("ori_x", "const_expert_alpha_1", "const_expert_alpha_2", "const_expert_v")
    ),
]

PARTNER = [
    case("tp-without-group", "group_tp = ''", "group_tp = ''", "the name of another group than group_ep", base=PARTNERS),
    case(
        "tp-without-counts",
        "tp_send_counts = None",
        "tp_send_counts = None",
        "must be given when tp_world_size == 2",
        base=PARTNERS,
    ),
    case("tp-with-two-experts-per-rank", "moe_expert_num = 4", "e = 2", "must be 1", base=PARTNERS),
    case(
        "tp-with-elastic-info",
        "elastic_info = torch.zeros(8, dtype=torch.int32)",
        "elastic_info",
        "must be None when tp_world_size == 2",
        base=PARTNERS,
    ),
    case(
        "tp-rank-id-of-the-partner",
        "tp_rank_id = 1 - tp_rank_id",
        "tp_rank_id = 1",
        "this process's rank in group_tp = 0",
        base=PARTNERS,
    ),
    case("tp-with-int8-rows", "comm_quant_mode = 2", "comm_quant_mode = 2", "must be 0 when tp_world_size == 2", base=PARTNERS),
    case("tp-counts-not-own", "tp_send_counts += 1", "tp_send_counts[0] = ", "must be this rank's own rows", base=PARTNERS),
    case(
        "tp-counts-negative", "tp_send_counts[1 - tp_rank_id] = -1", "tp_send_counts = [", "must be non-negative", base=PARTNERS
    ),
    case(
        "tp-counts-beyond-the-rows",
        "tp_send_counts[1 - tp_rank_id] = 99",
        "99",
        "at most the rows of expand_x = 12",
        base=PARTNERS,
    ),
    case(
        "tp-counts-differ-between-partners",
        "tp_send_counts[1 - tp_rank_id] -= 1",
        "tp_send_counts = [",
        "must be equal on both partners, which hold",
        base=PARTNERS,
        on_rank=3,
    ),
    case(
        "tp-bad-ids-on-one-process",
        "expert_ids[0, 1] = -5",
        "refused on rank 0 of 2",
        "expert_ids[0, 1] = -5",
        "0..1",
        base=PARTNERS,
        on_rank=1,
    ),
    case(
        "tp-dtype-on-one-process",
        "expert_scales = expert_scales.double()",
        "refused on rank 0 of 2",
        "expert_scales.dtype = float64",
        "must be float32",
        base=PARTNERS,
        on_rank=0,
    ),
]

VALUES = [
    case("id-too-large", "expert_ids[1, 0] = 8", "expert_ids[1, 0] = 8", "must be in 0..7"),
    case("id-negative", "expert_ids[0, 0] = -1", "expert_ids[0, 0] = -1", "must be in 0..7"),
    case("id-twice", "expert_ids[2, 0] = expert_ids[2, 1]", "expert_ids[2, 1] = ", "must differ from expert_ids[2, 0]"),
    case(
        "ids-bad-on-one-rank",
        "expert_ids[2, 2] = 100",
        "refused on rank 3 of 4",
        "expert_ids[2, 2] = 100",
        "must be in 0..7",
        on_rank=3,
    ),
    case(
        "id-of-a-lost-expert",
        "expert_ids[1] = torch.tensor([7, 1, 2])",
        "expert_ids[1, 0] = 7",
        "0..5",
        "(elastic_info[3], the experts left)",
        base=SHRUNK,
    ),
    case("elastic-expert-num", "elastic_info[3] = 16", "elastic_info[3] = 16 (MoE experts)", "= 8", base=ELASTIC),
    case("elastic-ids-broken", "elastic_info[4] = 3", "elastic_info[4:8] = [3, 1, 2, 3]", "0..3", base=ELASTIC),
    case(
        "mask-false-before-true",
        "x_active_mask = torch.tensor([False, True, True])  # with COMMFUSE_CHECK=1",
        "x_active_mask[2] = True after a False",
        "every True before every False",
        settings={"check": True},
    ),
    case("counts-falling", "ep_send_counts[3] = ep_send_counts[2] - 1", "ep_send_counts[3] = ", "must be a prefix sum"),
    case("counts-negative", "ep_send_counts[0] = -1", "ep_send_counts[0] = -1", "must be a prefix sum"),
    case(
        "counts-instead-of-sums",
        "ep_send_counts = ep_send_counts.diff(prepend=ep_send_counts.new_zeros(1)).flip(0)",
        "ep_send_counts[",
        "must be a prefix sum",
    ),
    case("counts-beyond-the-rows", "ep_send_counts[7] = 100", "ep_send_counts[7] = 100", "at most the rows of expand_x = 24"),
    case("rows-cut", "expand_x = expand_x[:2]", "ep_send_counts[7] = ", "at most the rows of expand_x = 2"),
    case(
        "counts-of-another-call",
        "ep_send_counts[:] = torch.arange(1, 9)",
        "rank with id 0 return",
        "must be those of one dispatch",
    ),
    case(
        "counts-of-another-call-on-one-rank",
        "ep_send_counts[:] = torch.arange(1, 9)",
        "rank with id 2 return",
        "must be those of one dispatch",
        on_rank=2,
    ),
    case(
        "ids-of-another-call",
        "expert_ids[:] = (expert_ids + 1) % 8",
        "expert_ids and x_active_mask",
        "must be those of one dispatch",
    ),
    case(
        "ids-of-another-call-on-one-rank",
        "expert_ids[0] = (expert_ids[0] + 1) % 8",
        "refused on rank 1 of 4",
        "expert_ids and x_active_mask",
        on_rank=1,
    ),
    case(
        "mask-not-given-to-dispatch",
        "x_active_mask = torch.tensor([True, True, False])",
        "expert_ids and x_active_mask",
        "must be those of one dispatch",
    ),
    case(
        "mask-forgotten",
        "x_active_mask = None; expert_ids[:] = torch.tensor([0, 1, 2])",
        "expert_ids and x_active_mask",
        "must be those of one dispatch",
        base=MASKED,
    ),
    case(
        "assist-info-cut",
        "assist_info_for_combine = assist_info_for_combine[:6]",
        "assist_info_for_combine has 6 entries",
        "must have 3 for each of",
    ),
    case(
        "assist-info-names-another-rank",
        "assist_info_for_combine[0] = (assist_info_for_combine[0] + 1) % 4",
        "assist_info_for_combine of the rank with id",
        "(rank, token, slot) = ",
        "must be that of the same dispatch",
    ),
    case(
        "assist-info-names-another-token",
        "assist_info_for_combine[1] = 77",
        "assist_info_for_combine",
        "77",
        "must be that of the same dispatch",
    ),
    case(
        "assist-info-names-another-slot",
        "assist_info_for_combine[2] += 1",
        "assist_info_for_combine",
        "must be that of the same dispatch",
    ),
    case(
        "assist-info-zeros",
        "assist_info_for_combine.zero_()",
        "assist_info_for_combine",
        "(0, 0, 0)",
        "must be that of the same dispatch",
    ),
    case(
        "assist-info-of-another-rank",
        "assist_info_for_combine = assist_info_for_combine.roll(3)",
        "assist_info_for_combine of the rank with id 1 says",
        "must be that of the same dispatch",
        on_rank=1,
    ),
    case(
        "assist-info-out-of-any-range",
        "assist_info_for_combine[:3] = torch.tensor([2**31 - 1, -(2**31), -1])",
        "2147483647",
        "must be that of the same dispatch",
        on_rank=0,
    ),
    case(
        "assist-info-after-shrinking",
        "assist_info_for_combine[1] += 1",
        "assist_info_for_combine of the rank with id",
        "must be that of the same dispatch",
        base=SHRUNK,
    ),
]


def a3(name: str, wrong: str, *says: str, **more: Any) -> Misuse:
    return case(f"a3-{name}", wrong, "under the rules of A3", *says, **{"base": A3, "product": "A3", **more})


ON_A3 = [
    a3("float32", "expand_x = expand_x.float()", "expand_x.dtype = 'float32'", "must be one of 'bfloat16', 'float16'"),
    a3("too-few-rows", "expand_x = expand_x[:int(ep_send_counts[-1])]", "rows = ", "at least A * copies = 16"),
    a3(
        "assist-info-short",
        "assist_info_for_combine = assist_info_for_combine[:-1]",
        "assist_length = 2047",
        "at least A * 128 = 2048",
    ),
    a3("comm-alg", "comm_alg = 'fullmesh_v2'", "comm_alg = 'fullmesh_v2'", "must be ''"),
    a3("narrow", "expand_x = expand_x[:, :1000]", "H = 1000 (expand_x.shape[1])", "must be in 1024..8192"),
    a3(
        "no-token",
        "expert_ids = expert_ids[:0]; expert_scales = expert_scales[:0]",
        "BS = 0 (expert_ids.shape[0])",
        "must be in 1..512",
    ),
    a3(
        "top-17",
        "moe_expert_num = 20; expert_ids = torch.arange(17).int().repeat(2, 1); expert_scales = torch.ones(2, 17)",
        "K = 17",
        "must be in 1..16",
    ),
    a3(
        "v2-too-many-tokens",
        "comm_alg = 'fullmesh_v2'; expert_ids = torch.arange(3).int().repeat(257, 1); expert_scales = torch.ones(257, 3)",
        "BS = 257",
        "must be in 1..256 when comm_alg == 'fullmesh_v2'",
    ),
    a3(
        "v2-top-13",
        "comm_alg = 'fullmesh_v2'; moe_expert_num = 16; "
        "expert_ids = torch.arange(13).int().repeat(2, 1); expert_scales = torch.ones(2, 13)",
        "K = 13",
        "must be in 1..12 when comm_alg == 'fullmesh_v2'",
    ),
    a3("one-rank", "# the group has 1 rank", "ep_world_size = 1", "must be in 2..768", base=A3_ALONE),
    a3("too-many-experts", "moe_expert_num = 2048", "moe_expert_num = 2048", "must be in 1..1024"),
    a3(
        "too-many-experts-per-rank",
        "shared_expert_rank_num = 3; moe_expert_num = 1024",
        "e * ep_world_size = 4096",
        "must be in 1..2048",
    ),
    a3("too-many-shared-experts", "shared_expert_num = 5", "shared_expert_num = 5", "must be in 0..4"),
    a3("shared-experts-without-ranks", "shared_expert_num = 3", "shared_expert_num = 3", "must be one of 0, 1"),
    a3(
        "mask-with-uneven-batches",
        "x_active_mask = torch.ones(2, dtype=torch.bool); global_bs = 12",
        "x_active_mask",
        "None (ranks have different batch sizes)",
    ),
    a3("performance-info", "performance_info = torch.zeros(4, dtype=torch.int64)", "performance_info", "must be None"),
    a3("buffer-too-small", "os.environ['HCCL_BUFFSIZE'] = '1'", "HCCL_BUFFSIZE = 1", "at least 2 MB"),
]


def a2(name: str, wrong: str, *says: str, **more: Any) -> Misuse:
    return case(f"a2-{name}", wrong, "under the rules of A2", "ep_world_size = 4", *says, **{"base": A2, "product": "A2", **more})


def hierarchy(name: str, wrong: str, *says: str) -> Misuse:
    return a2(f"hierarchy-{name}", wrong, *says, base=A2_HIERARCHY)


ON_A2 = [
    a2("four-ranks", "# the group has 4 ranks", "must be one of 16, 32, 64, 128, 256"),
    a2("float32", "expand_x = expand_x.float()", "expand_x.dtype = 'float32'", "must be one of 'bfloat16', 'float16'"),
    a2("assist-info-short", "assist_info_for_combine = assist_info_for_combine[:5]", "assist_length = 5", "at least BS * K = 6"),
    a2("too-few-rows", "expand_x = expand_x[:15]", "rows = 15", "at least A * copies = 16"),
    a2(
        "too-many-tokens",
        "expert_ids = torch.arange(3).int().repeat(257, 1); expert_scales = torch.ones(257, 3)",
        "BS = 257",
        "must be in 1..256",
    ),
    a2("hidden-not-a-multiple", "expand_x = expand_x[:, :40]", "H = 40", "must be a multiple of 32"),
    a2("wide", "expand_x = torch.zeros(16, 7200).bfloat16()", "H = 7200", "must be in 1..7168"),
    a2(
        "top-17",
        "moe_expert_num = 20; expert_ids = torch.arange(17).int().repeat(2, 1); expert_scales = torch.ones(2, 17)",
        "K = 17",
        "must be in 1..16",
    ),
    a2("too-many-experts", "moe_expert_num = 516", "moe_expert_num = 516", "must be in 1..512"),
    a2("too-many-experts-per-rank", "moe_expert_num = 100", "e = 25", "must be in 1..24"),
    a2("shared-ranks", "shared_expert_rank_num = 1; moe_expert_num = 6", "shared_expert_rank_num = 1", "must be 0"),
    a2("tensor-parallel", "tp_world_size = 2", "tp_world_size = 2", "must be one of 0, 1"),
    a2("comm-alg-of-a3", "comm_alg = 'fullmesh_v1'", "comm_alg = 'fullmesh_v1'", "must be one of '', 'fullmesh', 'hierarchy'"),
    a2("int8-rows", "comm_quant_mode = 2", "comm_quant_mode = 2", "must be 0 when algorithm == 'fullmesh'"),
    a2("elastic-info", "elastic_info = torch.zeros(12, dtype=torch.int32)", "elastic_info", "must be None"),
    a2("constant-experts", "const_expert_num = 1", "const_expert_num = 1", "must be 0"),
    a2(
        "mask-with-uneven-batches",
        "x_active_mask = torch.ones(2, dtype=torch.bool); global_bs = 16",
        "x_active_mask",
        "None (ranks have different batch sizes)",
    ),
    a2("buffer-too-small", "os.environ['HCCL_BUFFSIZE'] = '4'", "HCCL_BUFFSIZE = 4", "at least 5 MB"),
    *(
        a2(f"with-{name}", f"{name} = torch.zeros({shape}).bfloat16()", f"{name} = ", "must be None")
        for name, shape in (
            ("shared_expert_x", "2, 64"),
            ("ori_x", "2, 64"),
            ("const_expert_alpha_1", "1"),
            ("const_expert_alpha_2", "1"),
            ("const_expert_v", "1, 64"),
        )
    ),
    hierarchy("four-ranks", "# the group has 4 ranks", "must be one of 16, 32, 64 when algorithm == 'hierarchy'"),
    hierarchy("wide", "expand_x = torch.zeros(16, 10272).bfloat16()", "H = 10272", "must be in 1..10240"),
    hierarchy("zero-experts", "zero_expert_num = 1", "zero_expert_num = 1", "must be 0 when algorithm == 'hierarchy'"),
    hierarchy("copy-experts", "copy_expert_num = 1", "copy_expert_num = 1", "must be 0 when algorithm == 'hierarchy'"),
    hierarchy(
        "mask", "x_active_mask = torch.ones(2, dtype=torch.bool)", "x_active_mask", "must be None when algorithm == 'hierarchy'"
    ),
    hierarchy(
        "without-expand-scales", "expand_scales = None", "expand_scales = None", "must be given when algorithm == 'hierarchy'"
    ),
    hierarchy("expand-scales-short", "expand_scales = expand_scales[:-1]", "expand_scales.shape = (15,)", "(16,)"),
    hierarchy("expand-scales-2d", "expand_scales = expand_scales[None]", "expand_scales.shape = (1, 16)", "1-D"),
    hierarchy(
        "expand-scales-float64", "expand_scales = expand_scales.double()", "expand_scales.dtype = float64", "must be float32"
    ),
    case(
        "a2-index-of-another-call",
        "assist_info_for_combine[4] += 1  # with COMMFUSE_PRODUCT=A2,warn",
        "assist_info_for_combine[4] = ",
        "as dispatch returned it",
        base=A2,
        product="A2,warn",
    ),
]

MISMATCHES = [
    mismatch(
        "another-operator",
        "# npu_moe_distribute_dispatch_v2 is called instead",
        "operator",
        f"'{COMBINE}' on ranks 0, 1, 3 of 4; '{DISPATCH}' on rank 2 of 4",
        calls=DISPATCH,
    ),
    mismatch(
        "other-expert-num",
        "moe_expert_num = 12; ep_send_counts = torch.cat([ep_send_counts, ep_send_counts[-1:].repeat(4)])",
        "moe_expert_num: 8 on ranks 0, 1, 3 of 4; 12 on rank 2 of 4",
    ),
    mismatch(
        "other-dtype", "expand_x = expand_x.half()", "expand_x.dtype: 'bfloat16' on ranks 0, 1, 3 of 4; 'float16' on rank 2 of 4"
    ),
    mismatch("other-hidden-size", "expand_x = expand_x[:, :4]", "H: 8 on ranks 0, 1, 3 of 4; 4 on rank 2 of 4"),
    mismatch(
        "other-top-k",
        "expert_ids = expert_ids[:, :1]; expert_scales = expert_scales[:, :1]",
        "K: 3 on ranks 0, 1, 3 of 4; 1 on rank 2 of 4",
    ),
    mismatch("other-global-bs", "global_bs = 12", "global_bs: 0 on ranks 0, 1, 3 of 4; 12 on rank 2 of 4"),
    mismatch("other-comm-quant-mode", "comm_quant_mode = 2", "comm_quant_mode: 0 on ranks 0, 1, 3 of 4; 2 on rank 2 of 4"),
    mismatch("other-comm-alg", "comm_alg = 'ccu'", "comm_alg: '' on ranks 0, 1, 3 of 4; 'ccu' on rank 2 of 4"),
    mismatch("other-shared-num", "shared_expert_num = 2", "shared_expert_num: 1 on ranks 0, 1, 3 of 4; 2 on rank 2 of 4"),
    mismatch("other-tp-world-size", "tp_world_size = 1", "tp_world_size: 0 on ranks 0, 1, 3 of 4; 1 on rank 2 of 4"),
    mismatch("other-zero-num", "zero_expert_num = 5", "zero_expert_num: 0 on ranks 0, 1, 3 of 4; 5 on rank 2 of 4"),
    mismatch(
        "other-copy-num",
        "copy_expert_num = 2; zero_expert_num = 0",
        "copy_expert_num: 1 on ranks 0, 1, 3 of 4; 2 on rank 2 of 4",
        "zero_expert_num: 1 on",
        base=SPECIAL,
    ),
    mismatch(
        "other-product",
        "commfuse.config.set(product='A3')",
        "product: 'portable' on ranks 0, 1, 3 of 4; 'A3' on rank 2 of 4",
        base=A3,
    ),
    mismatch(
        "different-on-every-rank",
        "global_bs = 12 + 4 * ep_rank_id",
        "global_bs: 12 on rank 0 of 4; 16 on rank 1 of 4; 20 on rank 2 of 4; 24 on rank 3 of 4",
        on_rank=None,
    ),
]

CASES = [*KINDS, *SHAPES, *DTYPES, *RANGES, *PARTNER, *VALUES, *ON_A3, *ON_A2, *MISMATCHES]
