"""Rows that dispatch and combine share: who takes part, which experts there are, and what each product accepts."""

from __future__ import annotations

from ...spec.model import (
    HARDWARE,
    ON_A2,
    ON_A3,
    Attr,
    Rule,
    Symbol,
    Tensor,
    at_least,
    between,
    holds,
    one_of,
)

PAGE = "npu_moe_distribute_dispatch_v2 page, "
COMBINE_PAGE = "npu_moe_distribute_combine_v2 page, "
FORMULA = "the formula itself"
MAX_INT32 = 2**31 - 1

# --- arguments -------------------------------------------------------------------------------------------------------------

DOMAIN = (
    Attr(name="group_ep", schema="group", required=True, positional=True, meaning="expert-parallel domain: name or ProcessGroup"),
    Attr(name="ep_world_size", schema="int", required=True, positional=True, meaning="W, ranks in the expert-parallel domain"),
    Attr(name="ep_rank_id", schema="int", required=True, positional=True, meaning="this rank's id in the domain, 0..W-1"),
    Attr(name="moe_expert_num", schema="int", required=True, positional=True, meaning="M, MoE experts over all ranks"),
)
TENSOR_PARALLEL = (
    Attr(name="group_tp", schema="group", default="", meaning="tensor-parallel domain; only looked at when tp_world_size is 2"),
    Attr(name="tp_world_size", schema="int", default=0, meaning="0 or 1: no tensor parallelism; 2: two ranks share their rows"),
    Attr(name="tp_rank_id", schema="int", default=0, meaning="this rank's id in the tensor-parallel domain"),
)
SHARED_EXPERTS = (
    Attr(name="expert_shard_type", schema="int", default=0, meaning="0: shared-expert ranks come before MoE ranks"),
    Attr(
        name="shared_expert_num",
        schema="int",
        default=1,
        meaning="shared experts on ranks of their own; counts only with such ranks",
    ),
    Attr(name="shared_expert_rank_num", schema="int", default=0, meaning="R_s, ranks 0..R_s-1 that hold shared experts"),
)
SPECIAL_EXPERTS = (
    Attr(name="zero_expert_num", schema="int", default=0, meaning="Z, ids M..M+Z-1 contribute nothing"),
    Attr(name="copy_expert_num", schema="int", default=0, meaning="C, the next C ids contribute the token itself"),
    Attr(name="const_expert_num", schema="int", default=0, meaning="N, the next N ids contribute alpha_1*x + alpha_2*v"),
)
GLOBAL_BS = Attr(
    name="global_bs",
    schema="int",
    default=0,
    meaning="0 if every rank has the same BS, otherwise (largest BS) * W, equal on all ranks",
)
COMM_ALG = Attr(
    name="comm_alg",
    schema="str",
    default="",
    meaning='"", "fullmesh", "hierarchy", "fullmesh_v1", "fullmesh_v2" or "ccu": the same rows and sums here; products limit it',
)
MASK = Tensor(
    name="x_active_mask",
    shapes=(("BS",), ("BS", "K")),
    dtype=("bool",),
    optional=True,
    meaning="which tokens (1-D: the first sum(mask) of them) or (token, k) pairs (2-D) take part; others are never read",
)
ELASTIC = Tensor(
    name="elastic_info",
    shapes=(("4 + 2 * ep_world_size",),),
    dtype=("int32",),
    optional=True,
    meaning="[shrunk?, ranks alive, shared-expert ranks, MoE experts, id of each rank or -1 (W), rank of each id or -1 (W)]",
)
PERFORMANCE = Tensor(
    name="performance_info",
    shapes=(("ep_world_size",),),
    dtype=("int64",),
    optional=True,
    written=True,
    meaning="microseconds waited for each rank are added to it",
)

# --- sizes -----------------------------------------------------------------------------------------------------------------

