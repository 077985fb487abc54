"""The goldens of matmul with a collective against worked numbers and against dense float64 computations."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from commfuse.operators.all_gather_mm.cases import (
    DTYPES,
    NAMED,
    OPERATORS,
    AllReduceCase,
    BarrierCase,
    Case,
    GatherScatterCase,
    packed_scale,
    random_case,
)
from commfuse.operators.all_gather_mm.reference import (
    all_gather_base_mm,
    distribute_barrier,
    mm_all_reduce_base,
    mm_reduce_scatter_base,
)

GOLDENS = {
    "all_gather_base_mm": all_gather_base_mm,
    "mm_reduce_scatter_base": mm_reduce_scatter_base,
    "mm_all_reduce_base": mm_all_reduce_base,
    "distribute_barrier": distribute_barrier,
}
RANDOM = [random_case(seed) for seed in range(400)]
X2 = [[[1, 0, 1], [0, 1, 1]], [[2, 0, 0], [0, 2, 1]]]  # of both worked examples, per rank

Wide = npt.NDArray[np.float64]


def _ranks(case: Case) -> list[dict[str, Any]]:
    return [case.args(rank) for rank in range(case.world_size)]


def _only(outputs: list[tuple[Tensor | None, int]]) -> Tensor:
    ((tensor, valid),) = outputs
    assert tensor is not None
    assert valid == tensor.size(0)
    return tensor


def _base_args(x: Any, x2: Any, dtype: torch.dtype = torch.float32, **others: Any) -> dict[str, Any]:
    """Arguments of both all_gather_base_mm and mm_reduce_scatter_base."""
    return {
        "self": torch.tensor(x, dtype=dtype),
        "x2": torch.tensor(x2, dtype=dtype),
        "world_size": 2,
        "bias": None,
        "x1_scale": None,
        "x2_scale": None,
        "gather_index": 0,
        "gather_output": True,
        "reduce_op": "sum",
        "comm_turn": 0,
        "output_dtype": None,
        "comm_mode": None,
        **others,
    }


def _all_reduce_args(x1: Tensor, x2: Tensor, **others: Any) -> dict[str, Any]:
    args = AllReduceCase(id="all None").args(0)
    return {**args, "x1": x1, "x2": x2, **others}


@pytest.mark.parametrize("dtype", DTYPES)
def test_example_all_gather(dtype: torch.dtype) -> None:
    inputs = [[[1, 2], [3, 4]], [[5, 6], [7, 8]]]
    results = all_gather_base_mm([_base_args(inputs[r], X2[r], dtype) for r in range(2)])
    expected = [
        [[1, 2, 3], [3, 4, 7], [5, 6, 11], [7, 8, 15]],
        [[2, 4, 2], [6, 8, 4], [10, 12, 6], [14, 16, 8]],
    ]
    for rank, ((output, valid), (gathered, gathered_valid)) in enumerate(results):
        assert output is not None
        assert gathered is not None
        assert output.dtype == gathered.dtype == dtype
        assert output.tolist() == expected[rank]
        assert gathered.tolist() == [[1, 2], [3, 4], [5, 6], [7, 8]]
        assert (valid, gathered_valid) == (4, 4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_example_reduce_scatter(dtype: torch.dtype) -> None:
    rows = torch.arange(8).reshape(4, 2)
    results = mm_reduce_scatter_base([_base_args(((r + 1) * rows).tolist(), X2[r], dtype) for r in range(2)])
    assert [_only(outputs).tolist() for outputs in results] == [
        [[0, 5, 3], [10, 15, 11]],
        [[20, 25, 19], [30, 35, 27]],
    ]
    assert all(_only(outputs).dtype == dtype for outputs in results)


def test_example_all_reduce() -> None:
    """The same matrices as reduce-scatter, so the same sum, whole on every rank; equal bias and x3 count twice."""
    rows = torch.arange(8.0).reshape(4, 2)
    others = {"bias": torch.tensor([1.0, 2.0, 3.0]), "x3": torch.full((4, 3), 0.5)}
    results = mm_all_reduce_base([_all_reduce_args((r + 1) * rows, torch.tensor(X2[r]).float(), **others) for r in range(2)])
    for outputs in results:
        assert _only(outputs).tolist() == [[3, 10, 10], [13, 20, 18], [23, 30, 26], [33, 40, 34]]


def test_example_antiquant_group() -> None:
    """x2 = (int8 + offset) * scale by groups of two rows, the last group having one: [[2], [4], [15]]."""
    args = _all_reduce_args(
        torch.tensor([[1.0, 10.0, 100.0]]),
        torch.tensor([[1], [3], [2]], dtype=torch.int8),
        antiquant_scale=torch.tensor([[1.0], [5.0]]),
        antiquant_offset=torch.tensor([[1.0], [1.0]]),
        antiquant_group_size=2,
    )
    assert _only(mm_all_reduce_base([args])[0]).tolist() == [[2 + 40 + 1500]]


def test_example_int8() -> None:
    """int32 sums [[1, 2]] @ [[3], [4]] = 11, plus bias 9 is 20; times 0.5, times the token's 3 is 30; twice it is 60."""
    args = _all_reduce_args(
        torch.tensor([[1, 2]], dtype=torch.int8),
        torch.tensor([[3], [4]], dtype=torch.int8),
        bias=torch.tensor([9], dtype=torch.int32),
        dequant_scale=torch.tensor([0.5]),
        pertoken_scale=torch.tensor([3.0]),
    )
    result = _only(mm_all_reduce_base([args, args])[1])
    assert result.tolist() == [[60]]
    assert result.dtype == torch.float16


