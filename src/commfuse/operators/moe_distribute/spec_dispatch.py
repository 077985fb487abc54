"""npu_moe_distribute_dispatch_v2 as rows."""

from __future__ import annotations

from ...spec.model import (
    HALF,
    HARDWARE,
    ON_A2,
    ON_A3,
    ROWS,
    Attr,
    Operator,
    Output,
    Symbol,
    Tensor,
    holds,
    one_of,
)
from . import dispatch_steps, goldens, rows, values
from .rows import PAGE

_ARGS = (
    Tensor(name="x", shapes=(("BS", "H"),), dtype=ROWS, meaning="the token rows of this rank"),
    Tensor(
        name="expert_ids",
        shapes=(("BS", "K"),),
        dtype=("int32",),
        meaning="the experts of each token, distinct within a row, 0..M+Z+C+N-1; inactive pairs may hold anything",
    ),
    *rows.DOMAIN,
    Tensor(
        name="scales",
        shapes=(("E_s + moe_expert_num", "H"),),
        dtype=("float32",),
        optional=True,
        meaning="smooth-quantisation factors: one row per shared expert, then one per MoE expert",
    ),
    rows.MASK,
    Tensor(
        name="expert_scales",
        shapes=(("BS", "K"),),
        dtype=("float32",),
        optional=True,
        meaning="weights of the pairs; they travel with the rows into expand_scales",
    ),
    rows.ELASTIC,
    rows.PERFORMANCE,
    *rows.TENSOR_PARALLEL,
    *rows.SHARED_EXPERTS,
    Attr(name="quant_mode", schema="int", default=0, meaning="0: rows as they are; 2: int8 rows with one scale per row"),
    rows.GLOBAL_BS,
    Attr(
        name="expert_token_nums_type",
        schema="int",
        default=1,
        meaning="1: expert_token_nums holds counts; 0: inclusive prefix sums",
    ),
    rows.COMM_ALG,
    *rows.SPECIAL_EXPERTS,
    Attr(name="y_dtype", schema="int?", default=None, meaning="newer products only; None"),
    Attr(name="x_dtype", schema="int?", default=None, meaning="newer products only; None"),
    Attr(name="scales_dtype", schema="int?", default=None, meaning="newer products only; None"),
)

_NEWER = "op-plugin schema: newer products than A2 and A3"

_RULES = (
    *rows.RULES,
    one_of("x.dtype", HALF, PAGE + "x", on=HARDWARE, says="x dataType is invalid, dataType should be bf16 or float16"),
    one_of("quant_mode", (0, 2), PAGE + "quant_mode", says="cannot support static quant now."),
    holds(
        "scales",
        "scales is None",
        "None (smooth factors go with quant_mode 2)",
        PAGE + "scales",
        when="quant_mode == 0",
        says="quant mode and scales not match, isScales is …, quantMode is …",
    ),
    holds("scales", "scales is None or scales.contiguous", "contiguous", PAGE + "scales", on=HARDWARE),
    holds("scales", "scales is None", "None", PAGE + "comm_alg", on=ON_A2, when="algorithm == 'hierarchy'"),
    one_of(
        "expert_token_nums_type",
        (0, 1),
        PAGE + "expert_token_nums_type",
        says="The expert_token_nums_type should be 0 or 1.",
    ),
    holds(
        "expert_scales",
        "expert_scales is not None",
        "given",
        PAGE + "expert_scales",
        on=ON_A2,
        when="algorithm == 'hierarchy'",
    ),
    one_of("comm_alg", ("", "fullmesh_v1", "fullmesh_v2"), PAGE + "comm_alg", on=ON_A3),
    one_of("tp_world_size", (0, 1), PAGE + "comm_alg", on=ON_A3, when="comm_alg == 'fullmesh_v2'"),
    holds("x_active_mask", "x_active_mask is None", "None", PAGE + "comm_alg", on=ON_A3, when="comm_alg == 'fullmesh_v2'"),
    holds(
        "zero_expert_num + copy_expert_num + const_expert_num",
        "zero_expert_num + copy_expert_num + const_expert_num == 0",
        "0",
        PAGE + "comm_alg",
        on=ON_A3,
        when="comm_alg == 'fullmesh_v2'",
    ),
    holds(
        "global_bs",
        "global_bs in (0, BS * ep_world_size)",
        "0 or BS * ep_world_size = {BS * ep_world_size} (equal batch sizes)",
        PAGE + "comm_alg",
        on=ON_A3,
        when="comm_alg == 'fullmesh_v2'",
    ),
    holds("y_dtype", "y_dtype is None", "None", _NEWER),
    holds("x_dtype", "x_dtype is None", "None", _NEWER),
    holds("scales_dtype", "scales_dtype is None", "None", _NEWER),
)

_SYMBOLS = (
    *rows.SYMBOLS,
    Symbol(
        name="hierarchy_counts",
        formula="2 * gbs * K * (ep_world_size // 8) if expert_scales is not None else 0",
        meaning="entries after the prefix sums that some products use",
    ),
)

_OUTPUTS = (
    Output(
        name="expand_x",
        shape=("A * copies", "H"),
        dtype="x.dtype if quant_mode == 0 else 'int8'",
        meaning="received rows, by local expert, then source rank, then token; the rest is unspecified",
    ),
    Output(
        name="dynamic_scales",
        shape=("A * copies",),
        dtype="'float32'",
        meaning="factor that turns row i back: x ≈ expand_x[i] * dynamic_scales[i]; unspecified with quant_mode 0",
    ),
    Output(
        name="assist_info_for_combine",
        shape=("max(BS * K, A * 128)",),
        dtype="'int32'",
        meaning="(source rank, token, slot) of row i at 3i..3i+2; slot is k, or K+s for shared expert s. Hand it on unread",
    ),
    Output(
        name="expert_token_nums",
        shape=("L",),
        dtype="'int64'",
        meaning="rows per local expert: counts or inclusive prefix sums (expert_token_nums_type)",
    ),
    Output(
        name="ep_recv_counts",
        shape=("ep_world_size * L * copies + hierarchy_counts",),
        dtype="'int32'",
        meaning="inclusive prefix sum of rows over (local expert, source rank)",
    ),
    Output(
        name="tp_recv_counts",
        shape=("tp_world_size",),
        dtype="'int32'",
        meaning="with tensor parallelism: own rows at tp_rank_id, the partner's at the other place",
    ),
    Output(
        name="expand_scales",
        shape=("A",),
        dtype="'float32'",
        meaning="expert_scales of row i, if expert_scales was given; otherwise unspecified",
    ),
)

DISPATCH_V2 = Operator(
    name="npu_moe_distribute_dispatch_v2",
    summary="send every token's row to the ranks that hold its experts, and group what arrives by expert",
    args=_ARGS,
    first_keyword="scales",
    symbols=_SYMBOLS,
    rules=_RULES,
    outputs=_OUTPUTS,
    group="group_ep",
    agree=(*rows.AGREE, "quant_mode", "x.dtype", "scales is not None", "expert_scales is not None"),
    world_size="ep_world_size",
    rank="ep_rank_id",
    partner_group="group_tp",
    partner_when="tp_world_size == 2",
    values=values.dispatch,
    alive=values.alive,
    steps=dispatch_steps.dispatch,
    golden=goldens.dispatch_v2,
)
