"""Matmul fused with a collective, as rows: all-gather before it, reduce-scatter or all-reduce after it; and the group barrier."""

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
    Rule,
    Symbol,
    Tensor,
    at_least,
    between,
    holds,
    one_of,
)
from ..moe_distribute.rows import ELASTIC
from . import goldens, steps

_FORMULA = "the formula itself"
_MATRIX = (*ROWS, "int8")
_SCALES = ("float32", "int64")
_QUANTISED = "x2_scale is not None"

# --- rows that all-gather and reduce-scatter share -----------------------------------------------------------------------------

_WIDTHS = (
    Tensor(
        name="input",
        aliases=("self", "x1"),
        shapes=(("m", "k"),),
        dtype=_MATRIX,
        meaning="this rank's rows; also accepted as self= and x1=",
    ),
    Tensor(name="x2", shapes=(("k2", "n"),), dtype=_MATRIX, meaning="this rank's weight; a transposed view is fine"),
    Attr(name="hcom", schema="group", required=True, positional=True, meaning="the communication domain: name or ProcessGroup"),
    Attr(name="world_size", schema="int", required=True, positional=True, meaning="W, ranks in the domain"),
)
_SCALED = (
    Tensor(
        name="bias", shapes=(("n",),), dtype=ROWS, optional=True, meaning="added to every row of the product, after the scales"
    ),
    Tensor(name="x1_scale", shapes=(("m", "1"),), dtype=("float32",), optional=True, meaning="int8 rows: factor of each row"),
    Tensor(
        name="x2_scale",
        shapes=(("1", "n"),),
        dtype=_SCALES,
        optional=True,
        meaning="int8 rows: factor of each column; int64 carries float32 bits",
    ),
)
_COMM_TURN = Attr(name="comm_turn", schema="int", default=0, meaning="0")
_NEWER = (
    Attr(name="output_dtype", schema="ScalarType?", default=None, meaning="int8 rows: float16 or bfloat16 (None: bfloat16)"),
    Attr(name="comm_mode", schema="str?", default=None, meaning="None, 'ai_cpu' or 'aiv': the result is the same"),
)
_OUTPUT_DTYPE = Symbol(
    name="result_dtype",
    formula="input.dtype if x2_scale is None else 'float16' if x2_scale.dtype == 'int64' else "
    "'bfloat16' if output_dtype is None else dtype_name(output_dtype)",
    meaning="dtype of the product",
)


def _common(page: str) -> tuple[Rule, ...]:
    return (
        at_least("world_size", 1, _FORMULA),
        holds(
            "world_size",
            "world_size == group_size",
            "the size of hcom = {group_size}",
            page + "world_size",
            says="world_size value is …, which is illegal.",
        ),
        holds("hcom", "1 <= len(hcom) <= 127", "1 to 127 characters", page + "hcom"),
        holds(
            "k2",
            "k2 == k",
            "the width of input's rows, k = {k}",
            page + "x2",
            says="The K-axis in the two inputs of Matmul must be equal, but in reality, the K-axis of x1 is … and the K-axis of x2 is ….",
        ),
        holds("x2.dtype", "x2.dtype == input.dtype", "input.dtype = {input.dtype}", page + "x2"),
        one_of("comm_turn", (0,), page + "comm_turn", says="comm_turn should be 0, but the actual value is …"),
        one_of("comm_mode", (None, "ai_cpu", "aiv"), page + "comm_mode"),
        *_scales(page),
        *_product_limits(page),
    )


def _scales(page: str) -> tuple[Rule, ...]:
    return (
        holds(
            "x2_scale",
            "(input.dtype == 'int8') == (x2_scale is not None)",
            "given if and only if input and x2 are int8",
            page + "x2_scale",
        ),
        holds("x1_scale", "x1_scale is None or x2_scale is not None", "None without x2_scale", page + "x1_scale"),
        holds(
            "comm_mode",
            "comm_mode != 'ai_cpu'",
            "'aiv' or None",
            page + "comm_mode",
            when=_QUANTISED,
            says="When comm_mode is ai_cpu, quantization not supported.",
        ),
        holds(
            "comm_mode",
            "comm_mode is not None",
            "'aiv' (the default is 'ai_cpu')",
            page + "comm_mode",
            on=HARDWARE,
            when=_QUANTISED,
            says="When comm_mode is ai_cpu, quantization not supported.",
        ),
        holds(
            "bias.dtype",
            "bias.dtype == input.dtype",
            "input.dtype = {input.dtype}",
            page + "bias",
            when="bias is not None and input.dtype != 'int8'",
        ),
        holds(
            "output_dtype",
            "output_dtype is None",
            "None (the product has input's dtype)",
            page + "output_dtype",
            when="x2_scale is None",
        ),
        holds(
            "output_dtype",
            "output_dtype is None or dtype_name(output_dtype) in ('float16', 'bfloat16')",
            "None, torch.float16 or torch.bfloat16",
            page + "output_dtype",
            when=_QUANTISED,
        ),
    )