@pytest.mark.parametrize("case", NAMED, ids=lambda case: case.id)
def test_named(case: Case) -> None:
    _check(case)


def test_random() -> None:
    for case in RANDOM:
        _check(case)


def test_random_cases_of_one_operator() -> None:
    for operator in OPERATORS:
        assert {random_case(seed, operator=operator).operator for seed in range(8)} == {operator}


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
def test_the_sum_over_ranks_is_rounded_once(world_size: int) -> None:
    """In float16, 2048 + 1 + 1 is 2048 if each sum is rounded; the float32 sum 2048 + (W - 1) is rounded at the end."""
    expected = torch.tensor(2048.0 + world_size - 1).to(torch.float16).item()
    terms = [2048.0] + [1.0] * (world_size - 1)
    ranks = [_base_args([[term]] * world_size, [[1.0]], torch.float16, world_size=world_size, bias=None) for term in terms]
    for outputs in mm_reduce_scatter_base(ranks):
        assert _only(outputs).item() == expected
    reduced = [_all_reduce_args(rank["self"], rank["x2"]) for rank in ranks]
    for outputs in mm_all_reduce_base(reduced):
        assert _only(outputs).tolist() == [[expected]] * world_size


def test_bias_is_added_before_rounding() -> None:
    """2048 + 1 is halfway between two float16 values and goes to 2048; with bias 1 the sum 2050 is exact."""
    args = _base_args([[2048, 1]], [[1], [1]], torch.float16, world_size=1, bias=torch.ones(1, dtype=torch.float16))
    output, _ = all_gather_base_mm([args])[0][0]
    assert output is not None
    assert output.item() == 2050


@pytest.mark.parametrize("operator", OPERATORS[:3])
def test_float64_stays_float64(operator: str) -> None:
    case = GatherScatterCase(id="float64", operator=operator, dtype=torch.float64, bias=True)
    ranks = _ranks(case)
    if operator == "mm_all_reduce_base":
        ranks = _ranks(AllReduceCase(id="float64", dtype=torch.float64, bias=True, x3=True))
    for outputs, (exact, _) in zip(GOLDENS[operator](ranks), _dense(operator, ranks), strict=True):
        output = outputs[0][0]
        assert output is not None
        assert output.dtype == torch.float64
        np.testing.assert_allclose(output.numpy(), exact, rtol=1e-13, atol=1e-13)