SYMBOLS = (
    Symbol(name="E_s", formula="shared_expert_num if shared_expert_rank_num > 0 else 0", meaning="shared experts in effect"),
    Symbol(name="e", formula="moe_expert_num // (ep_world_size - shared_expert_rank_num)", meaning="MoE experts per MoE rank"),
    Symbol(name="g", formula="shared_expert_rank_num // shared_expert_num", meaning="ranks that replicate one shared expert"),
    Symbol(name="gbs", formula="global_bs if global_bs != 0 else BS * ep_world_size", meaning="tokens of all ranks, at most"),
    Symbol(name="max_bs", formula="gbs // ep_world_size", meaning="tokens of one rank, at most"),
    Symbol(name="A_moe", formula="gbs * min(e, K)", meaning="rows a MoE rank may receive"),
    Symbol(name="A_shared", formula="max_bs * ceil_div(ep_world_size, g)", meaning="rows a shared-expert rank may receive"),
    Symbol(
        name="A_either",
        formula="max(A_shared, A_moe) if shared_expert_rank_num > 0 else A_moe",
        meaning="rows a rank may receive whose role may change (elastic_info)",
    ),
    Symbol(
        name="A",
        formula="A_either if elastic_info is not None else A_shared if ep_rank_id < shared_expert_rank_num else A_moe",
        meaning="rows this rank may receive from the expert-parallel domain",
    ),
    Symbol(
        name="L",
        formula="1 if ep_rank_id < shared_expert_rank_num and elastic_info is None else e",
        meaning="experts of this rank (with elastic_info: of either role)",
    ),
    Symbol(name="copies", formula="max(tp_world_size, 1)", meaning="2 with tensor parallelism, otherwise 1"),
    Symbol(
        name="all_experts",
        formula="moe_expert_num + zero_expert_num + copy_expert_num + const_expert_num",
        meaning="ids there are, special ones included",
    ),
    Symbol(
        name="algorithm",
        formula="'hierarchy' if comm_alg == 'hierarchy' or product == 'A2' and comm_alg == '' and HCCL_INTRA_PCIE_ENABLE == 1"
        " and HCCL_INTRA_ROCE_ENABLE == 0 else 'fullmesh'",
        meaning="what comm_alg means on A2",
    ),
    Symbol(name="layout", formula="'index' if product == 'A2' else 'triplets'", meaning="content of assist_info_for_combine"),
    Symbol(name="split_shared", formula="False", meaning="whether a rank's tokens are shared out over the shared-expert ranks"),
    Symbol(
        name="window_bytes_A3",
        formula="2 * (e * max_bs * ep_world_size * (ceil_div(align(32, 2 * H) + 44, 480) * 512 if comm_alg == 'fullmesh_v2'"
        " else align(512, align(32, 2 * H) + 44)) + (K + E_s) * max_bs * align(512, 2 * H))",
        meaning="bytes of communication buffer that A3 checks for",
    ),
    Symbol(
        name="window_bytes_A2",
        formula="moe_expert_num * max_bs * (2 * H + 16 * align(8, K)) + 104 * 2**20 if algorithm == 'hierarchy'"
        " else 2 * (max_bs * ep_world_size * min(e, K) * H * 2 + 2 * 2**20)",
        meaning="bytes of communication buffer that A2 checks for",
    ),
    Symbol(name="needed_mb_A3", formula="max(2, ceil_div(window_bytes_A3, 2**20))", meaning="the same in MB"),
    Symbol(name="needed_mb_A2", formula="ceil_div(window_bytes_A2, 2**20)", meaning="the same in MB"),
)


def without(*names: str) -> tuple[Symbol, ...]:
    """Give the arguments ``names``, which an operator does not have, the value that means "not used"."""
    return tuple(Symbol(name=name, formula=_UNUSED.get(name, "None"), meaning="") for name in names)