def _product_limits(page: str) -> tuple[Rule, ...]:
    return (
        one_of("input.dtype", (*HALF, "int8"), page + "input", on=HARDWARE),
        one_of(
            "world_size",
            (2, 4, 8, 16, 32),
            page + "world_size",
            on=ON_A3,
            says="world_size should be in [2, 4, 8, 16, 32], but the actual value is ….",
        ),
        one_of("world_size", (2, 4, 8), page + "world_size", on=ON_A2),
        between("k", 256, 65534, page + "input", on=HARDWARE, says="The k-axis should be in range[256, 65535), but it is: k."),
        holds(
            "input",
            "input.contiguous",
            "contiguous (not a transposed view)",
            page + "input",
            on=HARDWARE,
            says="The x1 should not be transposed, but it is transposed.",
        ),
        at_least("m", 1, page + "input", on=HARDWARE),
    )


_GATHER_PAGE = "npu_all_gather_base_mm page, "
ALL_GATHER_BASE_MM = Operator(
    name="npu_all_gather_base_mm",
    summary="gather the ranks' rows and multiply all of them with the local weight",
    args=(
        *_WIDTHS,
        *_SCALED,
        Attr(name="gather_index", schema="int", default=0, meaning="0: input is gathered"),
        Attr(name="gather_output", schema="bool", default=True, meaning="also return the gathered rows"),
        _COMM_TURN,
        *_NEWER,
    ),
    first_keyword="bias",
    symbols=(_OUTPUT_DTYPE,),
    rules=(
        *_common(_GATHER_PAGE),
        one_of("gather_index", (0,), _GATHER_PAGE + "gather_index", says="the gather_index should be 0, but real value is …"),
        holds("gather_output", "gather_output", "True", _GATHER_PAGE + "comm_mode", on=HARDWARE, when="comm_mode == 'aiv'"),
    ),
    outputs=(
        Output(
            name="output",
            shape=("m * world_size", "n"),
            dtype="result_dtype",
            meaning="(rows of rank 0, of rank 1, ...) @ x2 + bias",
        ),
        Output(
            name="gather_out",
            shape=("*((m * world_size, k) if gather_output else (0,))",),
            dtype="input.dtype",
            meaning="the gathered rows; an empty tensor of shape (0,) without gather_output",
        ),
    ),
    group="hcom",
    agree=("world_size", "m", "k", "input.dtype", "x1_scale is not None"),
    world_size="world_size",
    steps=steps.all_gather_base_mm,
    golden=goldens.all_gather_base_mm,
)

_SCATTER_PAGE = "npu_mm_reduce_scatter_base page, "
MM_REDUCE_SCATTER_BASE = Operator(
    name="npu_mm_reduce_scatter_base",
    summary="multiply, sum the products of all ranks, and give each rank its share of the rows",
    args=(*_WIDTHS, Attr(name="reduce_op", schema="str", default="sum", meaning="'sum'"), *_SCALED, _COMM_TURN, *_NEWER),
    first_keyword="reduce_op",
    symbols=(_OUTPUT_DTYPE,),
    rules=(
        *_common(_SCATTER_PAGE),
        one_of("reduce_op", ("sum",), _SCATTER_PAGE + "reduce_op"),
        holds(
            "m",
            "m % world_size == 0",
            "divisible by world_size = {world_size}",
            _SCATTER_PAGE + "input",
            says="The M-axis in input of Matmul should be be divisible by world_size.",
        ),
    ),
    outputs=(
        Output(
            name="output",
            shape=("m // world_size", "n"),
            dtype="result_dtype",
            meaning="this rank's rows of the sum over ranks of input @ x2 + bias",
        ),
    ),
    group="hcom",
    agree=("world_size", "m", "n", "result_dtype"),
    world_size="world_size",
    steps=steps.mm_reduce_scatter_base,
    golden=goldens.mm_reduce_scatter_base,
)

_REDUCE_PAGE = "npu_mm_all_reduce_base page, "
_PER_GROUP = (("antiquant_size",), ("antiquant_rows", "antiquant_columns"))