def test_packed_scale_is_read_from_the_low_half() -> None:
    values = [1.0, -0.375, 2.0**-20, 3.1415927410125732]
    packed = packed_scale(torch.tensor(values))
    assert packed.tolist() == [struct.unpack("<I", struct.pack("<f", value))[0] | 1 << 46 for value in values]
    ranks = [
        _base_args([[1]], [[1, 1, 1, 1]], torch.int8, world_size=1, x2_scale=scale.reshape(1, -1))
        for scale in (packed, torch.tensor(values))
    ]
    ranks[1]["output_dtype"] = torch.float16
    from_packed, from_float = (all_gather_base_mm([rank])[0][0][0] for rank in ranks)
    assert from_packed is not None
    assert from_float is not None
    assert from_packed.dtype == torch.float16
    assert from_packed.tolist() == from_float.tolist() == [torch.tensor(values).to(torch.float16).tolist()]


def test_int8_extremes_do_not_overflow() -> None:
    k = 65534
    x = torch.full((1, k), -128, dtype=torch.int8)
    args = _base_args([[0]], [[0]], torch.int8, world_size=1, x2_scale=torch.tensor([[2.0**-20]]))
    args.update({"self": x, "x2": x.t()})
    output, _ = all_gather_base_mm([args])[0][0]
    assert output is not None
    assert output.dtype == torch.bfloat16
    assert output.item() == torch.tensor(k * 16384 * 2.0**-20).to(torch.bfloat16).item()


def test_int8_sums_are_exact() -> None:
    """2**24 + 1 has no float32; the int32 bias takes 2**24 away before anything is rounded."""
    x1 = torch.tensor([[-128] * 1024 + [1]], dtype=torch.int8)
    bias = torch.tensor([-(2**24)], dtype=torch.int32)
    args = _all_reduce_args(x1, x1.t(), bias=bias, dequant_scale=torch.ones(1))
    assert _only(mm_all_reduce_base([args])[0]).item() == 1


def test_gathered_copies_do_not_share_memory() -> None:
    results = all_gather_base_mm(_ranks(GatherScatterCase(id="own memory")))
    first, second = results[0][1][0], results[1][1][0]
    assert first is not None
    assert second is not None
    assert torch.equal(first, second)
    assert first.data_ptr() != second.data_ptr()
    reduced = [_only(outputs) for outputs in mm_all_reduce_base(_ranks(AllReduceCase(id="own", dtype=torch.float32)))]
    assert reduced[0].data_ptr() != reduced[1].data_ptr()


def test_comm_quant_scales_are_not_read() -> None:
    with_scales = AllReduceCase(id="with", dequant="column", comm_quant="column")
    ranks = _ranks(with_scales)
    assert ranks[0]["comm_quant_scale_1"] is not None
    expected = [_only(outputs) for outputs in mm_all_reduce_base(ranks)]
    for rank in ranks:
        rank.update(comm_quant_scale_1=None, comm_quant_scale_2=None)
    for before, outputs in zip(expected, mm_all_reduce_base(ranks), strict=True):
        assert torch.equal(before, _only(outputs))


def test_barrier_of_one_value() -> None:
    results = distribute_barrier([{"x_ref": torch.tensor(3.5), "world_size": 1, "time_out": None, "elastic_info": None}])
    tensor, valid = results[0][0]
    assert tensor is not None
    assert (tensor.shape, tensor.item(), valid) == (torch.Size(()), 3.5, 1)


def test_inputs_are_left_alone() -> None:
    for case in NAMED[::5]:
        ranks = _ranks(case)
        GOLDENS[case.operator](ranks)
        for before, after in zip(_ranks(case), ranks, strict=True):
            for name, value in before.items():
                if isinstance(value, Tensor):
                    assert torch.equal(value, after[name])


