"""What one can write wrongly in the operators that fuse a matmul with a collective, and in the barrier; and what one reads."""

from __future__ import annotations

from typing import Any

import torch

import commfuse
from commfuse.operators.all_gather_mm.cases import AllReduceCase, BarrierCase, GatherScatterCase

from .case import Calls, Misuse

GATHER, SCATTER = "npu_all_gather_base_mm", "npu_mm_reduce_scatter_base"
REDUCE, BARRIER = "npu_mm_all_reduce_base", "_npu_distribute_barrier"
SHORT = {GATHER: "gather", SCATTER: "scatter", REDUCE: "reduce", BARRIER: "barrier"}


def _base(name: str, *, world_size: int = 2, **changes: Any) -> Calls:
    """All-gather, reduce-scatter and all-reduce of rows of width 16 (or k), four rows on each rank, output width 5; and a barrier."""
    more = {"world_size": world_size, **changes}
    return Calls(
        id=name,
        cases=(
            (GATHER, GatherScatterCase(id=f"{name}-gather", m=4, **more)),
            (SCATTER, GatherScatterCase(id=f"{name}-scatter", operator="mm_reduce_scatter_base", m=2, **more)),
            (REDUCE, AllReduceCase(id=f"{name}-reduce", **more)),
            (BARRIER, BarrierCase(id=f"{name}-barrier", world_size=world_size)),
        ),
    )


def _int8(name: str, **changes: Any) -> Calls:
    more = {"x2_scale": torch.float32, "x1_scale": True, "comm_mode": "aiv", **changes}
    return Calls(
        id=name,
        cases=(
            (GATHER, GatherScatterCase(id=f"{name}-gather", m=4, **more)),
            (SCATTER, GatherScatterCase(id=f"{name}-scatter", operator="mm_reduce_scatter_base", m=2, **more)),
            (REDUCE, AllReduceCase(id=f"{name}-reduce", dequant="column", pertoken=True, k=changes.get("k", 16))),
        ),
    )


PLAIN = _base("mm")
THREE = _base("mm-three-ranks", world_size=3)
INT8 = _int8("mm-int8")
WIDE = _base("mm-wide", k=256)
WIDE_SINGLE = _base("mm-wide-float32", k=256, dtype=torch.float32)
WIDE_INT8 = _int8("mm-wide-int8", k=256)
ANTIQUANT = Calls(
    id="antiquant", cases=((REDUCE, AllReduceCase(id="antiquant", antiquant="column", antiquant_offset=True, x3=True)),)
)
GROUPED = Calls(
    id="grouped", cases=((REDUCE, AllReduceCase(id="grouped", antiquant="group", group_size=4, antiquant_offset=True)),)
)


def case(operator: str, name: str, wrong: str, *says: str, **more: Any) -> Misuse:
    given = {"base": PLAIN, **more}
    if given["base"].world_size == 3 and given.get("product"):
        given["settings"] = {"product": f"{given['product']},warn"}
    return Misuse(id=f"{SHORT[operator]}-{name}", operator=operator, wrong=wrong, says=says, **given)


def both(name: str, wrong: str, *says: str, **more: Any) -> list[Misuse]:
    """The same in all-gather and reduce-scatter."""
    return [case(operator, name, wrong, *says, **more) for operator in (GATHER, SCATTER)]


