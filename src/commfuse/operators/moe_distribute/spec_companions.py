"""The operators before v2, and combine with residual and RMS norm, as rows."""

from __future__ import annotations

from dataclasses import replace

from ...config import A3, PORTABLE
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
    between,
    holds,
    one_of,
)
from . import combine_steps, dispatch_steps, goldens, rows
from .spec_combine import COMBINE_V2
from .spec_dispatch import DISPATCH_V2

_PAGE = "npu_moe_distribute_dispatch page, "
_COMBINE_PAGE = "npu_moe_distribute_combine page, "
_NORM_PAGE = "npu_moe_distribute_combine_add_rms_norm page, "

_INDEX = Tensor(
    name="expand_idx",
    shapes=(("BS * K",),),
    dtype=("int32",),
    meaning="as returned by dispatch: how many earlier pairs of this rank have the same expert",
)


def _rows(operator: Operator, *names: str) -> tuple[Tensor | Attr, ...]:
    """The arguments ``names`` as ``operator`` has them."""
    by_name = {row.name: row for row in operator.args}
    return tuple(by_name[name] for name in names)


def _reserved(name: str) -> Tensor:
    return Tensor(name=name, shapes=((),), dtype=("float32",), optional=True, when="False", meaning="reserved; None")


_NOT_NEEDED = replace(_reserved("expand_scales"), meaning="dispatch's expand_scales; nothing here depends on it")


def _unused(page: str, *names: str) -> tuple[Rule, ...]:
    return tuple(holds(name, f"{name} is None", "None", page + name) for name in names)


_DOMAIN = ("group_ep", "ep_world_size", "ep_rank_id", "moe_expert_num")
_TENSOR_PARALLEL = ("group_tp", "tp_world_size", "tp_rank_id")
_SHARED = ("expert_shard_type", "shared_expert_num", "shared_expert_rank_num")
_OUT_DTYPE = Attr(name="out_dtype", schema="int", default=0, meaning="reserved; 0")
_LIST_TYPE = Attr(name="group_list_type", schema="int", default=0, meaning="reserved; 0")

_V1_SYMBOLS = (
    *rows.without("elastic_info", "performance_info", "comm_alg", *rows.SPECIAL_NAMES),
    *(symbol for symbol in rows.SYMBOLS if symbol.name not in ("layout", "split_shared")),
    Symbol(name="layout", formula="'index'", meaning="content of expand_idx"),
    Symbol(name="split_shared", formula="True", meaning="a rank's tokens are shared out over all shared-expert ranks"),
)


def _v1_limits(page: str) -> tuple[Rule, ...]:
    return (
        *rows.WORLD_LIMITS,
        *rows.EXPERT_LIMITS,
        *(rule for rule in rows.TENSOR_PARALLEL_LIMITS if rule.subject != "elastic_info"),
        *(rule for rule in rows.SIZE_LIMITS if rule.subject != "comm_alg"),
        one_of("shared_expert_num", (1,), page + "shared_expert_num", when="shared_expert_rank_num > 0"),
        holds(
            "ep_world_size",
            "ep_world_size % shared_expert_rank_num == 0",
            "divisible by shared_expert_rank_num = {shared_expert_rank_num}",
            page + "shared_expert_rank_num",
            when="shared_expert_rank_num > 0",
        ),
        holds(
            "x_active_mask",
            "x_active_mask is None",
            "None with shared-expert ranks",
            page + "x_active_mask",
            when="shared_expert_rank_num > 0",
        ),
        holds("x_active_mask", "x_active_mask is None", "None", page + "x_active_mask", on=HARDWARE),
        one_of("H", (7168,), page + "x", on=ON_A3),
        between("BS", 1, 512, page + "x", on=ON_A3),
        between("K", 1, 8, page + "expert_ids", on=ON_A3),
        *(
            rule
            for rule in rows.HARDWARE_LIMITS
            if rule.subject in ("ep_world_size", "moe_expert_num", "e", "e * ep_world_size", "HCCL_BUFFSIZE")
            or (rule.on == ON_A2 and rule.subject in ("BS", "H", "K", "shared_expert_rank_num", "tp_world_size"))
        ),
    )


_QUANT_RULES = tuple(rule for rule in DISPATCH_V2.rules if rule.subject in ("quant_mode", "scales", "expert_token_nums_type"))

