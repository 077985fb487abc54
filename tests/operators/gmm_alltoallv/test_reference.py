"""The goldens of grouped matmul + AlltoAllV against worked numbers and against a row-by-row account of who gets what."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from commfuse.operators.gmm_alltoallv.cases import (
    COUNT_TYPES,
    DTYPES,
    NAMED,
    OPERATORS,
    PATTERNS,
    GmmCase,
    count_lists,
    count_matrix,
    random_case,
)
from commfuse.operators.gmm_alltoallv.reference import alltoallv_gmm, gmm_alltoallv

GOLDENS = {"gmm_alltoallv": gmm_alltoallv, "alltoallv_gmm": alltoallv_gmm}
RANDOM = [random_case(seed) for seed in range(200)]

# The two-rank example: weight of global expert j is (j + 1) times the unit matrix; rows are told by their first column.
EXAMPLE_SEND = [[1, 2, 0, 1], [2, 0, 1, 1]]
EXAMPLE_RECV = [[1, 2, 2, 0], [0, 1, 1, 1]]
EXAMPLE_ROWS = [[10, 11, 12, 13], [20, 21, 22, 23]]


def _ranks(case: GmmCase) -> list[dict[str, Any]]:
    return [case.args(rank) for rank in range(case.world_size)]


def _args(gmm_x: Tensor, gmm_weight: Tensor, send: Any, recv: Any, **others: Any) -> dict[str, Any]:
    return {
        "gmm_x": gmm_x,
        "gmm_weight": gmm_weight,
        "ep_world_size": 2,
        "send_counts": send,
        "recv_counts": recv,
        "mm_x": None,
        "mm_weight": None,
        "trans_gmm_weight": False,
        "trans_mm_weight": False,
        "permute_out_flag": True,
        **others,
    }


def _example_weight(rank: int) -> Tensor:
    return torch.stack([torch.eye(2) * (2 * rank + expert + 1) for expert in range(2)])


def _rows(first_column: list[int]) -> Tensor:
    return torch.tensor([[value, -value] for value in first_column], dtype=torch.float32).reshape(-1, 2)


def _first_column(output: tuple[Tensor | None, int]) -> list[float]:
    tensor, valid = output
    assert tensor is not None
    assert valid == tensor.size(0)
    assert torch.equal(tensor[:, 0], -tensor[:, 1])
    return [int(value) for value in tensor[:, 0]]


def _example_there() -> list[list[tuple[Tensor | None, int]]]:
    return alltoallv_gmm([_args(_rows(EXAMPLE_ROWS[r]), _example_weight(r), EXAMPLE_SEND[r], EXAMPLE_RECV[r]) for r in range(2)])


def test_example_alltoallv_gmm() -> None:
    there = _example_there()
    assert [_first_column(outputs[2]) for outputs in there] == [[10, 20, 21, 11, 12], [22, 13, 23]]
    assert [_first_column(outputs[0]) for outputs in there] == [[10, 20, 21, 22, 24], [66, 52, 92]]
    assert [outputs[1] for outputs in there] == [(None, 0), (None, 0)]


def test_example_gmm_alltoallv() -> None:
    permuted = [outputs[2][0] for outputs in _example_there()]
    ranks = []
    for r, rows in enumerate(permuted):
        assert rows is not None
        ranks.append(_args(rows, _example_weight(r), EXAMPLE_RECV[r], EXAMPLE_SEND[r]))
    back = gmm_alltoallv(ranks)
    assert [_first_column(outputs[0]) for outputs in back] == [[10, 22, 24, 52], [20, 21, 66, 92]]
    assert [len(outputs) for outputs in back] == [2, 2]


@pytest.mark.parametrize("case", NAMED, ids=lambda case: case.id)
def test_named(case: GmmCase) -> None:
    _check_against_row_by_row(case)


def test_random() -> None:
    for case in RANDOM:
        _check_against_row_by_row(case)


@pytest.mark.parametrize("seed", range(100))
def test_each_undoes_the_movement_of_the_other(seed: int) -> None:
    """With unit matrices as weights nothing but movement is left, and going there and back changes no bit."""
    pattern = ("random", *PATTERNS)[seed % (1 + len(PATTERNS))]
    world_size, num_experts = 1 + seed % 8, 1 + seed % 5
    counts = count_lists(count_matrix(seed, world_size=world_size, num_experts=num_experts, pattern=pattern))
    unit = torch.eye(3, dtype=torch.float16).expand(num_experts, 3, 3)
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randn(sum(send), 3, generator=generator).to(torch.float16) for send, _ in counts]

    def go(operator: str, rows: list[Any], *, back: bool) -> list[list[tuple[Tensor | None, int]]]:
        lists = [(recv, send) if back else (send, recv) for send, recv in counts]
        args = [_args(x, unit, send, recv, ep_world_size=world_size) for x, (send, recv) in zip(rows, lists, strict=True)]
        return GOLDENS[operator](args)

    for first, second in (OPERATORS, OPERATORS[::-1]):
        there = [outputs[0][0] for outputs in go(first, rows, back=False)]
        again = [outputs[0][0] for outputs in go(second, there, back=True)]
        for before, after in zip(rows, again, strict=True):
            assert after is not None
            assert torch.equal(before.view(torch.int16), after.view(torch.int16))


def test_products_are_accumulated_in_float32_and_rounded_once() -> None:
    """2048 + 1 + 1 is 2050 in float16 when rounded once, and 2048 when every addition is rounded."""
    x = torch.tensor([[2048.0, 1.0, 1.0]], dtype=torch.float16)
    args = _args(x, torch.ones(1, 3, 1, dtype=torch.float16), [1], [1], ep_world_size=1, mm_x=x)
    args["mm_weight"] = torch.ones(3, 1, dtype=torch.float16)
    for golden in GOLDENS.values():
        (y, _), (mm_y, _) = golden([args])[0][:2]
        assert y is not None
        assert mm_y is not None
        assert y.item() == mm_y.item() == 2050
        assert y.dtype == mm_y.dtype == torch.float16


def test_float64_stays_float64() -> None:
    for operator, golden in GOLDENS.items():
        ranks = _ranks(GmmCase(id="float64", operator=operator, dtype=torch.float64, BS=3))
        for args, outputs in zip(ranks, golden(ranks), strict=True):
            (y, _), (mm_y, _) = outputs[:2]
            assert y is not None
            assert mm_y is not None
            assert y.dtype == mm_y.dtype == torch.float64
            torch.testing.assert_close(mm_y, args["mm_x"] @ args["mm_weight"], rtol=1e-14, atol=1e-14)


def test_the_type_of_the_counts_changes_nothing() -> None:
    for operator, golden in GOLDENS.items():
        case = GmmCase(id="counts", operator=operator, world_size=3)
        expected = golden(_ranks(case))
        for counts_type in COUNT_TYPES:
            result = golden(_ranks(replace(case, counts_type=counts_type)))
            assert all(torch.equal(_tensor(a[0]), _tensor(b[0])) for a, b in zip(expected, result, strict=True))


def test_inputs_are_left_alone() -> None:
    for case in NAMED[::7]:
        ranks = _ranks(case)
        GOLDENS[case.operator](ranks)
        for before, after in zip(_ranks(case), ranks, strict=True):
            assert before.keys() == after.keys()
            for name, value in before.items():
                if isinstance(value, Tensor):
                    assert torch.equal(value, after[name])


def test_counts_of_all_ranks_agree() -> None:
    for seed in range(50):
        case = random_case(seed)
        counts = case.counts()
        for i in range(case.world_size):
            for j in range(case.world_size):
                for expert in range(case.num_experts):
                    sent = counts[i][0][j * case.num_experts + expert]
                    assert sent == counts[j][1][i * case.num_experts + expert]


def test_cases_touch_every_value() -> None:
    assert len({case.id for case in NAMED}) == len(NAMED)
    assert {case.operator for case in NAMED} == set(OPERATORS)
    for operator in OPERATORS:
        cases = [case for case in NAMED if case.operator == operator]
        assert {case.world_size for case in cases} == set(range(1, 9))
        assert {case.counts_type for case in cases} == set(COUNT_TYPES)
        assert {case.dtype for case in cases} == set(DTYPES)
        assert {case.pattern for case in cases} == set(PATTERNS)
        flags = {(case.trans_gmm_weight, case.trans_mm_weight, case.BS > 0, case.strided) for case in cases}
        assert {flag for values in flags for flag in enumerate(values)} == {(i, b) for i in range(4) for b in (False, True)}
    assert {case.permute_out_flag for case in NAMED if case.operator == "alltoallv_gmm"} == {False, True}
    strided = GmmCase(id="strided", strided=True, BS=4).args(0)
    assert not any(strided[name].is_contiguous() for name in ("gmm_x", "gmm_weight", "mm_x", "mm_weight"))


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"send_counts": [3, 0, 0, 1]}, "rank 0 sends .* to rank 0"),
        ({"send_counts": [1, 2, 0, 2]}, "add up to 5"),
        ({"recv_counts": [2, 1, 2, 0]}, "which expects"),
        ({"recv_counts": [1, 2, 2]}, "3 entries"),
        ({"recv_counts": [4, -1, 2, 0]}, "negative"),
        ({"ep_world_size": 3}, "ep_world_size is 3"),
        ({"gmm_weight": torch.ones(2, 3, 2)}, "width 2"),
        ({"gmm_weight": torch.ones(3, 2, 2)}, r"number of experts \(e\) differs"),
        ({"gmm_x": torch.ones(4, 2, dtype=torch.float16)}, "dtype of gmm_x differs"),
        ({"mm_x": torch.ones(1, 2)}, "together"),
        ({"mm_weight": torch.ones(2, 2)}, "together"),
    ],
)
def test_ranks_that_disagree(operator: str, change: dict[str, Any], message: str) -> None:
    ranks = [_args(_rows(EXAMPLE_ROWS[r]), _example_weight(r), EXAMPLE_SEND[r], EXAMPLE_RECV[r]) for r in range(2)]
    GOLDENS[operator](ranks)
    ranks[0].update(change)
    with pytest.raises(ValueError, match=message):
        GOLDENS[operator](ranks)


@pytest.mark.parametrize(
    ("operator", "change"),
    [
        ("gmm_alltoallv", {"gmm_weight": torch.ones(2, 2, 3)}),
        ("alltoallv_gmm", {"gmm_x": torch.ones(4, 3), "gmm_weight": torch.ones(2, 3, 2)}),
    ],
)
def test_rows_that_travel_have_one_width(operator: str, change: dict[str, Any]) -> None:
    ranks = [_args(_rows(EXAMPLE_ROWS[r]), _example_weight(r), EXAMPLE_SEND[r], EXAMPLE_RECV[r]) for r in range(2)]
    ranks[1].update(change)
    with pytest.raises(ValueError, match=r"width of an .* differs between ranks"):
        GOLDENS[operator](ranks)


def test_unknown_pattern() -> None:
    with pytest.raises(ValueError, match="no count pattern"):
        count_matrix(0, world_size=2, num_experts=1, pattern="nonsense")


def _check_against_row_by_row(case: GmmCase) -> None:
    """Follow every single row by a record of where it comes from, sort the records as published, compare."""
    ranks = _ranks(case)
    results = GOLDENS[case.operator](ranks)
    records = _records(case)
    for me, (args, outputs) in enumerate(zip(ranks, results, strict=True)):
        if case.operator == "gmm_alltoallv":
            mine = sorted((i, expert, row) for i, j, expert, row in records if j == me)
            holders = [i for i, _, _ in mine]
            experts = [expert for _, expert, _ in mine]
            rows = [ranks[i]["gmm_x"][row] for i, _, row in mine]
            expected_count = 2
        else:
            placed = sorted((expert, i, row) for i, j, expert, row in records if j == me)
            holders = [me] * len(placed)
            experts = [expert for expert, _, _ in placed]
            rows = [ranks[i]["gmm_x"][row] for _, i, row in placed]
            expected_count = 3
            _check_permuted(outputs[2], rows, case)
        assert len(outputs) == expected_count
        weights = [ranks[holder]["gmm_weight"][expert] for holder, expert in zip(holders, experts, strict=True)]
        _check_products(outputs[0], rows, weights, case)
        _check_shared_expert(outputs[1], args, case)


def _records(case: GmmCase) -> list[tuple[int, int, int, int]]:
    """`(source rank, destination rank, local expert, row of the source's gmm_x)` of every row."""
    matrix = count_matrix(
        case.seed,
        world_size=case.world_size,
        num_experts=case.num_experts,
        pattern=case.pattern,
        largest=case.largest,
    )
    records = []
    for i in range(case.world_size):
        keys = [
            (j, expert) for j in range(case.world_size) for expert in range(case.num_experts) for _ in range(matrix[i, j, expert])
        ]
        if case.operator == "gmm_alltoallv":
            keys.sort(key=lambda key: (key[1], key[0]))
        records += [(i, j, expert, row) for row, (j, expert) in enumerate(keys)]
    return records


def _check_products(output: tuple[Tensor | None, int], rows: list[Tensor], weights: list[Tensor], case: GmmCase) -> None:
    y, valid = output
    assert y is not None
    assert y.shape == (len(rows), case.N1)
    assert y.dtype == case.dtype
    assert valid == len(rows)
    for row, weight, result in zip(rows, weights, y, strict=True):
        matrix = weight.double().numpy()
        exact = row.double().numpy() @ (matrix.T if case.trans_gmm_weight else matrix)
        _close(result, exact)


def _check_permuted(output: tuple[Tensor | None, int], rows: list[Tensor], case: GmmCase) -> None:
    permuted, valid = output
    if not case.permute_out_flag:
        assert permuted is None
        assert valid == 0
        return
    assert permuted is not None
    assert permuted.shape == (len(rows), case.H1)
    assert permuted.dtype == case.dtype
    assert valid == len(rows)
    assert all(torch.equal(a, b) for a, b in zip(rows, permuted, strict=True))


def _check_shared_expert(output: tuple[Tensor | None, int], args: dict[str, Any], case: GmmCase) -> None:
    mm_y, valid = output
    assert valid == case.BS
    if not case.BS:
        assert mm_y is None
        return
    assert mm_y is not None
    assert mm_y.shape == (case.BS, case.N2)
    assert mm_y.dtype == case.dtype
    weight = args["mm_weight"].double().numpy()
    _close(mm_y, args["mm_x"].double().numpy() @ (weight.T if case.trans_mm_weight else weight))


def _close(result: Tensor, exact: Any) -> None:
    """Half a unit in the last place of the dtype, and what float32 sums of up to 256 terms near 1 may lose."""
    half_unit = torch.finfo(result.dtype).eps / 2
    np.testing.assert_allclose(result.double().numpy(), exact, rtol=1.01 * half_unit, atol=3e-6)


def _tensor(output: tuple[Tensor | None, int]) -> Tensor:
    assert output[0] is not None
    return output[0]