KINDS = [
    *both("rows-a-list", "input = input.tolist()", "input = [[", "must be a tensor, got list"),
    *both("rows-none", "input = None", "input = None: must be a tensor (m, k), 2-D"),
    *both("weight-a-list", "x2 = x2.tolist()", "x2 = [[", "must be a tensor, got list"),
    *both("weight-none", "x2 = None", "x2 = None: must be a tensor (k2, n), 2-D"),
    *both("world-size-a-float", "world_size = 2.0", "world_size = 2.0: must be an int, got float"),
    *both("bias-a-number", "bias = 1.0", "bias = 1.0: must be a tensor or None, got float"),
    *both("row-scale-a-number", "x1_scale = 0.5", "x1_scale = 0.5: must be a tensor or None, got float", base=INT8),
    *both("column-scale-a-list", "x2_scale = [1.0]", "x2_scale = [1.0]: must be a tensor or None, got list", base=INT8),
    *both("comm-turn-none", "comm_turn = None", "comm_turn = None: must be an int, got NoneType"),
    *both("output-dtype-text", "output_dtype = 'float16'", "output_dtype = 'float16': must be None or a torch.dtype, got str"),
    *both("comm-mode-a-number", "comm_mode = 1", "comm_mode = 1: must be a str or None, got int"),
    case(GATHER, "index-text", "gather_index = '0'", "gather_index = '0': must be an int, got str"),
    case(GATHER, "output-flag-none", "gather_output = None", "gather_output = None: must be a bool, got NoneType"),
    case(SCATTER, "reduce-op-none", "reduce_op = None", "reduce_op = None: must be a str, got NoneType"),
    case(REDUCE, "rows-an-array", "x1 = np.ones((4, 16))", "x1 = array(", "must be a tensor, got ndarray"),
    case(REDUCE, "rows-none", "x1 = None", "x1 = None: must be a tensor (m, k), 2-D or (batch, sequence, k), 3-D"),
    case(REDUCE, "weight-none", "x2 = None", "x2 = None: must be a tensor (k2, n), 2-D"),
    case(REDUCE, "weight-a-number", "x2 = 1", "x2 = 1: must be a tensor, got int"),
    case(REDUCE, "reduce-op-a-number", "reduce_op = 0", "reduce_op = 0: must be a str, got int"),
    *(
        case(REDUCE, f"{name.replace('_', '-')}-a-number", f"{name} = 2", f"{name} = 2: must be a tensor or None, got int")
        for name in (
            "bias",
            "antiquant_scale",
            "antiquant_offset",
            "x3",
            "dequant_scale",
            "pertoken_scale",
            "comm_quant_scale_1",
            "comm_quant_scale_2",
        )
    ),
    case(REDUCE, "group-size-none", "antiquant_group_size = None", "antiquant_group_size = None: must be an int, got NoneType"),
    case(REDUCE, "comm-turn-text", "comm_turn = ''", "comm_turn = '': must be an int, got str"),
    case(BARRIER, "x-none", "x_ref = None", "x_ref = None: must be a tensor"),
    case(BARRIER, "x-a-number", "x_ref = 1", "x_ref = 1: must be a tensor, got int"),
    case(BARRIER, "world-size-none", "world_size = None", "world_size = None: must be an int, got NoneType"),
    case(BARRIER, "time-out-a-number", "time_out = 30", "time_out = 30: must be a tensor or None, got int"),
    case(BARRIER, "elastic-info-a-list", "elastic_info = [0] * 8", "elastic_info = [0, 0,", "must be a tensor or None, got list"),
]