DISPATCH = replace(
    DISPATCH_V2,
    name="npu_moe_distribute_dispatch",
    summary="dispatch before v2: expand_idx in place of assist_info_for_combine, no special experts, no shrinking",
    args=_rows(
        DISPATCH_V2,
        "x",
        "expert_ids",
        *_DOMAIN,
        "scales",
        "x_active_mask",
        "expert_scales",
        *_TENSOR_PARALLEL,
        *_SHARED,
        "quant_mode",
        "global_bs",
        "expert_token_nums_type",
    ),
    symbols=(*_V1_SYMBOLS, *(s for s in DISPATCH_V2.symbols if s.name == "hierarchy_counts")),
    rules=(*_v1_limits(_PAGE), one_of("x.dtype", HALF, _PAGE + "x", on=HARDWARE), *_QUANT_RULES),
    outputs=tuple(
        Output(
            name="expand_idx",
            shape=("BS * K",),
            dtype="'int32'",
            meaning=_INDEX.meaning.removeprefix("as returned by dispatch: "),
        )
        if row.name == "assist_info_for_combine"
        else row
        for row in DISPATCH_V2.outputs
    ),
    agree=(
        *(name for name in rows.AGREE if name not in ("comm_alg", *rows.SPECIAL_NAMES)),
        "quant_mode",
        "x.dtype",
        "scales is not None",
        "expert_scales is not None",
    ),
    steps=dispatch_steps.dispatch,
    golden=goldens.dispatch,
)

COMBINE = replace(
    COMBINE_V2,
    name="npu_moe_distribute_combine",
    summary="combine before v2: takes expand_idx, no special experts, no shrinking",
    args=(
        *_rows(COMBINE_V2, "expand_x", "expert_ids"),
        _INDEX,
        *_rows(COMBINE_V2, "ep_send_counts", "expert_scales", *_DOMAIN, "tp_send_counts", "x_active_mask"),
        _reserved("activation_scale"),
        _reserved("weight_scale"),
        _reserved("group_list"),
        *_rows(COMBINE_V2, "expand_scales"),
        _reserved("shared_expert_x"),
        *_rows(COMBINE_V2, *_TENSOR_PARALLEL, *_SHARED, "global_bs"),
        _OUT_DTYPE,
        *_rows(COMBINE_V2, "comm_quant_mode"),
        _LIST_TYPE,
    ),
    symbols=(*rows.without("scales", "ori_x", *rows.SPECIAL_INPUTS), *_V1_SYMBOLS),
    rules=(
        *_v1_limits(_COMBINE_PAGE),
        *_unused(_COMBINE_PAGE, "activation_scale", "weight_scale", "group_list"),
        holds(
            "shared_expert_x",
            "shared_expert_x is None",
            "None: the real operator accepts it and drops it; npu_moe_distribute_combine_v2 adds it",
            _COMBINE_PAGE + "shared_expert_x",
        ),
        one_of("out_dtype", (0,), _COMBINE_PAGE + "out_dtype"),
        one_of("group_list_type", (0,), _COMBINE_PAGE + "group_list_type"),
        *(
            rule
            for rule in COMBINE_V2.rules
            if rule.subject in ("expand_x.dtype", "counts_length", "rows", "tp_send_counts", "comm_quant_mode")
        ),
    ),
    agree=(
        *(name for name in rows.AGREE if name not in ("comm_alg", *rows.SPECIAL_NAMES)),
        "comm_quant_mode",
        "expand_x.dtype",
    ),
    steps=combine_steps.combine,
    golden=goldens.combine,
)

_NORM_A3 = (
    "H",
    "BS",
    "ep_world_size",
    "moe_expert_num",
    "e * ep_world_size",
    "HCCL_BUFFSIZE",
    "x_active_mask",
    "rows",
    "assist_length",
)


