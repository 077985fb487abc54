"""The split path as rows: dispatch and combine, each as a setup that posts and a teardown that finishes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ...spec.model import (
    HALF,
    HARDWARE,
    ON_A2,
    ON_A3,
    ROWS,
    Attr,
    Operator,
    Output,
    Rule,
    Symbol,
    Tensor,
    at_least,
    between,
    holds,
    one_of,
)
from . import flights, goldens, rows, split_steps, values

PAGE = "npu_moe_distribute_combine_setup page, "

_COMM = (
    Attr(name="comm_type", schema="int", default=0, meaning="0, 1 or 2: the way of moving on a device; the result is the same"),
    Attr(name="comm_alg", schema="str", default="", meaning='""'),
)
_QUANT = Attr(name="quant_mode", schema="int", default=0, meaning="0: rows as they are; 2: int8 rows with one scale per row")
_COMM_QUANT = Attr(name="comm_quant_mode", schema="int", default=0, meaning="0: rows travel as they are")
_IDS = Tensor(
    name="expert_ids",
    shapes=(("BS", "K"),),
    dtype=("int32",),
    meaning="the experts of each token, distinct within a row, 0..M-1; ids of tokens that take no part may be anything",
)
_IDS_AGAIN = replace(_IDS, meaning="as given to dispatch_setup")


def _command(length: str) -> Tensor:
    return Tensor(
        name="comm_cmd_info",
        shapes=((length,),),
        dtype=("int32",),
        meaning="as returned by the setup: which operation this finishes",
    )


_MASK = Tensor(
    name="x_active_mask",
    shapes=(("BS",),),
    dtype=("bool",),
    optional=True,
    meaning="the first sum(mask) tokens take part; others are never read",
)

_ABSENT = ("elastic_info", "performance_info", "tp_world_size", "tp_rank_id", *rows.SPECIAL_NAMES)
_AS_IN_V2 = ("E_s", "e", "g", "gbs", "max_bs", "A_moe", "A_shared", "copies", "all_experts")
_SYMBOLS = (
    *rows.without(*_ABSENT, "expert_scales"),
    *(symbol for symbol in rows.SYMBOLS if symbol.name in _AS_IN_V2),
    Symbol(
        name="A",
        formula="A_shared if ep_rank_id < shared_expert_rank_num else A_moe",
        meaning="rows this rank may receive",
    ),
    Symbol(name="L", formula="1 if ep_rank_id < shared_expert_rank_num else e", meaning="experts of this rank"),
    Symbol(name="layout", formula="'index'", meaning="content of expand_idx"),
    Symbol(name="split_shared", formula="False", meaning="whether a rank's tokens are shared out over the shared-expert ranks"),
    Symbol(
        name="window_bytes",
        formula="2 * (e * max_bs * ep_world_size * align(512, align(32, 2 * H) + 44)"
        " + (K + shared_expert_num) * max_bs * align(512, 2 * H))",
        meaning="bytes of communication buffer that A3 checks for",
    ),
    Symbol(name="needed_mb_A3", formula="max(2, ceil_div(window_bytes, 2**20))", meaning="the same in MB"),
)

_LIMITS: tuple[Rule, ...] = (
    *rows.WORLD_LIMITS,
    *rows.EXPERT_LIMITS,
    *(rule for rule in rows.SIZE_LIMITS if rule.subject != "comm_alg"),
    one_of("comm_alg", ("",), PAGE + "comm_alg"),
    one_of("comm_type", (0, 1, 2), PAGE + "comm_type"),
    holds("product", "False", "A3: A2 does not have this operator", PAGE + "products", on=ON_A2),
    between("ep_world_size", 2, 384, PAGE + "ep_world_size", on=ON_A3),
    between("moe_expert_num", 1, 512, PAGE + "moe_expert_num", on=ON_A3),
    between("shared_expert_num", 0, 4, PAGE + "shared_expert_num", on=ON_A3),
    between(
        "shared_expert_rank_num",
        0,
        "ep_world_size // 2",
        PAGE + "shared_expert_rank_num",
        on=ON_A3,
        says="shared_expert_rank_num should be in [0, ep_world_size / 2], …",
    ),
    between("H", 1024, 8192, PAGE + "expand_x", on=ON_A3),
    between("BS", 1, 512, PAGE + "expert_ids", on=ON_A3),
    between("K", 1, 16, PAGE + "expert_ids", on=ON_A3),
    holds(
        "global_bs",
        "global_bs <= 512 * ep_world_size",
        "at most 512 * ep_world_size = {512 * ep_world_size}",
        PAGE + "global_bs",
        on=ON_A3,
    ),
    one_of("comm_type", (0,), PAGE + "comm_type", on=ON_A3),
    holds(
        "HCCL_BUFFSIZE",
        "HCCL_BUFFSIZE >= needed_mb_A3",
        "at least {needed_mb_A3} MB (environment variable; the default is 200)",
        PAGE + "HCCL_BUFFSIZE",
        on=ON_A3,
    ),
)

_AGREE = (
    "ep_world_size",
    "moe_expert_num",
    "expert_shard_type",
    "shared_expert_num",
    "shared_expert_rank_num",
    "global_bs",
    "BS if global_bs == 0 else None",
    "comm_type",
    "comm_alg",
    "H",
    "K",
)


def _operator(name: str, summary: str, **more: Any) -> Operator:
    symbols = (*_SYMBOLS, *rows.without(*more.pop("absent")))
    return Operator(
        name=name,
        summary=summary,
        symbols=(*more.pop("symbols", ()), *symbols),
        rules=(*_LIMITS, *more.pop("rules")),
        group="group_ep",
        world_size="ep_world_size",
        rank="ep_rank_id",
        **more,
    )


_X_HALF = one_of("x.dtype", HALF, PAGE + "x", on=HARDWARE)
_QUANT_MODE = one_of("quant_mode", (0, 2), PAGE + "quant_mode")
_COMM_QUANT_MODE = one_of("comm_quant_mode", (0,), PAGE + "comm_quant_mode")
_Y_WIDTH = Symbol(
    name="y_width",
    formula="align(256, H) if quant_mode == 0 else align(512, align(32, H) + 4)",
    meaning="entries of a row of y",
)
_Y_ROWS = "BS * (K + shared_expert_num)"
_DISPATCH_COMMAND = f"({_Y_ROWS} + ep_world_size * L) * 16"
_COMBINE_COMMAND = "(rows + ep_world_size) * 16"

DISPATCH_SETUP = _operator(
    "npu_moe_distribute_dispatch_setup",
    "the posting half of dispatch: offer every token's row to the ranks of its experts, and return at once",
    args=(
        Tensor(name="x", shapes=(("BS", "H"),), dtype=ROWS, meaning="the token rows of this rank"),
        _IDS,
        *rows.DOMAIN,
        Tensor(
            name="scales",
            shapes=(("scale_rows", "H"),),
            dtype=("float32",),
            optional=True,
            meaning="smooth factors: a row per MoE expert, optionally preceded by one per shared expert",
        ),
        _MASK,
        *rows.SHARED_EXPERTS,
        _QUANT,
        rows.GLOBAL_BS,
        *_COMM,
        Attr(name="y_dtype", schema="int?", default=None, meaning="newer products only; None"),
    ),
    first_keyword="scales",
    absent=("expand_scales",),
    symbols=(_Y_WIDTH,),
    rules=(
        _X_HALF,
        _QUANT_MODE,
        holds("scales", "scales is None", "None (smooth factors go with quant_mode 2)", PAGE + "scales", when="quant_mode == 0"),
        holds(
            "scale_rows",
            "scale_rows - moe_expert_num in (0, shared_expert_num)",
            "moe_expert_num, or shared_expert_num + moe_expert_num = {moe_expert_num} or {shared_expert_num + moe_expert_num}",
            PAGE + "scales",
            when="scales is not None",
        ),
        holds("y_dtype", "y_dtype is None", "None", PAGE + "y_dtype"),
    ),
    outputs=(
        Output(
            name="y",
            shape=(_Y_ROWS, "y_width"),
            dtype="x.dtype if quant_mode == 0 else 'int8'",
            meaning="the rows sent, pair f at row f; to be handed to the teardown unread",
        ),
        Output(
            name="expand_idx",
            shape=("BS * K",),
            dtype="'int32'",
            meaning="for each pair, how many earlier pairs of this rank have the same expert",
        ),
        Output(
            name="comm_cmd_info",
            shape=(_DISPATCH_COMMAND,),
            dtype="'int32'",
            meaning="which operation this is; to be handed to the teardown",
        ),
    ),
    agree=(*_AGREE, "quant_mode", "x.dtype", "scales is not None"),
    phase="setup",
    values=flights.setup_values(values.dispatch),
    steps=split_steps.dispatch_setup,
    golden=goldens.nothing,
)

DISPATCH_TEARDOWN = _operator(
    "npu_moe_distribute_dispatch_teardown",
    "the finishing half of dispatch: wait for the rows and group them by expert",
    args=(
        Tensor(name="x", shapes=(("BS", "H"),), dtype=ROWS, meaning="as given to the setup"),
        Tensor(name="y", shapes=((_Y_ROWS, "y_width"),), dtype=(*ROWS, "int8"), meaning="as returned by the setup"),
        _IDS_AGAIN,
        _command(_DISPATCH_COMMAND),
        *rows.DOMAIN,
        *rows.SHARED_EXPERTS,
        _QUANT,
        rows.GLOBAL_BS,
        Attr(name="expert_token_nums_type", schema="int", default=1, meaning="1: counts; 0: inclusive prefix sums"),
        *_COMM,
    ),
    first_keyword="expert_shard_type",
    absent=("x_active_mask", "scales"),
    symbols=(_Y_WIDTH,),
    rules=(
        _X_HALF,
        _QUANT_MODE,
        one_of("expert_token_nums_type", (0, 1), PAGE + "expert_token_nums_type"),
        holds(
            "y.dtype",
            "y.dtype == (x.dtype if quant_mode == 0 else 'int8')",
            "x.dtype = {x.dtype} with quant_mode 0, int8 with quant_mode 2",
            PAGE + "y",
        ),
    ),
    outputs=(
        Output(
            name="expand_x",
            shape=("A", "H"),
            dtype="x.dtype if quant_mode == 0 else 'int8'",
            meaning="received rows, by local expert, then source rank, then token; the rest is unspecified",
        ),
        Output(
            name="dynamic_scales",
            shape=("A",),
            dtype="'float32'",
            meaning="factor that turns row i back; unspecified with quant_mode 0",
        ),
        Output(
            name="assist_info_for_combine",
            shape=("A * 128",),
            dtype="'int32'",
            meaning="begins with the inclusive prefix sum of rows over (local expert, source rank); hand it on unread",
        ),
        Output(
            name="expert_token_nums",
            shape=("L",),
            dtype="'int64'",
            meaning="rows per local expert: counts or inclusive prefix sums",
        ),
    ),
    agree=(),
    phase="teardown",
    values=flights.teardown_values(lambda call: []),
    steps=split_steps.dispatch_teardown,
    golden=goldens.split_dispatch,
    golden_args=flights.both_halves,
)

_EXPAND_X = Tensor(
    name="expand_x", shapes=(("rows", "H"),), dtype=ROWS, meaning="the experts' output rows, in the order of the inputs"
)
_EXPAND_HALF = one_of("expand_x.dtype", HALF, PAGE + "expand_x", on=HARDWARE)
_QUANT_WIDTH = "align(512, align(32, H) + align(8, H) // 8 * 4)"

COMBINE_SETUP = _operator(
    "npu_moe_distribute_combine_setup",
    "the posting half of combine: offer the experts' rows to the tokens' ranks, and return at once",
    args=(
        _EXPAND_X,
        _IDS_AGAIN,
        Tensor(
            name="assist_info_for_combine",
            shapes=(("counts_length",),),
            dtype=("int32",),
            meaning="as returned by dispatch_teardown; its first W * L entries are read",
        ),
        *rows.DOMAIN,
        *rows.SHARED_EXPERTS,
        rows.GLOBAL_BS,
        _COMM_QUANT,
        *_COMM,
    ),
    first_keyword="",  # the published page has no keyword-only mark, the schema has one: both ways are taken
    absent=("x_active_mask",),
    rules=(
        _EXPAND_HALF,
        _COMM_QUANT_MODE,
        at_least("counts_length", "ep_world_size * L", PAGE + "assist_info_for_combine", when="A > 0"),
        holds(
            "rows",
            "rows == A if ep_rank_id < shared_expert_rank_num else rows >= A",
            "A = {A} on a shared-expert rank, at least A = {A} on a MoE rank",
            PAGE + "expand_x",
            on=ON_A3,
        ),
    ),
    outputs=(
        Output(name="quant_expand_x", shape=("rows", _QUANT_WIDTH), dtype="'int8'", meaning="a placeholder for the teardown"),
        Output(
            name="comm_cmd_info",
            shape=(_COMBINE_COMMAND,),
            dtype="'int32'",
            meaning="which operation this is; to be handed to the teardown",
        ),
    ),
    agree=(*_AGREE, "comm_quant_mode", "expand_x.dtype"),
    phase="setup",
    values=flights.setup_values(values.held_counts),
    steps=split_steps.combine_setup,
    golden=goldens.nothing,
)

COMBINE_TEARDOWN = _operator(
    "npu_moe_distribute_combine_teardown",
    "the finishing half of combine: wait for the experts' rows and sum them, weighted, in the order of k",
    args=(
        _EXPAND_X,
        Tensor(
            name="quant_expand_x",
            shapes=(("rows", _QUANT_WIDTH),),
            dtype=("int8",),
            meaning="as returned by the setup",
        ),
        _IDS_AGAIN,
        Tensor(name="expand_idx", shapes=(("BS * K",),), dtype=("int32",), meaning="as returned by dispatch_setup"),
        Tensor(
            name="expert_scales",
            shapes=(("BS", "K"), ("BS * K",)),
            dtype=("float32",),
            meaning="weight of each (token, k) pair; shared experts are not weighted",
        ),
        _command(_COMBINE_COMMAND),
        *rows.DOMAIN,
        _MASK,
        Tensor(
            name="shared_expert_x",
            shapes=(("BS", "H"), ("shared_rows_0", "shared_rows_1", "H")),
            dtype=ROWS,
            optional=True,
            meaning="a row per token that is added unweighted",
        ),
        *rows.SHARED_EXPERTS,
        rows.GLOBAL_BS,
        _COMM_QUANT,
        *_COMM,
    ),
    first_keyword="x_active_mask",
    absent=("ori_x", "scales"),
    rules=(
        _EXPAND_HALF,
        _COMM_QUANT_MODE,
        holds(
            "shared_expert_x",
            "shared_expert_x is None",
            "None (shared experts have ranks of their own)",
            PAGE + "shared_expert_x",
            when="shared_expert_rank_num > 0",
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
        ),
        holds(
            "shared_expert_num",
            "shared_expert_num == 0",
            "0",
            PAGE + "shared_expert_x",
            on=ON_A3,
            when="shared_expert_x is not None",
        ),
    ),
    outputs=(
        Output(
            name="x",
            shape=("BS", "H"),
            dtype="expand_x.dtype",
            meaning="the sum of each token's expert rows; zeros for tokens that take no part",
        ),
    ),
    agree=(),
    phase="teardown",
    values=flights.teardown_values(values.combine_own_tokens),
    steps=split_steps.combine_teardown,
    golden=goldens.split_combine,
    golden_args=flights.both_halves,
)