def test_cases_touch_every_value() -> None:
    assert len({case.id for case in NAMED}) == len(NAMED)
    for operator in OPERATORS[:2]:
        cases = [case for case in NAMED if isinstance(case, GatherScatterCase) and case.operator == operator]
        assert {case.world_size for case in cases} == set(range(1, 9))
        assert {case.dtype for case in cases} == set(DTYPES)
        assert {case.comm_mode for case in cases} == {None, "ai_cpu", "aiv"}
        assert {case.x2_scale for case in cases} == {None, torch.float32, torch.int64}
        assert {case.output_dtype for case in cases} == {None, torch.float16, torch.bfloat16}
        for name in ("bias", "transposed_x2", "x1_scale"):
            assert {getattr(case, name) for case in cases} == {False, True}
    assert {case.gather_output for case in NAMED if isinstance(case, GatherScatterCase)} == {False, True}
    reductions = [case for case in NAMED if isinstance(case, AllReduceCase)]
    assert {case.world_size for case in reductions} == set(range(1, 9))
    assert {case.dtype for case in reductions} == set(DTYPES)
    assert {len(case.rows) for case in reductions} == {1, 2}
    assert {case.antiquant for case in reductions} == {"", "value", "column", "row", "group"}
    assert {case.dequant for case in reductions} == {"", "value", "column", "row"}
    assert {case.dequant_dtype for case in reductions} == {torch.float32, torch.bfloat16, torch.int64}
    assert {case.comm_quant for case in reductions} == {"", "column", "row"}
    for name in ("bias", "x3", "transposed_x2", "antiquant_offset", "pertoken"):
        assert {getattr(case, name) for case in reductions} == {False, True}
    assert {case.operator for case in RANDOM} == {case.operator for case in NAMED} == set(OPERATORS)
    x2 = GatherScatterCase(id="view", transposed_x2=True).args(0)["x2"]
    assert not x2.is_contiguous()
    assert x2.t().is_contiguous()


INT8 = torch.ones(2, 2, dtype=torch.int8)
ONE = torch.ones(1)


@pytest.mark.parametrize("operator", OPERATORS[:2])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"world_size": 3}, "rank 1: world_size is 3"),
        ({"self": torch.ones(4, 2)}, "shape of .* differs between ranks"),
        ({"self": torch.ones(2, 2).half(), "x2": torch.ones(2, 2).half()}, "dtype.* differs between ranks"),
    ],
)
def test_ranks_that_disagree(operator: str, change: dict[str, Any], message: str) -> None:
    ranks = [_base_args([[1, 2], [3, 4]], [[1, 2], [3, 4]]) for _ in range(2)]
    GOLDENS[operator](ranks)
    ranks[1].update(change)
    with pytest.raises(ValueError, match=message):
        GOLDENS[operator](ranks)


@pytest.mark.parametrize("operator", OPERATORS[:2])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"comm_turn": 1}, "comm_turn must be 0, got 1"),
        ({"self": INT8, "x2": INT8}, "x2_scale belongs to int8"),
        ({"x2_scale": ONE, "output_dtype": torch.float32}, "x2_scale belongs to int8"),
        ({"x1_scale": ONE}, "x1_scale needs x2_scale"),
    ],
)
def test_what_has_no_meaning(operator: str, change: dict[str, Any], message: str) -> None:
    ranks = [{**_base_args([[1, 2], [3, 4]], [[1, 2], [3, 4]]), **change} for _ in range(2)]
    with pytest.raises(ValueError, match=message):
        GOLDENS[operator](ranks)