def _on_every_product_or_a3(rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """Of combine v2's rules those that this operator shares: A2 does not have it, and on A3 its arguments are narrower."""
    return (
        *(rule for rule in rules if PORTABLE in rule.on),
        *(
            replace(rule, on=ON_A3, when="True" if rule.subject == "BS" else rule.when)
            for rule in rules
            if PORTABLE not in rule.on and A3 in rule.on and rule.subject in _NORM_A3 and "== 'fullmesh_v2'" not in rule.when
        ),
    )


COMBINE_ADD_RMS_NORM = replace(
    COMBINE_V2,
    name="npu_moe_distribute_combine_add_rms_norm",
    summary="combine v2, then add the residual and apply RMS norm",
    args=(
        *_rows(COMBINE_V2, "expand_x", "expert_ids"),
        Tensor(
            name="expand_idx",
            shapes=(("assist_length",),),
            dtype=("int32",),
            meaning="dispatch_v2's assist_info_for_combine",
        ),
        *_rows(COMBINE_V2, "ep_send_counts", "expert_scales"),
        Tensor(name="residual_x", shapes=(("BS", "1", "H"),), dtype=ROWS, meaning="added to the sums before the norm"),
        Tensor(name="gamma", shapes=(("H",),), dtype=ROWS, meaning="weight of the norm"),
        *_rows(COMBINE_V2, *_DOMAIN, "tp_send_counts", "x_active_mask"),
        _reserved("activation_scale"),
        _reserved("weight_scale"),
        _reserved("group_list"),
        _NOT_NEEDED,
        *_rows(
            COMBINE_V2,
            "shared_expert_x",
            "elastic_info",
            *rows.SPECIAL_INPUTS,
            *_TENSOR_PARALLEL,
            *_SHARED,
            "global_bs",
        ),
        _OUT_DTYPE,
        *_rows(COMBINE_V2, "comm_quant_mode"),
        _LIST_TYPE,
        *_rows(COMBINE_V2, "comm_alg"),
        Attr(name="norm_eps", schema="float", default=1e-6, meaning="added to the mean of squares"),
        *_rows(COMBINE_V2, *rows.SPECIAL_NAMES),
    ),
    symbols=(*rows.without("performance_info", "scales"), *rows.SYMBOLS),
    rules=(
        *_on_every_product_or_a3(COMBINE_V2.rules),
        *_unused(_NORM_PAGE, "activation_scale", "weight_scale", "group_list"),
        one_of("out_dtype", (0,), _NORM_PAGE + "out_dtype"),
        one_of("group_list_type", (0,), _NORM_PAGE + "group_list_type"),
        holds(
            "residual_x.dtype",
            "residual_x.dtype == expand_x.dtype",
            "expand_x.dtype = {expand_x.dtype}",
            _NORM_PAGE + "residual_x",
        ),
        holds("gamma.dtype", "gamma.dtype == expand_x.dtype", "expand_x.dtype = {expand_x.dtype}", _NORM_PAGE + "gamma"),
        holds("norm_eps", "norm_eps >= 0", "at least 0", _NORM_PAGE + "norm_eps"),
        holds("product", "False", "A3: A2 does not have this operator", _NORM_PAGE + "products", on=ON_A2),
        one_of("expand_x.dtype", ("bfloat16",), _NORM_PAGE + "expand_x", on=ON_A3),
        between("K", 1, 8, _NORM_PAGE + "expert_ids", on=ON_A3),
        one_of("shared_expert_num", (1,), _NORM_PAGE + "shared_expert_num", on=ON_A3),
        one_of("shared_expert_rank_num", (0,), _NORM_PAGE + "shared_expert_rank_num", on=ON_A3),
        one_of("comm_quant_mode", (0,), _NORM_PAGE + "comm_quant_mode", on=ON_A3),
        one_of("comm_alg", ("",), _NORM_PAGE + "comm_alg", on=ON_A3),
    ),
    outputs=(
        Output(
            name="y", shape=("BS", "1", "H"), dtype="expand_x.dtype", meaning="gamma * (x * rstd), rounded after each product"
        ),
        Output(name="rstd", shape=("BS", "1", "1"), dtype="'float32'", meaning="1 / sqrt(mean of squares + norm_eps)"),
        Output(name="x", shape=("BS", "1", "H"), dtype="expand_x.dtype", meaning="combine's sum + residual_x, rounded once"),
    ),
    first_keyword="tp_send_counts",
    agree=(*COMBINE_V2.agree, "norm_eps"),
    steps=combine_steps.combine_add_rms_norm,
    golden=goldens.combine_add_rms_norm,
)