MM_ALL_REDUCE_BASE = Operator(
    name="npu_mm_all_reduce_base",
    summary="multiply and sum the products of all ranks; every rank gets the whole sum",
    args=(
        Tensor(name="x1", shapes=(("m", "k"), ("batch", "sequence", "k")), dtype=_MATRIX, meaning="this rank's rows"),
        Tensor(
            name="x2",
            shapes=(("k2", "n"),),
            dtype=_MATRIX,
            meaning="this rank's weight; int8 with antiquant_scale or dequant_scale",
        ),
        Attr(
            name="hcom", schema="group", required=True, positional=True, meaning="the communication domain: name or ProcessGroup"
        ),
        Attr(name="reduce_op", schema="str", default="sum", meaning="'sum'"),
        Tensor(
            name="bias",
            shapes=(("n",),),
            dtype=(*ROWS, "int32"),
            optional=True,
            meaning="added by every rank before the sum (equal ones count W times); int32 with int8 rows",
        ),
        Tensor(
            name="antiquant_scale",
            shapes=_PER_GROUP,
            dtype=ROWS,
            optional=True,
            meaning="x2 int8, x1 not: [1], [n], [1, n], or [ceil(k / antiquant_group_size), n]",
        ),
        Tensor(
            name="antiquant_offset", shapes=_PER_GROUP, dtype=ROWS, optional=True, meaning="added to x2 before antiquant_scale"
        ),
        Tensor(
            name="x3",
            shapes=(("m", "n"), ("batch", "sequence", "n")),
            dtype=ROWS,
            optional=True,
            meaning="added by every rank before the sum",
        ),
        Tensor(
            name="dequant_scale",
            shapes=(("dequant_size",), ("1", "n")),
            dtype=(*ROWS, "int64"),
            optional=True,
            meaning="x1 and x2 int8: factor of each column ([1], [n] or [1, n]); int64 carries float32 bits",
        ),
        Tensor(
            name="pertoken_scale",
            shapes=(("row_count",),),
            dtype=("float32",),
            optional=True,
            meaning="x1 int8: factor of each row, leading dimensions flattened",
        ),
        Tensor(
            name="comm_quant_scale_1",
            shapes=(("n",), ("1", "n")),
            dtype=ROWS,
            optional=True,
            meaning="accepted and not needed: it lowers the precision of the reduction on a device",
        ),
        Tensor(name="comm_quant_scale_2", shapes=(("n",), ("1", "n")), dtype=ROWS, optional=True, meaning="likewise"),
        Attr(
            name="antiquant_group_size", schema="int", default=0, meaning="rows of x2 that share a row of antiquant_scale; 0: all"
        ),
        _COMM_TURN,
    ),
    first_keyword="reduce_op",
    symbols=(
        Symbol(name="rows", formula="m if x1.ndim == 2 else batch * sequence", meaning="rows of x1"),
        Symbol(
            name="result_dtype",
            formula="x1.dtype if x1.dtype != 'int8' else 'bfloat16' if dequant_scale.dtype == 'bfloat16' else 'float16'",
            meaning="dtype of the sum",
        ),
    ),
    rules=(
        holds("hcom", "1 <= len(hcom) <= 127", "1 to 127 characters", _REDUCE_PAGE + "hcom"),
        one_of("reduce_op", ("sum",), _REDUCE_PAGE + "reduce_op"),
        one_of("comm_turn", (0,), _REDUCE_PAGE + "comm_turn"),
        holds("k2", "k2 == k", "the width of x1's rows, k = {k}", _REDUCE_PAGE + "x2", says="K of x1 and x2 should be same, …"),
        holds(
            "x2.dtype",
            "x2.dtype == x1.dtype or x1.dtype != 'int8' and x2.dtype == 'int8'",
            "x1.dtype = {x1.dtype}, or int8",
            _REDUCE_PAGE + "x2",
        ),
        holds(
            "antiquant_scale",
            "(antiquant_scale is not None) == (x1.dtype != 'int8' and x2.dtype == 'int8')",
            "given if and only if x2 is int8 and x1 is not",
            _REDUCE_PAGE + "antiquant_scale",
        ),
        holds(
            "antiquant_offset",
            "antiquant_offset is None or antiquant_scale is not None",
            "None without antiquant_scale",
            _REDUCE_PAGE + "antiquant_offset",
        ),
        *(
            holds(
                f"{name}.shape",
                f"{name}.shape in ((1,), (n,), (1, n))",
                "(1,), ({n},) or (1, {n})",
                _REDUCE_PAGE + name,
                when=f"{name} is not None and antiquant_group_size == 0",
            )
            for name in ("antiquant_scale", "antiquant_offset")
        ),
        *(
            holds(
                f"{name}.shape",
                f"{name}.shape == (ceil_div(k, antiquant_group_size), n)",
                "({ceil_div(k, antiquant_group_size)}, {n})",
                _REDUCE_PAGE + name,
                when=f"{name} is not None and antiquant_group_size > 0",
            )
            for name in ("antiquant_scale", "antiquant_offset")
        ),
        at_least("antiquant_group_size", 0, _REDUCE_PAGE + "antiquant_group_size"),
        holds(
            "dequant_scale",
            "(dequant_scale is not None) == (x1.dtype == 'int8')",
            "given if and only if x1 and x2 are int8",
            _REDUCE_PAGE + "dequant_scale",
        ),
        holds(
            "dequant_scale.shape",
            "dequant_scale.shape in ((1,), (n,), (1, n))",
            "(1,), ({n},) or (1, {n})",
            _REDUCE_PAGE + "dequant_scale",
            when="dequant_scale is not None",
        ),
        holds(
            "pertoken_scale",
            "pertoken_scale is None or dequant_scale is not None",
            "None without dequant_scale",
            _REDUCE_PAGE + "pertoken_scale",
        ),
        holds(
            "row_count",
            "row_count == rows",
            "the rows of x1 = {rows}",
            _REDUCE_PAGE + "pertoken_scale",
            when="pertoken_scale is not None",
        ),
        holds(
            "bias.dtype",
            "bias.dtype == ('int32' if x1.dtype == 'int8' else x1.dtype)",
            "{'int32' if x1.dtype == 'int8' else x1.dtype}",
            _REDUCE_PAGE + "bias",
            when="bias is not None",
        ),
        holds(
            "x3.shape",
            "x3.shape == x1.shape[:-1] + (n,)",
            "the shape of the output = {x1.shape[:-1] + (n,)}",
            _REDUCE_PAGE + "x3",
            when="x3 is not None",
        ),
        holds(
            "x3.dtype",
            "x3.dtype == result_dtype",
            "the dtype of the output = {result_dtype}",
            _REDUCE_PAGE + "x3",
            when="x3 is not None",
        ),
        holds(
            "comm_quant_scale_2",
            "(comm_quant_scale_1 is None) == (comm_quant_scale_2 is None)",
            "given if and only if comm_quant_scale_1 is",
            _REDUCE_PAGE + "comm_quant_scale_1",
        ),
        *(
            holds(
                f"{name}.dtype",
                f"{name}.dtype == result_dtype",
                "the dtype of the output = {result_dtype}",
                _REDUCE_PAGE + name,
                when=f"{name} is not None",
            )
            for name in ("comm_quant_scale_1", "comm_quant_scale_2")
        ),
        one_of("x1.dtype", (*HALF, "int8"), _REDUCE_PAGE + "x1", on=HARDWARE),
        one_of("group_size", (1, 2, 4, 8), _REDUCE_PAGE + "hcom", on=ON_A2),
    ),
    outputs=(
        Output(
            name="output",
            shape=("*x1.shape[:-1]", "n"),
            dtype="result_dtype",
            meaning="sum over ranks of x1 @ dequantised(x2) + bias + x3",
        ),
    ),
    group="hcom",
    agree=("x1.shape[:-1]", "n", "result_dtype"),
    steps=steps.mm_all_reduce_base,
    golden=goldens.mm_all_reduce_base,
)

