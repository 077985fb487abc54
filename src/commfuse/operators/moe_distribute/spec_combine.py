"""npu_moe_distribute_combine_v2 as rows."""

from __future__ import annotations

from ...spec.model import HALF, HARDWARE, ON_A2, ON_A3, ROWS, Attr, Operator, Output, Tensor, at_least, holds, one_of
from . import combine_steps, goldens, rows, values
from .rows import COMBINE_PAGE as PAGE

_SPECIAL_ROWS = "copy_expert_num > 0 or const_expert_num > 0"

_ARGS = (
    Tensor(
        name="expand_x",
        shapes=(("rows", "H"),),
        dtype=ROWS,
        meaning="the experts' output rows, in the order in which dispatch delivered their inputs",
    ),
    Tensor(name="expert_ids", shapes=(("BS", "K"),), dtype=("int32",), meaning="as given to dispatch"),
    Tensor(
        name="assist_info_for_combine",
        shapes=(("assist_length",),),
        dtype=("int32",),
        meaning="as returned by dispatch",
    ),
    Tensor(name="ep_send_counts", shapes=(("counts_length",),), dtype=("int32",), meaning="dispatch's ep_recv_counts"),
    Tensor(
        name="expert_scales",
        shapes=(("BS", "K"),),
        dtype=("float32",),
        meaning="weight of each (token, k) pair; shared experts are not weighted",
    ),
    *rows.DOMAIN,
    Tensor(
        name="tp_send_counts",
        shapes=(("tp_world_size",),),
        dtype=("int32",),
        optional=True,
        when="tp_world_size == 2",
        meaning="dispatch's tp_recv_counts; only looked at when tp_world_size is 2",
    ),
    rows.MASK,
    Tensor(
        name="expand_scales",
        shapes=(("A",),),
        dtype=("float32",),
        optional=True,
        when="product == 'A2' and algorithm == 'hierarchy'",
        meaning="dispatch's expand_scales; nothing here depends on it",
    ),
    Tensor(
        name="shared_expert_x",
        shapes=(("BS", "H"), ("shared_rows_0", "shared_rows_1", "H")),
        dtype=ROWS,
        optional=True,
        meaning="a row per token that is added unweighted (a shared expert computed by the caller)",
    ),
    rows.ELASTIC,
    Tensor(
        name="ori_x",
        shapes=(("BS", "H"),),
        dtype=ROWS,
        optional=True,
        when=_SPECIAL_ROWS,
        meaning="the token rows given to dispatch; needed by copy and constant experts",
    ),
    Tensor(
        name="const_expert_alpha_1",
        shapes=(("const_expert_num",), ("const_expert_num", "H")),
        dtype=ROWS,
        optional=True,
        when="const_expert_num > 0",
        meaning="factor of x, one per constant expert or one per constant expert and column",
    ),
    Tensor(
        name="const_expert_alpha_2",
        shapes=(("const_expert_num",), ("const_expert_num", "H")),
        dtype=ROWS,
        optional=True,
        when="const_expert_num > 0",
        meaning="factor of v, shaped like const_expert_alpha_1",
    ),
    Tensor(
        name="const_expert_v",
        shapes=(("const_expert_num", "H"),),
        dtype=ROWS,
        optional=True,
        when="const_expert_num > 0",
        meaning="the constant row of each constant expert",
    ),
    rows.PERFORMANCE,
    *rows.TENSOR_PARALLEL,
    *rows.SHARED_EXPERTS,
    rows.GLOBAL_BS,
    Attr(
        name="comm_quant_mode",
        schema="int",
        default=0,
        meaning="0: rows travel as they are; 2: as int8 in blocks of 8 columns",
    ),
    rows.COMM_ALG,
    *rows.SPECIAL_EXPERTS,
)


_ALL_FOUR = "oriX、alpha1、alpha2、V must exist when constExpertNum > 0"