_UNUSED = {
    **dict.fromkeys(("tp_world_size", "tp_rank_id", "zero_expert_num", "copy_expert_num", "const_expert_num"), "0"),
    "comm_alg": "''",
}
SPECIAL_NAMES = ("zero_expert_num", "copy_expert_num", "const_expert_num")
SPECIAL_INPUTS = ("ori_x", "const_expert_alpha_1", "const_expert_alpha_2", "const_expert_v")

# --- rules of the formula, on every product ------------------------------------------------------------------------------------

WORLD_LIMITS = (
    at_least("ep_world_size", 1, FORMULA),
    holds("ep_world_size", "ep_world_size == group_size", "the size of group_ep = {group_size}", FORMULA),
    between(
        "ep_rank_id",
        0,
        "ep_world_size - 1",
        PAGE + "ep_rank_id",
        says="ep_rank_id should be in [0, ep_world_size), but got ep_world_size: …, ep_rank_id: …",
    ),
    holds("ep_rank_id", "ep_rank_id == group_rank", "this process's rank in group_ep = {group_rank}", FORMULA),
    holds("group_ep", "1 <= len(group_ep) <= 127", "1 to 127 characters", PAGE + "group_ep", says="groupEp is invalid"),
)
EXPERT_LIMITS = (
    at_least("moe_expert_num", 1, PAGE + "moe_expert_num", says="moeExpertNum is invalid, only support (0, 1024]"),
    holds(
        "moe_expert_num",
        "moe_expert_num % (ep_world_size - shared_expert_rank_num) == 0",
        "divisible by ep_world_size - shared_expert_rank_num = {ep_world_size - shared_expert_rank_num}",
        PAGE + "moe_expert_num",
        says="moeExpertNum should be divisible by (epWorldSize - sharedExpertRankNum)",
    ),
    one_of("expert_shard_type", (0,), PAGE + "expert_shard_type", says="expertShardType is invalid, only support 0"),
    at_least("shared_expert_num", 0, PAGE + "shared_expert_num", says="sharedExpertNum is invalid, only support [0, 4]"),
    between(
        "shared_expert_rank_num",
        0,
        "ep_world_size - 1",
        PAGE + "shared_expert_rank_num",
        says="shared_expert_rank_num should be in [0, ep_world_size), …",
    ),
    holds(
        "shared_expert_rank_num",
        "0 < shared_expert_num <= shared_expert_rank_num and shared_expert_rank_num % shared_expert_num == 0",
        "a positive multiple of shared_expert_num = {shared_expert_num}",
        PAGE + "shared_expert_rank_num",
        when="shared_expert_rank_num > 0",
        says="shared_expert_num and shared_expertrank_num have obvious value situations: …",
    ),
)
SPECIAL_LIMITS = (
    at_least("zero_expert_num", 0, PAGE + "zero_expert_num", says="zeroExpertNum less than 0"),
    at_least("copy_expert_num", 0, PAGE + "copy_expert_num", says="copyExpertNum less than 0"),
    at_least("const_expert_num", 0, PAGE + "const_expert_num", says="constExpertNum less than 0"),
    holds(
        "all_experts",
        f"all_experts <= {MAX_INT32}",
        f"at most {MAX_INT32}",
        PAGE + "zero_expert_num",
        says="… exceed INT32_MAX.",
    ),
)
TENSOR_PARALLEL_LIMITS = (
    one_of("tp_world_size", (0, 1, 2), PAGE + "tp_world_size", says="tpWorldSize is invalid, only support [0, 2]"),
    holds(
        "tp_rank_id",
        "tp_rank_id in (0, 1) if tp_world_size == 2 else tp_rank_id == 0",
        "0 or 1 with tp_world_size 2, otherwise 0",
        PAGE + "tp_rank_id",
        says="tpRankId is invalid, NoTp mode only support 0",
    ),
    holds(
        "group_tp",
        "group_tp != '' and group_tp != group_ep",
        "the name of another group than group_ep",
        PAGE + "group_tp",
        when="tp_world_size == 2",
        says="groupTp is invalid",
    ),
    holds(
        "e",
        "e == 1",
        "1 (one MoE expert per rank)",
        PAGE + "tp_world_size",
        when="tp_world_size == 2",
        says="Cannot support multi-moeExpert … in a rank when tpWorldSize = … > 1",
    ),
    holds(
        "elastic_info",
        "elastic_info is None",
        "None",
        COMBINE_PAGE + "elastic_info",
        when="tp_world_size == 2",
        says="Cannot support elasticInfo when tpWorldSize = … > 1",
    ),
)
SIZE_LIMITS = (
    at_least("H", 1, FORMULA),
    between(
        "K",
        1,
        "all_experts",
        PAGE + "expert_ids",
        says="expertIdShape's dim1(k) should be in (0, min(16, moeExpertNum + zeroExpertNum + copyExpertNum + constExpertNum = …)]",
    ),
    holds(
        "global_bs",
        "global_bs == 0 or global_bs >= BS * ep_world_size and global_bs % ep_world_size == 0",
        "0, or a multiple of ep_world_size = {ep_world_size} that is at least BS * ep_world_size = {BS * ep_world_size}",
        PAGE + "global_bs",
        says="globalBS is invalid, only support 0 or maxBs(…) * epWorldSize, …",
    ),
    holds(
        "A",
        f"A * copies <= {MAX_INT32}",
        f"small enough that the rows' numbers fit int32: A * max(tp_world_size, 1) at most {MAX_INT32}",
        FORMULA,
    ),
    one_of(
        "comm_alg",
        ("", "fullmesh", "hierarchy", "fullmesh_v1", "fullmesh_v2", "ccu"),
        PAGE + "comm_alg",
    ),
)

