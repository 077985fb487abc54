"""The goldens of the operators around v2: v1, the split halves, and combine with addition and RMS norm."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from commfuse.operators.moe_distribute.cases import NAMED, RoundTrip
from commfuse.operators.moe_distribute.reference import combine_add_rms_norm, combine_v2, dispatch_v2
from commfuse.operators.moe_distribute.reference_split import split_combine, split_dispatch
from commfuse.operators.moe_distribute.reference_v1 import combine, dispatch

from .calls import Args, Outputs, clones, column_0, combine_calls, dispatch_calls, tokens, valid
from .test_reference import IDS_A, IDS_B, MASKS_1D, PLAIN, WEIGHTS_A, times_expert_plus_one

EXPAND_IDX_A = [[0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 0, 1]]

# Cases that v1 and the split halves accept too: nothing special, nobody dead.
PLAIN_CASES = [
    case
    for case in NAMED
    if not (case.zero_expert_num + case.copy_expert_num + case.const_expert_num)
    and case.alive is None
    and not case.elastic_flag_zero
]


def renamed(args: Args, **changes: Any) -> Args:
    return {**args, **changes}


def dispatched_v2(case: RoundTrip) -> tuple[list[Args], Outputs]:
    calls = [case.dispatch_args(ep_rank, tp_rank) for tp_rank, ep_rank in case.calls()]
    return calls, dispatch_v2(calls)


def experts(case: RoundTrip, call: tuple[int, int], outputs: Any) -> tuple[list[Any], Tensor]:
    """The outputs of dispatch v2 without their lengths, and what the stand-in experts make of them."""
    tp_rank, ep_rank = call
    tensors: list[Any] = [tensor for tensor, _ in outputs]
    total = case.total_rows(ep_rank, tensors)
    return tensors, case.experts(ep_rank, tensors[0], tensors[1], tensors[3], total, tp_rank)


def assert_equal(left: Outputs, right: Outputs) -> None:
    for one, other in zip(left, right, strict=True):
        torch.testing.assert_close(valid(one[0]), valid(other[0]), rtol=0, atol=0, equal_nan=True)


# --- v1 ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [case for case in PLAIN_CASES if case.shared_expert_rank_num == 0], ids=lambda case: case.id)
def test_v1_without_shared_experts_is_v2_with_another_index(case: RoundTrip) -> None:
    calls, expected = dispatched_v2(case)
    outputs = dispatch(calls)
    for v1, v2 in zip(outputs, expected, strict=True):
        for i in (0, 1, 3, 4, 5, 6):
            assert v1[i][1] == v2[i][1]
            torch.testing.assert_close(v1[i][0], v2[i][0], rtol=0, atol=0, equal_nan=True)
    combined = []
    for call, v1, v2 in zip(case.calls(), outputs, expected, strict=True):
        tensors, y = experts(case, call, v2)
        args = case.combine_args(call[1], call[0], tensors, y)
        combined.append(renamed(args, expand_idx=v1[2][0], shared_expert_x=None))
    if case.tp_world_size != 2 or case.dtype != torch.bfloat16:  # v1 rounds the sum of TP partners another way
        assert_equal(combine(combined), combine_v2(combined))


def test_v1_index_as_worked_out() -> None:
    outputs = dispatch(PLAIN.calls())
    assert [valid(results[2]).tolist() for results in outputs] == EXPAND_IDX_A


def test_v1_combine_as_worked_out() -> None:
    calls = PLAIN.calls()
    outputs = dispatch(calls)
    y = times_expert_plus_one(calls, outputs)
    args = [renamed(args, expand_idx=args["assist_info_for_combine"]) for args in combine_calls(calls, outputs, WEIGHTS_A, y)]
    assert column_0(combine(args)) == [[0, 32.5, 100], [100, 275, 120]]


def test_v1_splits_tokens_over_the_shared_ranks() -> None:
    """W=4, R_s=2, BS=3. Ranks 0 and 1 keep their own three tokens; rank 2 gives tokens 0 | 1, 2 and rank 3 gives
    0, 1 | 2 to ranks 0 | 1: floor((q + 1 + r) * 3 / 2) - floor((q + r) * 3 / 2) tokens each."""
    ids = [[[0], [1], [0]]] * 4
    calls = dispatch_calls(tokens(4, 3), ids, 2, shared_expert_rank_num=2)
    outputs = dispatch(calls)
    assert column_0(outputs)[:2] == [[0, 10, 20, 200, 300, 310], [100, 110, 120, 210, 220, 320]]
    assert outputs[0][0][0].shape == (6, 8)  # type: ignore[union-attr]
    # Own tokens are counted under ranks 0 and 1, split the same way.
    assert [valid(results[4]).tolist() for results in outputs[:2]] == [[1, 3, 4, 6], [2, 3, 5, 6]]
    assert [valid(results[3]).tolist() for results in outputs] == [[6], [6], [8], [4]]


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 5])
@pytest.mark.parametrize(("world_size", "shared_ranks"), [(2, 1), (4, 1), (4, 2), (6, 2), (6, 3)])
def test_v1_combine_gets_every_shared_row_back(num_tokens: int, world_size: int, shared_ranks: int) -> None:
    """The shared expert is the identity, every MoE expert has weight 0."""
    x = tokens(world_size, num_tokens, dtype=torch.float32)
    ids = [[[token % (world_size - shared_ranks)] for token in range(num_tokens)]] * world_size
    calls = dispatch_calls(x, ids, world_size - shared_ranks, shared_expert_rank_num=shared_ranks)
    outputs = dispatch(calls)
    weights = torch.zeros(world_size, num_tokens, 1)
    args = [renamed(a, expand_idx=a["assist_info_for_combine"]) for a in combine_calls(calls, outputs, list(weights))]
    for results, rows in zip(combine(args), x, strict=True):
        assert torch.equal(valid(results[0]), rows)


def test_v1_shared_expert_x_has_no_effect() -> None:
    calls = PLAIN.calls()
    outputs = dispatch(calls)
    args = [renamed(a, expand_idx=a["assist_info_for_combine"]) for a in combine_calls(calls, outputs, WEIGHTS_A)]
    with_shared = [renamed(a, shared_expert_x=torch.ones(3, 8).half()) for a in args]
    assert_equal(combine(with_shared), combine(args))


@pytest.mark.parametrize(
    ("partial", "expected"),
    [
        pytest.param([1.0, 2.0**-8], 1 + 2.0**-7, id="tie"),
        pytest.param([-1.0, -(2.0**-8)], -1 - 2.0**-7, id="negative-tie"),
        pytest.param([1.0, 2.0**-9], 1.0, id="below-a-tie"),
        pytest.param([math.inf, 1.0], math.inf, id="infinity"),
        pytest.param([3.38e38, 3.38e38], math.inf, id="overflow"),
    ],
)
def test_v1_tp_partners_are_rounded_away_from_zero(partial: list[float], expected: float) -> None:
    calls = [
        args
        for tp in (0, 1)
        for args in dispatch_calls([torch.ones(1, 1).bfloat16()], [[[0]]], 1, tp_world_size=2, tp_rank_id=tp)
    ]
    outputs = dispatch(calls)
    y = [torch.full((2, 1), part).bfloat16() for part in partial]
    args = [renamed(a, expand_idx=a["assist_info_for_combine"]) for a in combine_calls(calls, outputs, [[[1.0]]] * 2, y)]
    assert column_0(combine(args)) == [[expected]] * 2


def test_v1_index_is_checked() -> None:
    calls = PLAIN.calls()
    args = combine_calls(calls, dispatch(calls), WEIGHTS_A)
    altered = clones([renamed(a, expand_idx=a["assist_info_for_combine"]) for a in args])
    altered[0]["expand_idx"][5] = 0
    with pytest.raises(ValueError, match="expand_idx of EP rank 0 says 0 for token 2, k 1"):
        combine(altered)


@pytest.mark.parametrize("changes", [{"shared_expert_num": 2}, {"masks": [[1, 1]] * 4}, {"ids": IDS_B[:3]}])
def test_v1_refuses_shared_experts_it_cannot_place(changes: Any) -> None:
    ids = changes.pop("ids", IDS_B)
    calls = dispatch_calls(tokens(len(ids), 2), ids, 4, shared_expert_rank_num=2, **changes)
    with pytest.raises(ValueError, match="With shared experts, v1 needs"):
        dispatch(calls)


# --- combine, add, RMS norm --------------------------------------------------------------------------------------------


def rms_calls(dtype: torch.dtype, masks: Any = None) -> tuple[list[Args], list[Args]]:
    """Calls of combine v2 and of the fused operator with the same data."""
    generator = torch.Generator().manual_seed(0)
    x = [torch.randn(3, 24, generator=generator).to(dtype) for _ in range(2)]
    calls = dispatch_calls(x, IDS_A, 4, masks=masks)
    plain = combine_calls(calls, dispatch_v2(calls), WEIGHTS_A)
    gamma = torch.randn(24, generator=generator).to(dtype)
    fused = [
        renamed(
            args,
            expand_idx=args["assist_info_for_combine"],
            residual_x=torch.randn(3, 1, 24, generator=generator).to(dtype),
            gamma=gamma,
            norm_eps=1e-6,
        )
        for args in plain
    ]
    return plain, fused


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_add_rms_norm_is_combine_then_torch(dtype: torch.dtype) -> None:
    plain, fused = rms_calls(dtype)
    tolerance = 4 * torch.finfo(dtype).eps
    for args, combined, (y, rstd, x) in zip(fused, combine_v2(plain), combine_add_rms_norm(fused), strict=True):
        z = valid(combined[0]).double().unsqueeze(1) + args["residual_x"].double()
        norm = torch.nn.functional.rms_norm(z, (24,), args["gamma"].double(), 1e-6)
        assert [output[0].dtype for output in (y, rstd, x)] == [dtype, torch.float32, dtype]  # type: ignore[union-attr]
        assert [valid(output).shape for output in (y, rstd, x)] == [(3, 1, 24), (3, 1, 1), (3, 1, 24)]
        torch.testing.assert_close(valid(x).double(), z, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(valid(y).double(), norm, rtol=tolerance, atol=tolerance)
        expected = (z.square().mean(2, keepdim=True) + 1e-6).rsqrt()
        torch.testing.assert_close(valid(rstd).double(), expected, rtol=tolerance + 1e-6, atol=0)


def test_add_rms_norm_takes_the_sum_before_it_is_rounded() -> None:
    """1 + 2**-9 from combine and 2**-9 from the residual: rounded to bf16 first, both would be lost."""
    calls = dispatch_calls([torch.ones(1, 1).bfloat16()], [[[0]]], 1)
    args = combine_calls(calls, dispatch_v2(calls), [[[1 + 2.0**-9]]])[0]
    residual = torch.full((1, 1, 1), 2.0**-9 + 2.0**-10).bfloat16()
    fused = renamed(
        args,
        expand_idx=args["assist_info_for_combine"],
        residual_x=residual,
        gamma=torch.ones(1).bfloat16(),
        norm_eps=0.0,
    )
    (_, _, x) = combine_add_rms_norm([fused])[0]
    assert valid(x).item() == 1 + 2.0**-7


def test_add_rms_norm_rounds_before_it_multiplies_with_gamma() -> None:
    _, fused = rms_calls(torch.bfloat16)
    for args in fused:
        args["expert_scales"] = torch.zeros(3, 2)  # what remains is the residual, which is exact
    differs = False
    for args, (y, rstd, _) in zip(fused, combine_add_rms_norm(fused), strict=True):
        normal, gamma = args["residual_x"].float() * valid(rstd), args["gamma"].float()
        assert torch.equal(valid(y), (normal.bfloat16().float() * gamma).bfloat16())
        differs |= not torch.equal(valid(y), (normal * gamma).bfloat16())
    assert differs


def test_add_rms_norm_of_masked_tokens_is_zero() -> None:
    _, fused = rms_calls(torch.float32, masks=MASKS_1D)
    for results, num_active in zip(combine_add_rms_norm(fused), (2, 1), strict=True):
        for output in results:
            assert (valid(output)[num_active:] == 0).all()
            assert (valid(output)[:num_active] != 0).any()


# --- split halves ------------------------------------------------------------------------------------------------------


def test_split_dispatch_as_worked_out() -> None:
    outputs = split_dispatch(PLAIN.calls())
    assert [valid(results[0]).tolist() for results in outputs] == EXPAND_IDX_A
    assert [valid(results[1])[:, 0].tolist() for results in outputs] == column_0(dispatch_v2(PLAIN.calls()))
    assert [valid(results[3]).tolist() for results in outputs] == PLAIN.counts
    assert [valid(results[4]).tolist() for results in outputs] == PLAIN.nums
    shapes = [tensor.shape for tensor, _ in outputs[0] if tensor is not None]
    assert shapes == [(6,), (12, 8), (12,), (12 * 128,), (2,)]


def split_combine_calls(calls: list[Args], outputs: Outputs, weights: Any, y: Any) -> list[Args]:
    fields = zip(calls, outputs, weights, y, strict=True)
    return [
        renamed(
            args,
            expand_x=rows,
            assist_info_for_combine=results[3][0],
            expand_idx=results[0][0],
            expert_scales=torch.as_tensor(rank_weights),
            shared_expert_x=None,
            comm_quant_mode=0,
        )
        for args, results, rank_weights, rows in fields
    ]


def test_split_combine_as_worked_out() -> None:
    calls = PLAIN.calls()
    y = times_expert_plus_one(calls, dispatch_v2(calls))
    combined = split_combine(split_combine_calls(calls, split_dispatch(calls), WEIGHTS_A, y))
    assert column_0(combined) == [[0, 32.5, 100], [100, 275, 120]]


@pytest.mark.parametrize("case", [case for case in PLAIN_CASES if case.tp_world_size == 0], ids=lambda case: case.id)
def test_split_path_is_v2(case: RoundTrip) -> None:
    calls, expected = dispatched_v2(case)
    outputs = split_dispatch(calls)
    for split, v2 in zip(outputs, expected, strict=True):
        for i, j in ((1, 0), (2, 1), (4, 3)):
            assert split[i][1] == v2[j][1]
            torch.testing.assert_close(split[i][0], v2[j][0], rtol=0, atol=0, equal_nan=True)
        room = split[3][0].numel()  # type: ignore[union-attr]
        assert torch.equal(valid(split[3]), valid(v2[4])[:room])
    plain, halves = [], []
    for call, split, v2 in zip(case.calls(), outputs, expected, strict=True):
        tensors, y = experts(case, call, v2)
        args = case.combine_args(call[1], call[0], tensors, y)
        plain.append(args)
        halves.append(renamed(args, assist_info_for_combine=split[3][0], expand_idx=split[0][0]))
    assert_equal(split_combine(halves), combine_v2(plain))


@pytest.mark.parametrize("shared_ranks", [0, 1])
@pytest.mark.parametrize("with_shared_row", [False, True])
def test_split_dispatch_takes_both_sizes_of_smooth_table(shared_ranks: int, with_shared_row: bool) -> None:
    """Row of MoE expert j: [1, 2 ** (j + 1)]. The shared row, if there is one, is [1, 8]."""
    moe = [[1.0, 2.0], [1.0, 4.0]]
    scales = torch.tensor([[1.0, 8.0], *moe] if with_shared_row else moe)
    world_size = 2 + shared_ranks
    calls = dispatch_calls([torch.ones(1, 2)] * world_size, [[[0, 1]]] * world_size, 2, shared_expert_rank_num=shared_ranks)
    for args in calls:
        args.update(quant_mode=2, scales=scales)
    largest = [valid(results[2])[0].item() * 127 for results in split_dispatch(calls)]
    shared = [8.0 if with_shared_row else 1.0] * shared_ranks
    assert largest == pytest.approx([*shared, 2, 4])


def test_split_dispatch_refuses_another_smooth_table() -> None:
    calls = PLAIN.calls(quant_mode=2, scales=torch.ones(6, 8))
    with pytest.raises(ValueError, match="scales has 6 rows; 4 MoE experts and 1 shared ones need 4 or both"):
        split_dispatch(calls)


@pytest.mark.parametrize("name", ["expand_idx", "assist_info_for_combine"])
def test_split_combine_checks_what_it_is_handed(name: str) -> None:
    calls = PLAIN.calls()
    y = [results[0][0] for results in dispatch_v2(calls)]
    altered = clones(split_combine_calls(calls, split_dispatch(calls), WEIGHTS_A, y))
    altered[1][name][0] += 1
    with pytest.raises(ValueError, match=r"expand_idx of EP rank 1 says 1|asks for more rows"):
        split_combine(altered)