SHAPES = [
    *both("rows-3d", "input = input[None]", "input.shape = (1, 4, 16): must be (m, k), 2-D"),
    *both("weight-1d", "x2 = x2[:, 0]", "x2.shape = (16,): must be (k2, n), 2-D"),
    *both("weight-transposed", "x2 = x2.t()", "k2 = 5 (x2.shape[0]): must be the width of input's rows, k = 16", "The K-axis"),
    *both("bias-2d", "bias = torch.zeros(1, 5, dtype=torch.bfloat16)", "bias.shape = (1, 5): must be (n,), 1-D"),
    *both("bias-of-another-width", "bias = torch.zeros(4, dtype=torch.bfloat16)", "bias.shape = (4,): must be (n,) = (5,)"),
    *both("row-scale-1d", "x1_scale = x1_scale[:, 0]", "x1_scale.shape = (4,): must be (m, 1), 2-D", base=INT8),
    *both("row-scale-too-short", "x1_scale = x1_scale[1:]", "x1_scale.shape = (3, 1): must be (m, 1) = (4, 1)", base=INT8),
    *both("column-scale-1d", "x2_scale = x2_scale[0]", "x2_scale.shape = (5,): must be (1, n), 2-D", base=INT8),
    *both("column-scale-as-rows", "x2_scale = x2_scale.t()", "x2_scale.shape = (5, 1): must be (1, n) = (1, 5)", base=INT8),
    case(
        SCATTER,
        "rows-left-over",
        "input = input[:3]",
        "m = 3 (input.shape[0]): must be divisible by world_size = 2",
        "The M-axis",
    ),
    case(REDUCE, "rows-1d", "x1 = x1[0]", "x1.shape = (16,): must be (m, k), 2-D or (batch, sequence, k), 3-D"),
    case(REDUCE, "weight-3d", "x2 = x2[None]", "x2.shape = (1, 16, 5): must be (k2, n), 2-D"),
    case(REDUCE, "weight-of-another-width", "x2 = x2[1:]", "k2 = 15 (x2.shape[0]): must be the width of x1's rows, k = 16"),
    case(REDUCE, "bias-2d", "bias = x2[:1]", "bias.shape = (1, 5): must be (n,), 1-D"),
    case(REDUCE, "bias-of-another-width", "bias = x2[0, :4]", "bias.shape = (4,): must be (n,) = (5,)"),
    case(
        REDUCE,
        "antiquant-scale-0d",
        "antiquant_scale = antiquant_scale[0]",
        "antiquant_scale.shape = (): must be",
        "2-D",
        base=ANTIQUANT,
    ),
    case(
        REDUCE,
        "antiquant-offset-0d",
        "antiquant_offset = antiquant_offset[0]",
        "antiquant_offset.shape = (): must be",
        "2-D",
        base=ANTIQUANT,
    ),
    case(
        REDUCE,
        "antiquant-scale-width",
        "antiquant_scale = antiquant_scale[1:]",
        "antiquant_scale.shape = (4,): must be (1,), (5,) or (1, 5)",
        base=ANTIQUANT,
    ),
    case(
        REDUCE,
        "antiquant-offset-width",
        "antiquant_offset = antiquant_offset[1:]",
        "antiquant_offset.shape = (4,): must be (1,), (5,) or (1, 5)",
        base=ANTIQUANT,
    ),
    case(
        REDUCE,
        "antiquant-scale-groups",
        "antiquant_scale = antiquant_scale[1:]",
        "antiquant_scale.shape = (3, 5): must be (4, 5)",
        base=GROUPED,
    ),
    case(
        REDUCE,
        "antiquant-offset-groups",
        "antiquant_offset = antiquant_offset[:1]",
        "antiquant_offset.shape = (1, 5): must be (4, 5)",
        base=GROUPED,
    ),
    case(REDUCE, "x3-1d", "x3 = x3[0]", "x3.shape = (5,): must be (m, n), 2-D or (batch, sequence, n), 3-D", base=ANTIQUANT),
    case(
        REDUCE,
        "x3-in-other-dimensions",
        "x3 = x3[None]",
        "x3.shape = (1, 4, 5): must be the shape of the output = (4, 5)",
        base=ANTIQUANT,
    ),
    case(
        REDUCE,
        "dequant-scale-3d",
        "dequant_scale = dequant_scale[None, None]",
        "dequant_scale.shape = (1, 1, 5): must be",
        "2-D",
        base=INT8,
    ),
    case(
        REDUCE,
        "dequant-scale-width",
        "dequant_scale = dequant_scale[1:]",
        "dequant_scale.shape = (4,): must be (1,), (5,) or (1, 5)",
        base=INT8,
    ),
    case(
        REDUCE,
        "pertoken-2d",
        "pertoken_scale = pertoken_scale[None]",
        "pertoken_scale.shape = (1, 4): must be (row_count,), 1-D",
        base=INT8,
    ),
    case(
        REDUCE,
        "pertoken-too-short",
        "pertoken_scale = pertoken_scale[1:]",
        "row_count = 3",
        "must be the rows of x1 = 4",
        base=INT8,
    ),
    case(
        REDUCE,
        "comm-quant-1-3d",
        "comm_quant_scale_1 = x2[None]",
        "comm_quant_scale_1.shape = (1, 16, 5): must be (n,), 1-D or (1, n), 2-D",
    ),
    case(
        REDUCE, "comm-quant-2-width", "comm_quant_scale_2 = x2[:2]", "comm_quant_scale_2.shape = (2, 5): must be (1, n) = (1, 5)"
    ),
    case(
        REDUCE,
        "comm-quant-2-3d",
        "comm_quant_scale_2 = x2[None]",
        "comm_quant_scale_2.shape = (1, 16, 5): must be (n,), 1-D or (1, n), 2-D",
    ),
    case(BARRIER, "x-5d", "x_ref = x_ref[None, None, None]", "x_ref.shape = (1, 1, 1, 2, 3): must be", "4-D"),
    case(BARRIER, "time-out-2d", "time_out = torch.ones(1, 1).int()", "time_out.shape = (1, 1): must be", "1-D"),
    case(BARRIER, "elastic-info-2d", "elastic_info = torch.zeros(2, 4).int()", "elastic_info.shape = (2, 4): must be", "1-D"),
    case(
        BARRIER, "elastic-info-too-short", "elastic_info = torch.zeros(4).int()", "elastic_info.shape = (4,): must be", "= (8,)"
    ),
]