_RULES = (
    *rows.RULES,
    one_of(
        "expand_x.dtype",
        HALF,
        PAGE + "expand_x",
        on=HARDWARE,
        says="dtype of expand_x should be BFloat16, Float16 or Int, but got …",
    ),
    at_least(
        "counts_length",
        "ep_world_size * L * copies",
        PAGE + "ep_send_counts",
        says="epSendCount's dim0 not greater than or equal to …",
    ),
    at_least("rows", "A * copies", PAGE + "expand_x", on=HARDWARE),
    at_least(
        "assist_length",
        "A * 128",
        PAGE + "assist_info_for_combine",
        on=ON_A3,
        says="assistInfoForCombine's dim0 < A * 128",
    ),
    at_least("assist_length", "BS * K", PAGE + "assist_info_for_combine", on=ON_A2),
    holds(
        "tp_send_counts",
        "tp_send_counts is not None",
        "given",
        PAGE + "tp_send_counts",
        when="tp_world_size == 2",
        says="tpSendCount's dim0 not equal to tpWorldSize",
    ),
    holds(
        "shared_expert_x",
        "shared_expert_x is None",
        "None (shared experts have ranks of their own)",
        PAGE + "shared_expert_x",
        when="shared_expert_rank_num > 0",
        says="sharedExpertX only support input None when sharedExpertRankNum is non-zero.",
    ),
    holds(
        "shared_expert_x.dtype",
        "shared_expert_x.dtype == expand_x.dtype",
        "expand_x.dtype = {expand_x.dtype}",
        PAGE + "shared_expert_x",
        when="shared_expert_x is not None",
    ),
    holds(
        "shared_rows_0 * shared_rows_1",
        "shared_rows_0 * shared_rows_1 == BS",
        "BS = {BS}",
        PAGE + "shared_expert_x",
        when="shared_expert_x is not None and shared_expert_x.ndim == 3",
        says="… dim0 * … dim1 not equal to bs",
    ),
    holds(
        "ori_x",
        "ori_x is not None",
        "given",
        PAGE + "ori_x",
        when="copy_expert_num > 0",
        says="oriX must exist when copyExpertNum > 0",
    ),
    holds("ori_x", "ori_x is not None", "given", PAGE + "ori_x", when="const_expert_num > 0", says=_ALL_FOUR),
    *(
        holds(name, f"{name} is not None", "given", PAGE + name, when="const_expert_num > 0", says=_ALL_FOUR)
        for name in ("const_expert_alpha_1", "const_expert_alpha_2", "const_expert_v")
    ),
    *(
        holds(
            f"{name}.dtype",
            f"{name}.dtype == expand_x.dtype",
            "expand_x.dtype = {expand_x.dtype}",
            PAGE + name,
            when=f"{name} is not None and ({when})",
        )
        for name, when in (
            ("ori_x", _SPECIAL_ROWS),
            ("const_expert_alpha_1", "const_expert_num > 0"),
            ("const_expert_alpha_2", "const_expert_num > 0"),
            ("const_expert_v", "const_expert_num > 0"),
        )
    ),
    holds(
        "const_expert_alpha_2.ndim",
        "const_expert_alpha_2.ndim == const_expert_alpha_1.ndim",
        "const_expert_alpha_1.ndim = {const_expert_alpha_1.ndim}",
        PAGE + "const_expert_alpha_2",
        when="const_expert_num > 0",
    ),
    one_of(
        "comm_quant_mode",
        (0, 2),
        PAGE + "comm_quant_mode",
        says="commQuantMode only support 0(default) or 2(int8 comm quant)",
    ),
    one_of(
        "comm_quant_mode",
        (0,),
        PAGE + "comm_quant_mode",
        when="tp_world_size == 2",
        says="commQuantMode only supports 0 when tpWorldSize > 1",
    ),
    one_of("comm_quant_mode", (0,), PAGE + "comm_quant_mode", on=ON_A2, when="algorithm == 'fullmesh'"),
    one_of("comm_alg", ("",), PAGE + "comm_alg", on=ON_A3),
    *(
        holds(name, f"{name} is None", "None", PAGE + name, on=ON_A2)
        for name in ("shared_expert_x", "ori_x", "const_expert_alpha_1", "const_expert_alpha_2", "const_expert_v")
    ),
    holds(
        "expand_scales",
        "expand_scales is not None",
        "given",
        PAGE + "expand_scales",
        on=ON_A2,
        when="algorithm == 'hierarchy'",
    ),
)

COMBINE_V2 = Operator(
    name="npu_moe_distribute_combine_v2",
    summary="return the experts' rows to the tokens' ranks and sum them, weighted, in the order of k",
    args=_ARGS,
    first_keyword="tp_send_counts",
    symbols=rows.SYMBOLS,
    rules=_RULES,
    outputs=(
        Output(
            name="x",
            shape=("BS", "H"),
            dtype="expand_x.dtype",
            meaning="the sum of each token's expert rows; zeros for tokens that take no part",
        ),
    ),
    group="group_ep",
    agree=(*rows.AGREE, "comm_quant_mode", "expand_x.dtype"),
    world_size="ep_world_size",
    rank="ep_rank_id",
    partner_group="group_tp",
    partner_when="tp_world_size == 2",
    values=values.combine,
    alive=values.alive,
    steps=combine_steps.combine,
    golden=goldens.combine_v2,
)