def test_what_has_no_meaning_for_one_operator() -> None:
    def ranks(m: int = 2, **change: Any) -> list[dict[str, Any]]:
        return [_base_args([[1, 2]] * m, [[1], [2]], **change) for _ in range(2)]

    with pytest.raises(ValueError, match="gather_index must be 0"):
        all_gather_base_mm(ranks(gather_index=1))
    with pytest.raises(ValueError, match="reduce_op must be 'sum'"):
        mm_reduce_scatter_base(ranks(reduce_op="max"))
    with pytest.raises(ValueError, match="m = 3 rows"):
        mm_reduce_scatter_base(ranks(m=3))
    with pytest.raises(ValueError, match="world_size is 5"):
        distribute_barrier([{"x_ref": ONE, "world_size": 5}])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reduce_op": "max"}, "reduce_op must be 'sum'"),
        ({"comm_turn": 2}, "comm_turn must be 0"),
        ({"x1": torch.ones(3, 2)}, "shape of the output differs"),
        ({"x1": torch.ones(2, 2).half()}, "output dtype differs"),
        ({"x3": torch.ones(4, 2, 2)}, "shape of the product differs"),
        ({"x2": INT8}, "antiquant_scale belongs to"),
        ({"antiquant_scale": ONE}, "antiquant_scale belongs to"),
        ({"antiquant_offset": ONE}, "antiquant_offset needs antiquant_scale"),
        ({"dequant_scale": ONE}, "dequant_scale belongs to int8"),
        ({"pertoken_scale": ONE}, "pertoken_scale needs dequant_scale"),
        ({"x2": INT8, "antiquant_scale": torch.ones(2, 2), "antiquant_group_size": 2}, "2 rows of antiquant values"),
    ],
)
def test_all_reduce_of_what_has_no_meaning(change: dict[str, Any], message: str) -> None:
    ranks = [_all_reduce_args(torch.ones(2, 2), torch.ones(2, 2)) for _ in range(2)]
    mm_all_reduce_base(ranks)
    ranks[1].update(change)
    with pytest.raises(ValueError, match=message):
        mm_all_reduce_base(ranks)


def test_int8_all_reduce_of_what_has_no_meaning() -> None:
    with pytest.raises(ValueError, match="dequant_scale belongs to int8"):
        mm_all_reduce_base([_all_reduce_args(INT8, INT8)])
    with pytest.raises(ValueError, match="must be int32"):
        mm_all_reduce_base([_all_reduce_args(INT8, INT8, dequant_scale=ONE, bias=ONE)])


def _check(case: Case) -> None:
    """Shapes, dtypes and values of all outputs of all ranks against the dense computation."""
    ranks = _ranks(case)
    results = GOLDENS[case.operator](ranks)
    if isinstance(case, BarrierCase):
        for args, outputs in zip(ranks, results, strict=True):
            assert torch.equal(_only(outputs), args["x_ref"])
            assert _only(outputs).dtype == case.dtype
        return
    for rank, (outputs, (exact, terms)) in enumerate(zip(results, _dense(case.operator, ranks), strict=True)):
        _check_output(outputs[0], exact, terms, _expected_dtype(case))
        if case.operator == "all_gather_base_mm":
            assert isinstance(case, GatherScatterCase)
            _check_gathered(outputs[1], ranks, case)
        assert len(outputs) == (2 if case.operator == "all_gather_base_mm" else 1), rank


def _expected_dtype(case: GatherScatterCase | AllReduceCase) -> torch.dtype:
    if isinstance(case, GatherScatterCase):
        if case.x2_scale is None:
            return case.dtype
        if case.x2_scale == torch.int64 or case.output_dtype == torch.float16:
            return torch.float16
        return torch.bfloat16
    if not case.dequant:
        return case.dtype
    return torch.bfloat16 if case.dequant_dtype == torch.bfloat16 else torch.float16


def _check_output(output: tuple[Tensor | None, int], exact: Wide, terms: Wide, dtype: torch.dtype) -> None:
    """Within half a unit in the last place, plus what float32 sums lose, which grows with the terms' magnitudes."""
    tensor, valid = output
    assert tensor is not None
    assert tensor.dtype == dtype
    assert tensor.shape == exact.shape
    assert valid == exact.shape[0]
    allowed = 0.501 * torch.finfo(dtype).eps * np.abs(exact) + 2e-6 * terms + 1e-7
    assert np.all(np.abs(tensor.double().numpy() - exact) <= allowed)


def _check_gathered(output: tuple[Tensor | None, int], ranks: list[dict[str, Any]], case: GatherScatterCase) -> None:
    gathered, valid = output
    assert gathered is not None
    assert gathered.dtype == ranks[0]["self"].dtype
    if not case.gather_output:
        assert gathered.shape == (0,)
        assert valid == 0
        return
    assert gathered.shape == (case.m * case.world_size, case.k)
    assert valid == case.m * case.world_size
    for rank, args in enumerate(ranks):
        assert torch.equal(gathered[rank * case.m : (rank + 1) * case.m], args["self"])