DTYPES = [
    *both("rows-of-ints", "input = input.int()", "input.dtype = int32: must be bfloat16 or float16 or float32 or int8"),
    *both("weight-of-bools", "x2 = x2 > 0", "x2.dtype = bool: must be bfloat16 or float16 or float32 or int8"),
    *both("weight-of-another-dtype", "x2 = x2.half()", "x2.dtype = 'float16': must be input.dtype = bfloat16"),
    *both("bias-of-ints", "bias = torch.zeros(5).int()", "bias.dtype = int32: must be bfloat16 or float16 or float32"),
    *both("bias-of-another-dtype", "bias = torch.zeros(5)", "bias.dtype = 'float32': must be input.dtype = bfloat16"),
    *both("row-scale-half", "x1_scale = x1_scale.half()", "x1_scale.dtype = float16: must be float32", base=INT8),
    *both("column-scale-half", "x2_scale = x2_scale.half()", "x2_scale.dtype = float16: must be float32 or int64", base=INT8),
    case(REDUCE, "rows-of-longs", "x1 = x1.long()", "x1.dtype = int64: must be bfloat16 or float16 or float32 or int8"),
    case(REDUCE, "weight-of-longs", "x2 = x2.long()", "x2.dtype = int64: must be bfloat16 or float16 or float32 or int8"),
    case(REDUCE, "weight-of-another-dtype", "x2 = x2.float()", "x2.dtype = 'float32': must be x1.dtype = bfloat16, or int8"),
    case(
        REDUCE,
        "bias-of-bools",
        "bias = torch.ones(5).bool()",
        "bias.dtype = bool: must be bfloat16 or float16 or float32 or int32",
    ),
    case(REDUCE, "bias-of-another-dtype", "bias = torch.ones(5)", "bias.dtype = 'float32': must be bfloat16"),
    case(REDUCE, "bias-of-int8-rows", "bias = torch.ones(5)", "bias.dtype = 'float32': must be int32", base=INT8),
    case(
        REDUCE,
        "antiquant-scale-of-ints",
        "antiquant_scale = antiquant_scale.int()",
        "antiquant_scale.dtype = int32: must be bfloat16",
        base=ANTIQUANT,
    ),
    case(
        REDUCE,
        "antiquant-offset-of-ints",
        "antiquant_offset = antiquant_offset.char()",
        "antiquant_offset.dtype = int8: must be bfloat16",
        base=ANTIQUANT,
    ),
    case(REDUCE, "x3-of-ints", "x3 = x3.int()", "x3.dtype = int32: must be bfloat16 or float16 or float32", base=ANTIQUANT),
    case(
        REDUCE,
        "x3-of-another-dtype",
        "x3 = x3.float()",
        "x3.dtype = 'float32': must be the dtype of the output = bfloat16",
        base=ANTIQUANT,
    ),
    case(
        REDUCE, "dequant-scale-of-ints", "dequant_scale = dequant_scale.int()", "dequant_scale.dtype = int32: must be", base=INT8
    ),
    case(
        REDUCE,
        "pertoken-half",
        "pertoken_scale = pertoken_scale.half()",
        "pertoken_scale.dtype = float16: must be float32",
        base=INT8,
    ),
    case(
        REDUCE,
        "comm-quant-of-ints",
        "comm_quant_scale_1 = comm_quant_scale_2 = torch.ones(5).int()",
        "comm_quant_scale_1.dtype = int32: must be",
        "comm_quant_scale_2.dtype = int32: must be",
    ),
    case(
        REDUCE,
        "comm-quant-of-another-dtype",
        "comm_quant_scale_1 = comm_quant_scale_2 = torch.ones(5)",
        "comm_quant_scale_1.dtype = 'float32': must be the dtype of the output = bfloat16",
        "comm_quant_scale_2.dtype = 'float32'",
    ),
    case(BARRIER, "x-complex", "x_ref = x_ref.to(torch.complex64)", "x_ref.dtype = complex64: must be"),
    case(BARRIER, "time-out-in-seconds", "time_out = torch.tensor(0.5)", "time_out.dtype = float32: must be int32 or int64"),
    case(BARRIER, "elastic-info-of-longs", "elastic_info = torch.zeros(8).long()", "elastic_info.dtype = int64: must be int32"),
]