# --- what A3 and A2 refuse besides ---------------------------------------------------------------------------------------------

HARDWARE_LIMITS = (
    between(
        "BS",
        1,
        512,
        PAGE + "x",
        on=ON_A3,
        when="comm_alg != 'fullmesh_v2'",
        says="xDim0(BS) is invalid. Should be between [1, 512]",
    ),
    between("BS", 1, 256, PAGE + "comm_alg", on=ON_A3, when="comm_alg == 'fullmesh_v2'"),
    between("BS", 1, 256, PAGE + "x", on=ON_A2, says="xDim0(BS) is invalid. Should be between [1, 256]"),
    between("H", 1024, 8192, PAGE + "x", on=ON_A3, says="xShape dims1(H) should be in [1024, 8192]"),
    between("H", 1, 7168, PAGE + "x", on=ON_A2, when="algorithm == 'fullmesh'"),
    between("H", 1, 10240, PAGE + "x", on=ON_A2, when="algorithm == 'hierarchy'"),
    holds("H", "H % 32 == 0", "a multiple of 32", PAGE + "x", on=ON_A2),
    between("K", 1, 16, PAGE + "expert_ids", on=HARDWARE, when="comm_alg != 'fullmesh_v2'"),
    between("K", 1, 12, PAGE + "comm_alg", on=ON_A3, when="comm_alg == 'fullmesh_v2'"),
    between("ep_world_size", 2, 768, PAGE + "ep_world_size", on=ON_A3, says="epWorldSize is invalid, only support [2, 768]"),
    one_of(
        "ep_world_size",
        (16, 32, 64, 128, 256),
        PAGE + "ep_world_size (the combine page lists 16, 32, 64 only)",
        on=ON_A2,
        when="algorithm == 'fullmesh'",
    ),
    one_of("ep_world_size", (16, 32, 64), PAGE + "ep_world_size", on=ON_A2, when="algorithm == 'hierarchy'"),
    between("moe_expert_num", 1, 1024, PAGE + "moe_expert_num", on=ON_A3, says="moeExpertNum is invalid, only support (0, 1024]"),
    between("moe_expert_num", 1, 512, PAGE + "moe_expert_num", on=ON_A2),
    between("e", 1, 24, PAGE + "moe_expert_num", on=ON_A2, when="algorithm == 'fullmesh'"),
    between(
        "e * ep_world_size",
        1,
        2048,
        PAGE + "moe_expert_num",
        on=ON_A3,
        says="localMoeExpertNum * epWorldSize must be less than or equal to 2048",
    ),
    between(
        "shared_expert_num", 0, 4, PAGE + "shared_expert_num", on=ON_A3, says="sharedExpertNum is invalid, only support [0, 4]"
    ),
    one_of(
        "shared_expert_num",
        (0, 1),
        PAGE + "shared_expert_num",
        on=HARDWARE,
        when="shared_expert_rank_num == 0",
        says="shared_expert_num and shared_expertrank_num have obvious value situations: …",
    ),
    one_of("shared_expert_rank_num", (0,), PAGE + "shared_expert_rank_num", on=ON_A2),
    one_of("tp_world_size", (0, 1), PAGE + "tp_world_size", on=ON_A2),
    one_of("comm_alg", ("", "fullmesh", "hierarchy"), PAGE + "comm_alg", on=ON_A2),
    holds("elastic_info", "elastic_info is None", "None", COMBINE_PAGE + "elastic_info", on=ON_A2),
    one_of("const_expert_num", (0,), PAGE + "const_expert_num", on=ON_A2),
    one_of("zero_expert_num", (0,), PAGE + "zero_expert_num", on=ON_A2, when="algorithm == 'hierarchy'"),
    one_of("copy_expert_num", (0,), PAGE + "copy_expert_num", on=ON_A2, when="algorithm == 'hierarchy'"),
    holds("x_active_mask", "x_active_mask is None", "None", PAGE + "x_active_mask", on=ON_A2, when="algorithm == 'hierarchy'"),
    holds(
        "x_active_mask",
        "x_active_mask is None",
        "None (ranks have different batch sizes)",
        PAGE + "x_active_mask",
        on=HARDWARE,
        when="global_bs > BS * ep_world_size",
        says="Different bs on different rank cannot work when isActiveMask=true, …",
    ),
    holds("performance_info", "performance_info is None", "None", PAGE + "performance_info", on=ON_A3),
    holds(
        "HCCL_BUFFSIZE",
        "HCCL_BUFFSIZE >= needed_mb_A3",
        "at least {needed_mb_A3} MB (environment variable; the default is 200)",
        PAGE + "HCCL_BUFFSIZE",
        on=ON_A3,
        says="HCCL_BUFFSIZE is too SMALL, … NEEDED_HCCL_BUFFSIZE(…) = …MB, HCCL_BUFFSIZE=…MB.",
    ),
    holds(
        "HCCL_BUFFSIZE",
        "HCCL_BUFFSIZE >= needed_mb_A2",
        "at least {needed_mb_A2} MB (environment variable; the default is 200)",
        PAGE + "HCCL_BUFFSIZE",
        on=ON_A2,
        says="HCCL_BUFFSIZE is too SMALL, … NEEDED_HCCL_BUFFSIZE(…) = …MB, HCCL_BUFFSIZE=…MB.",
    ),
)

RULES: tuple[Rule, ...] = (
    *WORLD_LIMITS,
    *EXPERT_LIMITS,
    *SPECIAL_LIMITS,
    *TENSOR_PARALLEL_LIMITS,
    *SIZE_LIMITS,
    *HARDWARE_LIMITS,
)

AGREE = (
    "ep_world_size",
    "moe_expert_num",
    "tp_world_size",
    "expert_shard_type",
    "shared_expert_num",
    "shared_expert_rank_num",
    "global_bs",
    "BS if global_bs == 0 else None",  # equal batch sizes, unless global_bs says otherwise
    "comm_alg",
    "zero_expert_num",
    "copy_expert_num",
    "const_expert_num",
    "H",
    "K",
)