def _dense(operator: str, ranks: list[dict[str, Any]]) -> list[tuple[Wide, Wide]]:
    """Per rank the first output in float64, and the same with all terms made positive, which bounds rounding errors."""
    exact, terms = (_dense_of(operator, ranks, absolute=absolute) for absolute in (False, True))
    return list(zip(exact, terms, strict=True))


def _dense_of(operator: str, ranks: list[dict[str, Any]], *, absolute: bool) -> list[Wide]:
    def wide(tensor: Tensor) -> Wide:
        values: Wide = (_unpacked(tensor) if tensor.dtype == torch.int64 else tensor).double().numpy()
        return np.abs(values) if absolute else values

    if operator == "mm_all_reduce_base":
        # The sum over ranks of x1 @ x2 is one product of the matrices laid side by side.
        x1 = np.concatenate([_left(args, wide) for args in ranks], axis=-1)
        x2 = np.concatenate([_right(args, wide) for args in ranks], axis=0)
        total = _sum_of_sides(ranks, wide) + np.einsum("...k,kn->...n", x1, x2)
        return [total] * len(ranks)
    sides = [wide(args["x2"]) * (1.0 if args["x2_scale"] is None else wide(args["x2_scale"])) for args in ranks]
    lefts = [wide(args["self"]) * (1.0 if args["x1_scale"] is None else wide(args["x1_scale"])) for args in ranks]
    biases = [0.0 if args["bias"] is None else wide(args["bias"]) for args in ranks]
    if operator == "all_gather_base_mm":
        return [np.concatenate(lefts) @ side + bias for side, bias in zip(sides, biases, strict=True)]
    total = np.concatenate(lefts, axis=1) @ np.concatenate(sides) + sum(biases)
    return list(total.reshape(len(ranks), -1, total.shape[1]))


def _left(args: dict[str, Any], wide: Any) -> Wide:
    """x1, with the scale of each of its rows."""
    x1: Wide = wide(args["x1"])
    if args["pertoken_scale"] is not None:
        x1 = x1 * wide(args["pertoken_scale"]).reshape(*x1.shape[:-1], 1)
    return x1


def _right(args: dict[str, Any], wide: Any) -> Wide:
    """x2 with its scales, element by element."""
    x2: Wide = wide(args["x2"])
    if args["dequant_scale"] is not None:
        x2 = x2 * wide(args["dequant_scale"])
    if args["antiquant_scale"] is None:
        return x2
    group_size = args["antiquant_group_size"]
    result = np.empty_like(x2)
    for row, column in np.ndindex(*x2.shape):

        def at(name: str, row: int = row, column: int = column) -> float:
            if args[name] is None:
                return 0.0
            values = np.atleast_2d(wide(args[name]))
            return float(values[row // group_size if group_size else 0, column % values.shape[1]])

        result[row, column] = (x2[row, column] + at("antiquant_offset")) * at("antiquant_scale")
    return result


def _sum_of_sides(ranks: list[dict[str, Any]], wide: Any) -> Wide:
    """What bias and x3 of all ranks add; the int32 bias of an int8 matmul is scaled with the product."""
    total = np.zeros((*ranks[0]["x1"].shape[:-1], ranks[0]["x2"].size(1)))
    for args in ranks:
        if args["bias"] is not None:
            bias = wide(args["bias"])
            if args["dequant_scale"] is not None:
                bias = bias * wide(args["dequant_scale"]).reshape(-1)
            if args["pertoken_scale"] is not None:
                bias = bias * wide(args["pertoken_scale"]).reshape(*total.shape[:-1], 1)
            total = total + bias
        if args["x3"] is not None:
            total = total + wide(args["x3"])
    return total


def _unpacked(scale: Tensor) -> Tensor:
    values = [struct.unpack("<f", struct.pack("<q", value)[:4])[0] for value in scale.flatten().tolist()]
    return torch.tensor(values).reshape(scale.shape)