VALUES = [
    *both("world-size-zero", "world_size = 0", "world_size = 0: must be at least 1"),
    *both("world-size-of-another-group", "world_size = 4", "world_size = 4: must be the size of hcom = 2", "which is illegal."),
    *both("comm-turn", "comm_turn = 1", "comm_turn = 1: must be 0", "comm_turn should be 0, but the actual value is …"),
    *both("comm-mode-unknown", "comm_mode = 'ccu'", "comm_mode = 'ccu': must be one of None, 'ai_cpu', 'aiv'"),
    *both(
        "int8-on-ai-cpu",
        "comm_mode = 'ai_cpu'",
        "comm_mode = 'ai_cpu': must be 'aiv' or None",
        "quantization not supported.",
        base=INT8,
    ),
    *both(
        "int8-without-scale", "x2_scale = None", "x2_scale = None: must be given if and only if input and x2 are int8", base=INT8
    ),
    *both("row-scale-alone", "x2_scale = None", "x1_scale = a tensor (4, 1) float32: must be None without x2_scale", base=INT8),
    *both(
        "scale-without-int8", "x2_scale = torch.ones(1, 5)", "x2_scale = a tensor (1, 5) float32: must be given if and only if"
    ),
    *both(
        "output-dtype-without-int8",
        "output_dtype = torch.bfloat16",
        "output_dtype = torch.bfloat16: must be None (the product has input's dtype)",
    ),
    *both(
        "output-dtype-of-int8",
        "output_dtype = torch.float32",
        "output_dtype = torch.float32: must be None, torch.float16 or torch.bfloat16",
        base=INT8,
    ),
    case(GATHER, "index", "gather_index = 1", "gather_index = 1: must be 0", "the gather_index should be 0, but real value is …"),
    case(SCATTER, "reduce-op", "reduce_op = 'max'", "reduce_op = 'max': must be 'sum'"),
    case(REDUCE, "reduce-op", "reduce_op = 'avg'", "reduce_op = 'avg': must be 'sum'"),
    case(REDUCE, "comm-turn", "comm_turn = 2", "comm_turn = 2: must be 0"),
    case(
        REDUCE,
        "int8-weight-alone",
        "x2 = x2.char()",
        "antiquant_scale = None: must be given if and only if x2 is int8 and x1 is not",
    ),
    case(REDUCE, "antiquant-scale-alone", "antiquant_scale = x2[0]", "must be given if and only if x2 is int8 and x1 is not"),
    case(
        REDUCE,
        "antiquant-offset-alone",
        "antiquant_offset = x2[0]",
        "antiquant_offset = a tensor (5,) bfloat16: must be None without antiquant_scale",
    ),
    case(REDUCE, "group-size-negative", "antiquant_group_size = -1", "antiquant_group_size = -1: must be at least 0"),
    case(
        REDUCE,
        "int8-without-scale",
        "dequant_scale = None",
        "dequant_scale = None: must be given if and only if x1 and x2 are int8",
        "pertoken_scale = a tensor (4,) float32: must be None without dequant_scale",
        base=INT8,
    ),
    case(REDUCE, "scale-without-int8", "dequant_scale = torch.ones(5)", "must be given if and only if x1 and x2 are int8"),
    case(
        REDUCE,
        "one-comm-quant-scale",
        "comm_quant_scale_1 = x2[0]",
        "comm_quant_scale_2 = None: must be given if and only if comm_quant_scale_1 is",
    ),
    case(BARRIER, "world-size-zero", "world_size = 0", "world_size = 0: must be at least 1"),
    case(BARRIER, "world-size-of-another-group", "world_size = 3", "world_size = 3: must be the size of group = 2"),
    case(
        BARRIER,
        "elastic-flag",
        "elastic_info = torch.tensor([2, 2, 0, 2, 0, 1, 0, 1]).int()",
        "elastic_info[0] = 2: must be 0 (not shrunk) or 1",
    ),
    case(
        BARRIER,
        "elastic-table",
        "elastic_info = torch.tensor([1, 2, 0, 2, 0, 0, 0, 1]).int()",
        "elastic_info[4:6] = [0, 0]: must give each of the 2 living ranks one id",
    ),
]

