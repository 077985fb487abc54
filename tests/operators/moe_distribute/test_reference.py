"""The goldens of dispatch v2 and combine v2 against worked examples, invariants and a dense formula."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from commfuse.operators.moe_distribute.reference import combine_v2, dispatch_v2
from commfuse.operators.moe_distribute.reference_rows import over_the_wire, quantize_rows

from .calls import Args, Outputs, clones, column_0, combine_calls, dispatch_calls, tokens, valid

# --- dispatch: worked examples ---------------------------------------------------------------------------------------

Triplets = list[tuple[int, int, int]]


@dataclass(frozen=True, kw_only=True)
class Routed:
    """A routing, and per rank what every receiver holds. `counts` is the running sum, `nums` the rows per expert."""

    id: str
    ids: Any
    experts: int
    nums: list[list[int]]
    counts: list[list[int]]
    triplets: list[Triplets]
    masks: Any = None
    shared: tuple[int, int] = (1, 0)
    special: tuple[int, int, int] = (0, 0, 0)

    def calls(self, **changes: Any) -> list[Args]:
        zero, copy, const = self.special
        return dispatch_calls(
            tokens(len(self.ids), len(self.ids[0])),
            self.ids,
            self.experts,
            masks=self.masks,
            shared_expert_num=self.shared[0],
            shared_expert_rank_num=self.shared[1],
            zero_expert_num=zero,
            copy_expert_num=copy,
            const_expert_num=const,
            **changes,
        )


IDS_A = [[[0, 2], [3, 1], [2, 3]], [[1, 0], [2, 0], [3, 1]]]
IDS_B = [[[0, 3], [1, 2]], [[3, 0], [2, 1]], [[0, 1], [2, 3]], [[1, 3], [0, 2]]]
IDS_C = [[[0, 4, 5], [5, 6, 3]], [[6, 1, 2], [4, 5, 6]]]
MASKS_1D = [[1, 1, 0], [1, 0, 0]]
MASKS_2D = [[[1, 1], [0, 1], [0, 0]], [[1, 0], [0, 0], [1, 1]]]

MOE_ROWS_B: list[Triplets] = [
    [(0, 0, 0), (1, 0, 1), (2, 0, 0), (3, 1, 0), (0, 1, 0), (1, 1, 1), (2, 0, 1), (3, 0, 0)],
    [(0, 1, 1), (1, 1, 0), (2, 1, 0), (3, 1, 1), (0, 0, 1), (1, 0, 0), (2, 1, 1), (3, 0, 1)],
]
EVERY_TOKEN_B = [(r, t) for r in range(4) for t in range(2)]

PLAIN = Routed(
    id="two-ranks",
    ids=IDS_A,
    experts=4,
    nums=[[3, 3], [3, 3]],
    counts=[[1, 3, 4, 6], [2, 3, 5, 6]],
    triplets=[
        [(0, 0, 0), (1, 0, 1), (1, 1, 1), (0, 1, 1), (1, 0, 0), (1, 2, 1)],
        [(0, 0, 1), (0, 2, 0), (1, 1, 0), (0, 1, 0), (0, 2, 1), (1, 2, 0)],
    ],
)
MASKED_1D = Routed(
    id="mask-1d",
    ids=IDS_A,
    experts=4,
    masks=MASKS_1D,
    nums=[[2, 2], [1, 1]],
    counts=[[1, 2, 3, 4], [1, 1, 2, 2]],
    triplets=[[(0, 0, 0), (1, 0, 1), (0, 1, 1), (1, 0, 0)], [(0, 0, 1), (0, 1, 0)]],
)
MASKED_2D = Routed(
    id="mask-2d",
    ids=IDS_A,
    experts=4,
    masks=MASKS_2D,
    nums=[[1, 3], [1, 1]],
    counts=[[1, 1, 2, 4], [1, 1, 1, 2]],
    triplets=[[(0, 0, 0), (0, 1, 1), (1, 0, 0), (1, 2, 1)], [(0, 0, 1), (1, 2, 0)]],
)
ONE_SHARED = Routed(
    id="one-shared-expert-on-two-ranks",
    ids=IDS_B,
    experts=4,
    shared=(1, 2),
    nums=[[4], [4], [4, 4], [4, 4]],
    counts=[[2, 2, 4, 4], [0, 2, 2, 4], [1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 3, 4, 5, 6, 7, 8]],
    triplets=[
        [(0, 0, 2), (0, 1, 2), (2, 0, 2), (2, 1, 2)],
        [(1, 0, 2), (1, 1, 2), (3, 0, 2), (3, 1, 2)],
        *MOE_ROWS_B,
    ],
)
TWO_SHARED = Routed(
    id="two-shared-experts",
    ids=IDS_B,
    experts=4,
    shared=(2, 2),
    nums=[[8], [8], [4, 4], [4, 4]],
    counts=[[2, 4, 6, 8], [2, 4, 6, 8], [1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 3, 4, 5, 6, 7, 8]],
    triplets=[[(r, t, 2) for r, t in EVERY_TOKEN_B], [(r, t, 3) for r, t in EVERY_TOKEN_B], *MOE_ROWS_B],
)
SPECIAL = Routed(
    id="special-experts",
    ids=IDS_C,
    experts=4,
    special=(1, 1, 1),
    nums=[[1, 1], [1, 1]],
    counts=[[1, 1, 1, 2], [0, 1, 2, 2]],
    triplets=[[(0, 0, 0), (1, 0, 1)], [(1, 0, 2), (0, 1, 2)]],
)
ROUTED = [PLAIN, MASKED_1D, MASKED_2D, ONE_SHARED, TWO_SHARED, SPECIAL]


@pytest.mark.parametrize("example", ROUTED, ids=lambda example: example.id)
def test_dispatch_routes_as_worked_out(example: Routed) -> None:
    calls = example.calls()
    for rank, outputs in enumerate(dispatch_v2(calls)):
        expand_x, _, assist, nums, counts, _, _ = (valid(output) for output in outputs)
        assert assist.reshape(-1, 3).tolist() == [list(row) for row in example.triplets[rank]]
        assert counts.tolist() == example.counts[rank]
        assert nums.tolist() == example.nums[rank]
        rows = [calls[source]["x"][token] for source, token, _ in example.triplets[rank]]
        assert torch.equal(expand_x, torch.stack(rows))


@pytest.mark.parametrize("example", ROUTED, ids=lambda example: example.id)
def test_token_nums_of_type_0_are_prefix_sums(example: Routed) -> None:
    for rank, outputs in enumerate(dispatch_v2(example.calls(expert_token_nums_type=0))):
        assert valid(outputs[3]).tolist() == torch.tensor(example.nums[rank]).cumsum(0).tolist()


def test_first_column_of_the_dispatched_rows() -> None:
    assert column_0(dispatch_v2(PLAIN.calls())) == [[0, 100, 110, 10, 100, 120], [0, 20, 110, 10, 20, 120]]


def test_rows_reserved_on_shared_expert_ranks() -> None:
    assert dispatch_v2(ONE_SHARED.calls())[0][0][0].shape == (4, 8)  # type: ignore[union-attr]
    assert dispatch_v2(TWO_SHARED.calls())[0][0][0].shape == (8, 8)  # type: ignore[union-attr]
    assert dispatch_v2(ONE_SHARED.calls())[2][0][0].shape == (16, 8)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("example", "expected"),
    [
        (PLAIN, [[0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 0, 1]]),
        (MASKED_1D, [[0, 0, 0, 0], [0, 0]]),
        (MASKED_2D, [[0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1]]),
        (SPECIAL, [[0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]]),
    ],
    ids=lambda value: getattr(value, "id", None),
)
def test_a2_puts_the_v1_index_into_assist_info(example: Routed, expected: list[list[int]]) -> None:
    outputs = dispatch_v2(example.calls(), product="A2")
    assert [valid(results[2]).tolist() for results in outputs] == expected


def test_a2_index_does_not_count_masked_pairs() -> None:
    """Token 1 of rank 0 leaves out expert 0, so token 2 is the second row for it and not the third."""
    ids = [[[0], [0], [0]], [[1], [1], [0]]]
    outputs = dispatch_v2(dispatch_calls(tokens(2, 3), ids, 2, masks=[[[1], [0], [1]], [[1], [1], [1]]]), product="A2")
    assert [valid(results[2]).tolist() for results in outputs] == [[0, 0, 1], [0, 1, 0]]


def test_a_1d_mask_counts_and_does_not_select() -> None:
    ids = [[[0], [0], [0]]]
    outputs = dispatch_v2(dispatch_calls(tokens(1, 3), ids, 1, masks=[[0, 1, 1]]))
    assert column_0(outputs) == [[0, 10]]
    outputs = dispatch_v2(dispatch_calls(tokens(1, 3), ids, 1, masks=[[[0], [1], [1]]]))
    assert column_0(outputs) == [[10, 20]]


def test_dispatch_with_tensor_parallelism_as_worked_out() -> None:
    """Physical rank 2 * ep + tp has rows 100 * (2 * ep + tp) + 10 * token."""
    x = tokens(4, 2)
    calls = [
        args for tp in (0, 1) for args in dispatch_calls([x[tp], x[2 + tp]], [[[0], [1]]] * 2, 2, tp_world_size=2, tp_rank_id=tp)
    ]
    outputs = dispatch_v2(calls)
    assert column_0(outputs) == [[0, 200, 100, 300], [10, 210, 110, 310], [100, 300, 0, 200], [110, 310, 10, 210]]
    own = [[0, 0, 0, 1, 0, 0], [0, 1, 0, 1, 1, 0]]  # assist_info_for_combine leaves the partner's rows out
    assert [valid(results[2]).tolist() for results in outputs] == own * 2
    for results in outputs:
        assert valid(results[3]).tolist() == [4]
        assert valid(results[4]).tolist() == [1, 2, 1, 2]
        assert valid(results[5]).tolist() == [2, 2]


def test_unequal_batches_need_global_bs() -> None:
    calls = PLAIN.calls()
    calls[0]["x"], calls[0]["expert_ids"] = calls[0]["x"][:1], calls[0]["expert_ids"][:1]
    with pytest.raises(ValueError, match=r"unequal batch sizes \[1, 3\]"):
        dispatch_v2(calls)
    for args in calls:
        args["global_bs"] = 6
    outputs = dispatch_v2(calls)
    assert column_0(outputs) == [[0, 100, 110, 100, 120], [0, 110, 120]]
    assert outputs[0][0][0].shape == (12, 8)  # type: ignore[union-attr]


# --- int8 ------------------------------------------------------------------------------------------------------------

ROW = [1, -2, 0.5, 3.5, -0.25, 0, 2.75, -3]
SMOOTH = [1, 0.5, 2, 1, 4, 1, 0.25, 1]
TINY = 127 / torch.finfo(torch.float32).max


@pytest.mark.parametrize(
    ("row", "smooth", "quantised", "scale"),
    [
        pytest.param(ROW, None, [36, -73, 18, 127, -9, 0, 100, -109], 0.027559055, id="plain"),
        pytest.param(ROW, SMOOTH, [36, -36, 36, 127, -36, 0, 25, -109], 0.027559055, id="smooth"),
        pytest.param([127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 63.5], None, [127, 0, 2, 2, 0, -2, -2, 64], 1.0, id="ties"),
        pytest.param([0] * 8, None, [0] * 8, 0.0, id="zeros"),
        pytest.param([TINY * 0.9, 0, 0, 0, 0, 0, 0, -TINY / 2], None, [0] * 8, 0.0, id="too-small-to-divide"),
        pytest.param([1, math.nan, 2, 3, 4, 5, 6, 7], None, [0] * 8, math.nan, id="nan"),
        pytest.param([1, -math.inf, 2, 3, 4, 5, 6, 7], None, [0] * 8, math.nan, id="infinity"),
        pytest.param([3e38] + [0] * 7, [3.0] * 8, [0] * 8, math.nan, id="infinity-through-smooth-factors"),
    ],
)
def test_quantised_row(row: list[float], smooth: list[float] | None, quantised: list[int], scale: float) -> None:
    values, scales = quantize_rows(torch.tensor([row]), None if smooth is None else torch.tensor([smooth]))
    assert values.dtype == torch.int8
    assert values.tolist() == [quantised]
    torch.testing.assert_close(scales, torch.tensor([scale]), rtol=1e-7, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_quantised_row_in_every_dtype(dtype: torch.dtype) -> None:
    values, scales = quantize_rows(torch.tensor([ROW], dtype=dtype), torch.tensor([SMOOTH]))
    assert values.tolist() == [[36, -36, 36, 127, -36, 0, 25, -109]]
    assert scales.dtype == torch.float32
    assert scales.item() == pytest.approx(0.027559055)


def test_a_bad_row_spoils_no_other() -> None:
    rows = torch.tensor([[math.nan, 1.0], [1.0, -2.0], [0.0, 0.0], [math.inf, 1.0], [4.0, 4.0]])
    values, scales = quantize_rows(rows, None)
    assert values.tolist() == [[0, 0], [64, -127], [0, 0], [0, 0], [127, 127]]
    assert scales.isnan().tolist() == [True, False, False, True, False]


def test_the_scale_is_the_reciprocal_of_the_multiplier() -> None:
    """1 / (127 / m), each rounded to float32, is not always m / 127: here the last bit differs."""
    largest = torch.tensor([0.1, 0.7, 1.1, 1.9, 2.3, 3.3, 4.7, 5.9])
    _, scales = quantize_rows(largest.unsqueeze(1), None)
    one, most = torch.tensor(1.0), torch.tensor(127.0)
    assert torch.equal(scales, one / (most / largest))
    assert not torch.equal(scales, largest / most)


def test_each_destination_smooths_the_row_its_own_way() -> None:
    """Scales row 0 belongs to the shared expert, row 1 + j to MoE expert j."""
    x = torch.tensor([[1.0, 2.0]])
    scales = torch.tensor([[1.0, 1.0], [2.0, 1.0], [1.0, 4.0]])
    outputs = dispatch_v2(dispatch_calls([x] * 3, [[[0, 1]]] * 3, 2, shared_expert_rank_num=1, quant_mode=2, scales=scales))
    assert [valid(results[0])[0].tolist() for results in outputs] == [[64, 127], [127, 127], [16, 127]]
    largest = [valid(results[1])[0].item() * 127 for results in outputs]
    assert largest == pytest.approx([2, 2, 8])


def test_wire_block_as_worked_out() -> None:
    arrived = over_the_wire(torch.tensor([ROW], dtype=torch.float16))
    assert [round(value, 3) for value in arrived[0].tolist()] == [0.992, -2.012, 0.496, 3.5, -0.248, 0, 2.756, -3.004]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_wire_blocks_do_not_touch_each_other(dtype: torch.dtype) -> None:
    """Blocks of 8: ordinary, NaN, infinity, zeros, too small for a scale, and an ordinary rest of 2."""
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    blocks: list[list[float]] = [
        [127, 127, 1, -1, 0, 5, -127, 64],
        [math.nan, 1, 2, 3, 4, 5, 6, 7],
        [1, 2, 3, 4, 5, 6, 7, -math.inf],
        [0] * 8,
        [smallest] * 8,
        [127, -127],
    ]
    arrived = over_the_wire(torch.tensor([[value for block in blocks for value in block]], dtype=dtype))
    assert arrived[0, :8].tolist() == [127, 127, 1, -1, 0, 5, -127, 64]
    assert arrived[0, 8:24].isnan().all()
    assert arrived[0, 24:40].tolist() == [0] * 16
    assert arrived[0, 40:].tolist() == [127, -127]


def test_combine_sends_every_row_over_the_wire() -> None:
    """Rows of the own rank and rows of a shared expert too. Both experts are the identity."""
    x = [torch.tensor([ROW], dtype=torch.float16)] * 2
    calls = dispatch_calls(x, [[[0]]] * 2, 1, shared_expert_rank_num=1)
    combine = combine_calls(calls, dispatch_v2(calls), [[[2.0]]] * 2, comm_quant_mode=2)
    arrived = over_the_wire(x[0]).float()
    assert not torch.equal(arrived, x[0].float())
    for results in combine_v2(combine):
        assert torch.equal(valid(results[0]), (2 * arrived + arrived).half())


def test_wire_rounds_to_fp16_first() -> None:
    """The quotient 64.498 is 64.5 in fp16, which goes to the even 64; 65.498 goes by 65.5 to 66 and not to 65."""
    arrived = over_the_wire(torch.tensor([[127.0, 64.498, 65.498, 0, 0, 0, 0, 0]]))
    assert (arrived / arrived[0, 0] * 127).round()[0, :3].tolist() == [127, 64, 66]


# --- combine: worked examples ----------------------------------------------------------------------------------------

WEIGHTS_A = [[[0.5, 0.25], [0.75, 0.125], [1, 0.5]], [[0.25, 0.5], [0.5, 1], [0.125, 0.25]]]


def times_expert_plus_one(args: list[Args], outputs: Outputs) -> list[Tensor]:
    """Expert outputs of example A: expert j multiplies by j + 1."""
    y = []
    for rank, results in enumerate(outputs):
        nums, expand_x = valid(results[3]), results[0][0]
        assert expand_x is not None
        local = torch.repeat_interleave(torch.arange(len(nums)), nums)
        rows = torch.full_like(expand_x, math.nan)
        rows[: len(local)] = valid(results[0]) * (rank * len(nums) + local + 1).unsqueeze(1)
        y.append(rows)
    return y


@pytest.mark.parametrize("product", ["portable", "A2"])
def test_combine_as_worked_out(product: str) -> None:
    calls = PLAIN.calls()
    outputs = dispatch_v2(calls, product=product)
    y = times_expert_plus_one(calls, outputs)
    assert [rows[:6, 0].tolist() for rows in y] == [[0, 100, 110, 20, 200, 240], [0, 60, 330, 40, 80, 480]]
    combined = combine_v2(combine_calls(calls, outputs, WEIGHTS_A, y), product=product)
    column = torch.arange(8)
    expected = [
        torch.stack([1.25 * column, 32.5 + 3.25 * column, 100 + 5 * column]),
        torch.stack([100 + 1.0 * column, 275 + 2.5 * column, 120 + 1.0 * column]),
    ]
    for results, rows in zip(combined, expected, strict=True):
        torch.testing.assert_close(results[0][0], rows.half(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("example", "expected"),
    [(MASKED_1D, [[0, 8.75, 0], [75, 0, 0]]), (MASKED_2D, [[0, 1.25, 0], [25, 0, 45]])],
    ids=["mask-1d", "mask-2d"],
)
@pytest.mark.parametrize("product", ["portable", "A2"])
def test_combine_with_mask_as_worked_out(example: Routed, expected: list[list[float]], product: str) -> None:
    calls = example.calls()
    outputs = dispatch_v2(calls, product=product)
    assert column_0(combine_v2(combine_calls(calls, outputs, WEIGHTS_A), product=product)) == expected


@pytest.mark.parametrize(
    ("example", "expected"),
    [
        (ONE_SHARED, [[0, 12.5], [150, 165], [250, 262.5], [450, 465]]),
        (TWO_SHARED, [[0, 17.5], [175, 192.5], [350, 367.5], [525, 542.5]]),
    ],
    ids=lambda value: getattr(value, "id", None),
)
def test_combine_with_shared_experts_as_worked_out(example: Routed, expected: list[list[float]]) -> None:
    calls = example.calls()
    outputs = dispatch_v2(calls)
    factors = [0.25, 0.5, 1, 1]
    combine = combine_calls(calls, outputs, [[[0.5] * 2] * 2] * 4)
    for args, factor in zip(combine, factors, strict=True):
        args["expand_x"] = args["expand_x"] * factor
    combined = combine_v2(combine)
    assert column_0(combined) == expected


def special_expert_calls(alpha_1: Tensor, alpha_2: Tensor) -> list[Args]:
    """Example C: zero expert 4, copy expert 5, const expert 6 with v of ones; all other experts are the identity."""
    x = [torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8], [2] * 8]).half() * (rank + 1) for rank in range(2)]
    calls = dispatch_calls(x, IDS_C, 4, zero_expert_num=1, copy_expert_num=1, const_expert_num=1)
    return combine_calls(
        calls,
        dispatch_v2(calls),
        [[[0.5, 0.25, 0.25]] * 2] * 2,
        const_expert_alpha_1=alpha_1.half(),
        const_expert_alpha_2=alpha_2.half(),
        const_expert_v=torch.ones(1, 8).half(),
    )


ROW_0 = [0.75, 1.5, 2.25, 3, 3.75, 4.5, 5.25, 6]


@pytest.mark.parametrize(
    ("alpha_1", "alpha_2", "const_expert", "expected"),
    [
        pytest.param(
            torch.tensor([2.0]),
            torch.tensor([3.0]),
            "linear",
            [[ROW_0, [3.25] * 8], [[4.5, 7.5, 10.5, 13.5, 16.5, 19.5, 22.5, 25.5], [3.75] * 8]],
            id="scalars",
        ),
        pytest.param(
            torch.tensor([2.0]),
            torch.tensor([3.0]),
            "softmax",
            [[ROW_0, [3.25] * 8], [[4.5, 7.5, 10.5, 13.5, 16.5, 19.5, 22.5, 25.5], [3.75] * 8]],
            id="scalars-are-no-gate",
        ),
        pytest.param(
            torch.full((1, 8), 0.125),
            torch.zeros(1, 8),
            "linear",
            [[ROW_0, [1.5625] * 8], [[1.125, 2.25, 3.375, 4.5, 5.625, 6.75, 7.875, 9], [1.125] * 8]],
            id="elementwise",
        ),
        pytest.param(
            torch.full((1, 8), 0.125),
            torch.zeros(1, 8),
            "softmax",
            [[ROW_0, [1.97] * 8], [[2, 4, 6, 8, 10, 12, 14, 16], [1.986] * 8]],
            id="gate",
        ),
    ],
)
def test_special_experts_as_worked_out(
    alpha_1: Tensor, alpha_2: Tensor, const_expert: str, expected: list[list[list[float]]]
) -> None:
    combined = combine_v2(special_expert_calls(alpha_1, alpha_2), const_expert=const_expert)
    tolerance = 1e-3 if const_expert == "softmax" else 0
    for results, rows in zip(combined, expected, strict=True):
        torch.testing.assert_close(valid(results[0]), torch.tensor(rows).half(), rtol=tolerance, atol=tolerance)


def test_gate_is_a_softmax_of_dot_products() -> None:
    alpha_1, alpha_2 = torch.linspace(-1, 1, 8).reshape(1, 8), torch.linspace(0.5, -0.25, 8).reshape(1, 8)
    calls = special_expert_calls(alpha_1, alpha_2)
    x = calls[1]["ori_x"][0].double()
    gate = torch.stack([calls[1][f"const_expert_alpha_{i}"][0].double() @ x for i in (1, 2)]).exp()
    const = (gate[0] * x + gate[1]) / gate.sum()
    combined = valid(combine_v2(calls, const_expert="softmax")[1][0])
    # Token 0 of rank 1 goes to the const expert and to two identity experts.
    torch.testing.assert_close(combined[0].double(), 0.5 * const + 0.5 * x, rtol=2**-10, atol=0)


def test_zero_expert_ignores_even_a_nan_weight() -> None:
    calls = special_expert_calls(torch.tensor([2.0]), torch.tensor([3.0]))
    for args in calls:
        args["expert_scales"][args["expert_ids"] == 4] = math.nan
    assert valid(combine_v2(calls)[0][0])[0].tolist() == ROW_0


def test_unknown_const_expert_option() -> None:
    with pytest.raises(ValueError, match=r'"linear" or "softmax"'):
        combine_v2(special_expert_calls(torch.tensor([2.0]), torch.tensor([3.0])), const_expert="gate")


@pytest.mark.parametrize("dims", [2, 3])
def test_shared_expert_x_is_added_without_weight_and_not_to_masked_tokens(dims: int) -> None:
    calls = MASKED_2D.calls()
    combine = combine_calls(calls, dispatch_v2(calls), WEIGHTS_A)
    for args in combine:
        args["shared_expert_x"] = torch.full((3, 8), 256.0).half().reshape((3, 8) if dims == 2 else (1, 3, 8))
    assert column_0(combine_v2(combine)) == [[256, 257.25, 0], [281, 0, 301]]


@pytest.mark.parametrize(
    ("dtype", "partial", "expected"),
    [
        pytest.param(torch.bfloat16, [1.0, 2.0**-8], 1.0, id="bf16-tie-to-even"),
        pytest.param(torch.bfloat16, [1.0078125, 2.0**-8], 1.015625, id="bf16-tie-to-even-upwards"),
        pytest.param(torch.float16, [1.0, 2.0**-11], 1.0, id="fp16-tie-to-even"),
        pytest.param(torch.float32, [1.0, 2.0**-20], 1 + 2.0**-20, id="float32"),
    ],
)
def test_tp_partners_are_added_and_rounded_before_the_weights(dtype: torch.dtype, partial: list[float], expected: float) -> None:
    """Both TP ranks compute their share of every row; the sum is rounded to the dtype, then weighted."""
    calls = [
        args
        for tp in (0, 1)
        for args in dispatch_calls([torch.ones(1, 1, dtype=dtype)], [[[0]]], 1, tp_world_size=2, tp_rank_id=tp)
    ]
    outputs = dispatch_v2(calls)
    y = [torch.full((2, 1), part, dtype=dtype) for part in partial]
    combined = combine_v2(combine_calls(calls, outputs, [[[256.0]]] * 2, y))
    assert [valid(results[0]).item() for results in combined] == [256 * expected] * 2


def test_sum_is_rounded_once_and_in_the_order_of_k() -> None:
    """In float32, 1e8 - 1e8 + 1 is 1 and 1e8 + 1 - 1e8 is 0."""
    x = [torch.ones(2, 1, dtype=torch.float32)]
    calls = dispatch_calls(x, [[[0, 1, 2], [0, 2, 1]]], 3)
    outputs = dispatch_v2(calls)
    weights = [[[1e8, -1e8, 1], [1e8, 1, -1e8]]]
    assert column_0(combine_v2(combine_calls(calls, outputs, weights))) == [[1, 0]]
    # Two eighths of the last place of bf16 are lost one by one, but not when they are added first.
    calls = dispatch_calls([torch.ones(1, 1, dtype=torch.bfloat16)], [[[0, 1, 2]]], 3)
    combined = combine_v2(combine_calls(calls, dispatch_v2(calls), [[[1, 2**-9 + 2**-11, 2**-9]]]))
    assert column_0(combined) == [[1 + 2**-7]]


def test_product_is_rounded_before_it_is_added() -> None:
    """With a fused multiply-add the result would be the rounding error of the product, not 0."""
    value = torch.tensor(1 + 2**-12, dtype=torch.float32)
    square = (value * value).item()
    calls = dispatch_calls([torch.ones(1, 1, dtype=torch.float32)], [[[0, 1]]], 2)
    outputs = dispatch_v2(calls)
    y = [torch.tensor([[-square], [value]])]
    padded = [torch.cat([y[0], torch.zeros(outputs[0][0][0].size(0) - 2, 1)])]  # type: ignore[union-attr]
    combined = combine_v2(combine_calls(calls, outputs, [[[1.0, value.item()]]], padded))
    assert column_0(combined) == [[0]]


def test_fp16_overflow_is_infinity() -> None:
    calls = dispatch_calls([torch.full((1, 1), 60000.0).half()], [[[0]]], 1)
    assert column_0(combine_v2(combine_calls(calls, dispatch_v2(calls), [[[-2.0]]]))) == [[-math.inf]]


def test_float64_rows_stay_in_float64() -> None:
    x = [torch.tensor([[1 + 2.0**-40]], dtype=torch.float64)]
    calls = dispatch_calls(x, [[[0, 1]]], 2)
    combined = combine_v2(combine_calls(calls, dispatch_v2(calls), [[[1.0, 2.0]]]))
    assert column_0(combined) == [[3 * (1 + 2.0**-40)]]


# --- what combine refuses --------------------------------------------------------------------------------------------


def combine_of(example: Routed, product: str = "portable") -> list[Args]:
    calls = example.calls()
    weights = [torch.ones(args["expert_ids"].shape) for args in calls]
    return clones(combine_calls(calls, dispatch_v2(calls, product=product), weights))


@pytest.mark.parametrize("entry", range(3), ids=["source", "token", "slot"])
@pytest.mark.parametrize("example", [PLAIN, MASKED_2D, TWO_SHARED], ids=lambda example: example.id)
def test_altered_triplet(example: Routed, entry: int) -> None:
    calls = combine_of(example)
    calls[1]["assist_info_for_combine"][3 + entry] += 1
    with pytest.raises(ValueError, match="assist_info_for_combine of EP rank 1 says"):
        combine_v2(calls)


def test_assist_info_behind_the_valid_rows_is_not_read() -> None:
    calls = combine_of(PLAIN)
    expected = column_0(combine_v2(clones(calls)))
    calls[0]["assist_info_for_combine"][18:] = -7
    assert column_0(combine_v2(calls)) == expected


def test_altered_v1_index() -> None:
    calls = combine_of(PLAIN, product="A2")
    calls[0]["assist_info_for_combine"][4] += 1
    with pytest.raises(ValueError, match="assist_info_for_combine of EP rank 0 says 2 for token 2, k 0"):
        combine_v2(calls, product="A2")


def test_assist_info_of_another_rank() -> None:
    calls = combine_of(PLAIN)
    calls[0]["assist_info_for_combine"] = calls[1]["assist_info_for_combine"]
    with pytest.raises(ValueError, match="altered, or not from this dispatch"):
        combine_v2(calls)


def test_ids_changed_between_dispatch_and_combine() -> None:
    calls = combine_of(PLAIN)
    calls[0]["expert_ids"][0, 0] = 1
    with pytest.raises(ValueError, match="asks for more rows of local expert 1 on EP rank 0"):
        combine_v2(calls)
    calls = combine_of(MASKED_1D)
    calls[1]["x_active_mask"][:] = True
    with pytest.raises(ValueError, match=r"EP rank 1 asks for more rows|altered"):
        combine_v2(calls)


def test_fewer_rows_than_the_counts_announce() -> None:
    calls = combine_of(PLAIN)
    calls[1]["expand_x"] = calls[1]["expand_x"][:5]
    with pytest.raises(ValueError, match=r"they announce \[6\] rows and expand_x has 5"):
        combine_v2(calls)


def test_tp_counts_that_do_not_fit() -> None:
    calls = [args for tp in (0, 1) for args in dispatch_calls(tokens(1, 2), [[[0], [0]]], 1, tp_world_size=2, tp_rank_id=tp)]
    combine = clones(combine_calls(calls, dispatch_v2(calls), [[[1.0]] * 2] * 2))
    combine[0]["tp_send_counts"][0] = 1
    with pytest.raises(ValueError, match=r"tp_send_counts \[1, 2\] here"):
        combine_v2(combine)


# --- what both refuse ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("expert", [-1, 4, 2**31 - 1])
def test_id_that_no_expert_has(expert: int) -> None:
    calls = PLAIN.calls()
    calls[1]["expert_ids"][2, 1] = expert
    with pytest.raises(ValueError, match=rf"EP rank 1: expert_ids\[2, 1\] = {expert}"):
        dispatch_v2(calls)


def test_masked_ids_and_weights_are_never_read() -> None:
    calls = MASKED_2D.calls()
    expected = combine_v2(combine_calls(calls, dispatch_v2(calls), WEIGHTS_A))
    weights = [torch.tensor(rank_weights) for rank_weights in WEIGHTS_A]
    for args, rank_weights in zip(calls, weights, strict=True):
        args["expert_ids"][~args["x_active_mask"]] = -12345
        rank_weights[~args["x_active_mask"]] = math.nan
    combined = combine_v2(combine_calls(calls, dispatch_v2(calls), weights))
    assert column_0(combined) == column_0(expected)


def test_missing_rank() -> None:
    with pytest.raises(ValueError, match=r"EP ranks \[1\] call, but \[0, 1\] are alive"):
        dispatch_v2(PLAIN.calls()[1:])


def test_ranks_that_disagree() -> None:
    calls = PLAIN.calls()
    calls[1]["moe_expert_num"] = 6
    with pytest.raises(ValueError, match=r"disagree on moe_expert_num: \[4, 6\]"):
        dispatch_v2(calls)


@pytest.mark.parametrize(
    ("info", "message"),
    [
        pytest.param([1, 1, 0, 2, 0, -1, 0, -1], r"EP ranks \[0, 1\] call, but \[0\] are alive", id="a-dead-rank-calls"),
        pytest.param([1, 2, 0, 4, 0, 1, 1, 0], "not inverse", id="tables-that-contradict"),
        pytest.param([1, 2, 0, 3, 0, 1, 0, 1], "every rank holds 2", id="experts-that-do-not-fit"),
        pytest.param([1, 2, 1, 2, 0, 1, 0, 1], "cannot hold 0 shared experts", id="a-shared-rank-without-expert"),
    ],
)
def test_elastic_info_that_makes_no_sense(info: list[int], message: str) -> None:
    calls = PLAIN.calls(elastic_info=torch.tensor(info, dtype=torch.int32))
    with pytest.raises(ValueError, match=message):
        dispatch_v2(calls)


def test_more_moe_experts_after_shrinking_than_before() -> None:
    """Of three ranks, one of which held MoE experts, two would hold them: their ids would be special ones."""
    info = torch.tensor([1, 2, 0, 2, 0, 1, -1, 0, 1, -1], dtype=torch.int32)
    calls = dispatch_calls(tokens(3, 1), [[[0]]] * 3, 1, elastic_info=info, shared_expert_rank_num=2)[:2]
    with pytest.raises(ValueError, match=r"cannot hold 1 shared experts"):
        dispatch_v2(calls)
    info[2:4] = torch.tensor([1, 1])
    assert len(dispatch_v2(calls)) == 2
    calls = dispatch_calls(tokens(4, 1), [[[0]]] * 4, 1, shared_expert_rank_num=3)[:3]
    for args in calls:
        args["elastic_info"] = torch.tensor([1, 3, 1, 2, 0, 1, 2, -1, 0, 1, 2, -1], dtype=torch.int32)
    with pytest.raises(ValueError, match="2 MoE experts, but the ids from moe_expert_num = 1 on"):
        dispatch_v2(calls)


def test_global_bs_too_small_for_what_arrives() -> None:
    calls = PLAIN.calls(global_bs=2)
    with pytest.raises(ValueError, match="expand_x needs 6 entries, but global_bs and the batch reserve 4"):
        dispatch_v2(calls)