_BARRIER_PAGE = "_npu_distribute_barrier schema, "
DISTRIBUTE_BARRIER = Operator(
    name="_npu_distribute_barrier",
    summary="return x_ref's values once every rank of the domain has called",
    args=(
        Tensor(
            name="x_ref",
            shapes=((), ("d0",), ("d0", "d1"), ("d0", "d1", "d2"), ("d0", "d1", "d2", "d3")),
            dtype=(*_MATRIX, "int32", "int64", "bool", "uint8", "float64", "int16"),
            meaning="any tensor of up to four dimensions",
        ),
        Attr(
            name="group", schema="group", required=True, positional=True, meaning="the communication domain: name or ProcessGroup"
        ),
        Attr(name="world_size", schema="int", required=True, positional=True, meaning="W, ranks in the domain"),
        Tensor(
            name="time_out",
            shapes=((), ("time_out_size",)),
            dtype=("int32", "int64"),
            optional=True,
            meaning="accepted and not needed: COMMFUSE_TIMEOUT bounds every wait",
        ),
        ELASTIC,
    ),
    first_keyword="time_out",
    symbols=(Symbol(name="ep_world_size", formula="world_size", meaning="W"),),
    rules=(
        at_least("world_size", 1, _FORMULA),
        holds("world_size", "world_size == group_size", "the size of group = {group_size}", _BARRIER_PAGE + "world_size"),
    ),
    outputs=(Output(name="output", shape=("*x_ref.shape",), dtype="x_ref.dtype", meaning="x_ref's values, a new tensor"),),
    group="group",
    agree=("world_size",),
    world_size="world_size",
    values=steps.barrier_table,
    alive=steps.barrier_alive,
    steps=steps.distribute_barrier,
    golden=goldens.distribute_barrier,
)