ON_A3 = [
    *both(
        "a3-float32",
        "pass",
        "under the rules of A3",
        "input.dtype = 'float32': must be one of 'bfloat16', 'float16', 'int8'",
        base=WIDE_SINGLE,
        product="A3",
        settings={"product": "A3,warn"},
    ),
    *both("a3-world-size", "pass", "world_size = 3: must be one of 2, 4, 8, 16, 32", base=THREE, product="A3"),
    *both(
        "a3-narrow",
        "input = input[:, :255]; x2 = x2[:255]",
        "k = 255 (input.shape[1]): must be in 256..65534",
        "range[256, 65535)",
        base=WIDE,
        product="A3",
    ),
    *both(
        "a3-wide",
        "input = input[:, :1].repeat(1, 65535); x2 = x2[:1].expand(65535, -1)",
        "k = 65535 (input.shape[1]): must be in 256..65534",
        base=WIDE,
        product="A3",
    ),
    *both(
        "a3-transposed-rows",
        "input = input.t().contiguous().t()",
        "input = a tensor (4, 256) bfloat16, not contiguous: must be contiguous",
        "x1 should not be transposed",
        base=WIDE,
        product="A3",
    ),
    *both("a3-no-rows", "input = input[:0]", "m = 0 (input.shape[0]): must be at least 1", base=WIDE, product="A3"),
    *both(
        "a3-int8-by-default",
        "comm_mode = None",
        "comm_mode = None: must be 'aiv' (the default is 'ai_cpu')",
        base=WIDE_INT8,
        product="A3",
    ),
    case(
        GATHER,
        "a3-aiv-without-output",
        "comm_mode = 'aiv'; gather_output = False",
        "gather_output = False: must be True when comm_mode == 'aiv'",
        base=WIDE,
        product="A3",
    ),
    case(
        REDUCE,
        "a3-float32",
        "pass",
        "x1.dtype = 'float32': must be one of 'bfloat16', 'float16', 'int8'",
        base=WIDE_SINGLE,
        product="A3",
        settings={"product": "A3,warn"},
    ),
]

ON_A2 = [
    *both("a2-world-size", "pass", "under the rules of A2", "world_size = 3: must be one of 2, 4, 8", base=THREE, product="A2"),
    *both("a2-narrow", "pass", "k = 16 (input.shape[1]): must be in 256..65534", product="A2"),
    case(REDUCE, "a2-world-size", "pass", "group_size = 3: must be one of 1, 2, 4, 8", base=THREE, product="A2"),
]


def mismatch(operator: str, name: str, wrong: str, *says: str, **more: Any) -> Misuse:
    """Process 1 alone writes ``wrong``."""
    return case(operator, name, wrong, *says, **{"on_rank": 1, "error": commfuse.MismatchError, **more})


MISMATCHES = [
    mismatch(GATHER, "other-number-of-rows", "input = input[:3]", "m: 4 on rank 0 of 2; 3 on rank 1 of 2"),
    mismatch(GATHER, "other-width", "input = input[:, :8]; x2 = x2[:8]", "k: 16 on rank 0 of 2; 8 on rank 1 of 2"),
    mismatch(
        GATHER,
        "other-dtype",
        "input = input.half(); x2 = x2.half()",
        "input.dtype: 'bfloat16' on rank 0 of 2; 'float16' on rank 1 of 2",
    ),
    mismatch(
        GATHER,
        "row-scale-on-one-rank",
        "x1_scale = None",
        "x1_scale is not None: True on rank 0 of 2; False on rank 1 of 2",
        base=INT8,
    ),
    mismatch(
        GATHER,
        "other-product",
        "commfuse.config.set(product='A3')",
        "product: 'portable' on rank 0 of 2; 'A3' on rank 1 of 2",
        base=WIDE,
    ),
    mismatch(
        GATHER,
        "other-operator",
        "pass",
        "operator: 'npu_all_gather_base_mm' on rank 0 of 2; 'npu_mm_reduce_scatter_base' on rank 1 of 2",
        calls=SCATTER,
    ),
    mismatch(SCATTER, "other-number-of-rows", "input = input[:2]", "m: 4 on rank 0 of 2; 2 on rank 1 of 2"),
    mismatch(SCATTER, "other-output-width", "x2 = x2[:, 1:]", "n: 5 on rank 0 of 2; 4 on rank 1 of 2"),
    mismatch(
        SCATTER,
        "other-dtype",
        "input = input.half(); x2 = x2.half()",
        "result_dtype: 'bfloat16' on rank 0 of 2; 'float16' on rank 1 of 2",
    ),
    mismatch(REDUCE, "other-number-of-rows", "x1 = x1[1:]", "x1.shape[:-1]: (4,) on rank 0 of 2; (3,) on rank 1 of 2"),
    mismatch(REDUCE, "other-dimensions", "x1 = x1[None]", "x1.shape[:-1]: (4,) on rank 0 of 2; (1, 4) on rank 1 of 2"),
    mismatch(REDUCE, "other-output-width", "x2 = x2[:, 1:]", "n: 5 on rank 0 of 2; 4 on rank 1 of 2"),
    mismatch(
        REDUCE,
        "other-dtype",
        "x1 = x1.float(); x2 = x2.float()",
        "result_dtype: 'bfloat16' on rank 0 of 2; 'float32' on rank 1 of 2",
    ),
    mismatch(
        BARRIER,
        "other-operator",
        "pass",
        "operator: '_npu_distribute_barrier' on rank 0 of 2; 'npu_mm_all_reduce_base' on rank 1 of 2",
        calls=REDUCE,
    ),
    case(GATHER, "wrong-on-one-rank", "comm_turn = 1", "refused on rank 1 of 2", "comm_turn = 1", on_rank=1),
]

CASES = [*KINDS, *SHAPES, *DTYPES, *VALUES, *ON_A3, *ON_A2, *MISMATCHES]
