"""Every case through dispatch, experts and combine of the golden: against a dense formula, shapes and invariants."""

from __future__ import annotations

import math
import time
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from commfuse.operators.moe_distribute.cases import NAMED, RoundTrip, random_case
from commfuse.operators.moe_distribute.reference import combine_v2, dispatch_v2

from .calls import Args, Outputs, valid

RANDOM = 200


def combine_args(case: RoundTrip, outputs: Outputs) -> list[Args]:
    """The calls of combine after the stand-in experts."""
    combined = []
    for (tp_rank, ep_rank), results in zip(case.calls(), outputs, strict=True):
        tensors: list[Any] = [tensor for tensor, _ in results]
        expand_x, scales, _, nums, *_ = tensors
        y = case.experts(ep_rank, expand_x, scales, nums, case.total_rows(ep_rank, tensors), tp_rank)
        combined.append(case.combine_args(ep_rank, tp_rank, tensors, y))
    return combined


def round_trip(case: RoundTrip, product: str = "portable") -> tuple[list[Args], Outputs, list[Args], Outputs]:
    """Arguments and results of dispatch, then of combine."""
    dispatched = [case.dispatch_args(ep_rank, tp_rank) for tp_rank, ep_rank in case.calls()]
    outputs = dispatch_v2(dispatched, product=product)
    combined = combine_args(case, outputs)
    return dispatched, outputs, combined, combine_v2(combined, product=product)


# --- a dense formula, without ranks and rows ---------------------------------------------------------------------------


def active(args: Args) -> Tensor:
    mask: Tensor | None = args["x_active_mask"]
    num_tokens, top_k = args["expert_ids"].shape
    if mask is None:
        return torch.ones(num_tokens, top_k, dtype=torch.bool)
    if mask.dim() == 2:
        return mask
    return (torch.arange(num_tokens) < mask.sum()).reshape(-1, 1).expand(num_tokens, top_k)


def dense(case: RoundTrip, dispatch: Args, combine: Args) -> tuple[Tensor, Tensor]:
    """What one rank's tokens must become, and the largest error of each, (BS, H) float64, from the factors of the
    experts alone: no routing, no rows."""
    x, ids, weights = dispatch["x"].double(), dispatch["expert_ids"], combine["expert_scales"].double()
    shared = case.shared_expert_num if case.shared_expert_rank_num else 0
    smooth = dispatch["scales"] if dispatch["scales"] is not None else torch.ones(shared + case.moe_expert_num, 1)
    partners = 4 if case.tp_world_size == 2 else 1  # factors 1 and 3 of the two TP indices
    step = torch.finfo(case.dtype).eps
    # Rounding to int8 loses 0.5 of 127; on the wire, rounding to fp16 first loses up to 1/32 more.
    on_the_wire = 0.54 / 127 + step if case.comm_quant_mode else 0
    error_of_a_row = 2 * step + (0.501 / 127 if case.quant_mode else 0) + on_the_wire
    total, error = torch.zeros_like(x), torch.zeros_like(x)

    def add(token: int, row: Tensor, weight: float, row_error: Tensor) -> None:
        total[token] += row * weight
        error[token] += abs(weight) * (row_error + row.abs() * step)

    def add_returned(token: int, row: Tensor, weight: float) -> None:
        add(token, row, weight, row.abs().max() * error_of_a_row)

    flags = active(dispatch)
    for token, k in flags.nonzero().tolist():
        expert, weight = int(ids[token, k]), float(weights[token, k])
        special = expert - case.moe_expert_num
        const = special - case.zero_expert_num - case.copy_expert_num
        if special < 0:
            add_returned(token, x[token] * smooth[shared + expert] * (expert + 1) / 4 * partners, weight)
        elif const >= 0:
            parts = [
                combine["const_expert_alpha_1"][const].double() * x[token],
                combine["const_expert_alpha_2"][const].double() * combine["const_expert_v"][const].double(),
            ]
            add(token, parts[0] + parts[1], weight, (parts[0].abs() + parts[1].abs()) * step)
        elif special >= case.zero_expert_num:
            add(token, x[token], weight, torch.zeros_like(x[token]))
    for token in flags.any(dim=1).nonzero().flatten().tolist():
        for s in range(shared):
            add_returned(token, x[token] * smooth[s] * -(s + 1) / 8 * partners, 1.0)
        if combine["shared_expert_x"] is not None:
            row = combine["shared_expert_x"].reshape(x.shape)[token].double()
            add(token, row, 1.0, torch.zeros_like(row))
    # Subnormal numbers are spaced evenly; a wire scale of fp16 may be one, times 127. Int8 loses rows below 4e-37.
    floor = 3000 * torch.finfo(case.dtype).smallest_normal * step + 1e-35
    return total, error + total.abs() * step + floor


def assert_dense(case: RoundTrip) -> None:
    dispatched, _, combined, results = round_trip(case)
    for dispatch, combine, outputs in zip(dispatched, combined, results, strict=True):
        out = valid(outputs[0])
        expected, error = dense(case, dispatch, combine)
        assert out.dtype == case.dtype
        assert out.shape == expected.shape
        assert ((out.double() - expected).abs() <= error).all()
        assert (out[~active(dispatch).any(dim=1)] == 0).all()


@pytest.mark.parametrize("case", [case for case in NAMED if case.values != "nonfinite"], ids=lambda case: case.id)
def test_round_trip_is_the_dense_formula(case: RoundTrip) -> None:
    assert_dense(case)


def test_random_round_trips_are_the_dense_formula_and_quick() -> None:
    start = time.process_time()
    for seed in range(RANDOM):
        assert_dense(random_case(seed))
    assert time.process_time() - start < 60


@pytest.mark.parametrize("case", [case for case in NAMED if case.values == "nonfinite"], ids=lambda case: case.id)
def test_nonfinite_rows_stay_with_their_tokens(case: RoundTrip) -> None:
    """The same case with zeros in the place of the bad rows has the same bits in all other tokens."""
    dispatched, _, _, results = round_trip(case)
    good = [args["x"].isfinite().all(dim=1) for args in dispatched]
    assert not any(rows.all() for rows in good)
    clean = [{**args, "x": torch.where(rows.unsqueeze(1), args["x"], 0)} for args, rows in zip(dispatched, good, strict=True)]
    combined = combine_args(case, dispatch_v2(clean))
    for results_of_rank, expected, rows in zip(results, combine_v2(combined), good, strict=True):
        assert torch.equal(valid(results_of_rank[0])[rows], valid(expected[0])[rows])
        assert not valid(results_of_rank[0])[~rows].isfinite().all(dim=1).any()


# --- shapes, tails, counts ---------------------------------------------------------------------------------------------


def reserved(case: RoundTrip, ep_rank: int) -> tuple[int, int]:
    """A and L of a rank, by the published closed forms."""
    world, experts = case.world_size, case.moe_expert_num // (case.world_size - case.shared_expert_rank_num)
    most = max(case.num_tokens) + (2 if case.global_bs == "spare" else 0)
    moe, shared = most * world * min(experts, case.top_k), 0
    if case.shared_expert_rank_num:
        replicas = case.shared_expert_rank_num // case.shared_expert_num
        shared = most * math.ceil(world / replicas)
    if case.alive is not None or case.elastic_flag_zero:
        return max(shared, moe), experts
    return (shared, 1) if ep_rank < case.shared_expert_rank_num else (moe, experts)


@pytest.mark.parametrize("case", NAMED, ids=lambda case: case.id)
def test_shapes_dtypes_and_tails_of_dispatch(case: RoundTrip) -> None:
    dispatched, outputs, _, _ = round_trip(case)
    for (_, ep_rank), args, results in zip(case.calls(), dispatched, outputs, strict=True):
        rows, experts = reserved(case, ep_rank)
        copies = max(case.tp_world_size, 1)
        num_pairs = args["expert_ids"].numel()
        most = max(case.num_tokens) + (2 if case.global_bs == "spare" else 0)
        private = 2 * most * case.world_size * case.top_k * (case.world_size // 8) if case.with_expert_scales else 0
        expected = [
            ((rows * copies, case.hidden), torch.int8 if case.quant_mode else case.dtype),
            ((rows * copies,), torch.float32),
            ((max(num_pairs, rows * 128),), torch.int32),
            ((experts,), torch.int64),
            ((case.world_size * experts * copies + private,), torch.int32),
            ((case.tp_world_size,), torch.int32),
            ((rows,), torch.float32),
        ]
        for (tensor, length), (shape, dtype) in zip(results, expected, strict=True):
            assert tensor is not None
            assert (tensor.shape, tensor.dtype) == (shape, dtype)
            assert (tensor[length:] == 0).all()


@pytest.mark.parametrize("case", NAMED, ids=lambda case: case.id)
def test_valid_lengths_of_dispatch(case: RoundTrip) -> None:
    _, outputs, _, _ = round_trip(case)
    living = len(case.alive) if case.alive is not None else case.world_size
    shared_ranks = case.alive_shared_rank_num if case.alive is not None else case.shared_expert_rank_num
    for (tp_rank, ep_rank), results in zip(case.calls(), outputs, strict=True):
        rank = case.alive.index(ep_rank) if case.alive is not None else ep_rank
        experts = 1 if rank < shared_ranks else case.moe_expert_num // (case.world_size - case.shared_expert_rank_num)
        lengths = [length for _, length in results]
        own = int(valid(results[5])[tp_rank]) if case.tp_world_size == 2 else lengths[0]
        copies = 2 if case.tp_world_size == 2 else 1
        weights = own if case.with_expert_scales and rank >= shared_ranks else 0
        scales = lengths[0] if case.quant_mode else 0
        assert lengths[1:] == [scales, 3 * own, experts, living * experts * copies, 2 * (copies - 1), weights]


@pytest.mark.parametrize("case", NAMED, ids=lambda case: case.id)
def test_counts_agree_with_each_other_and_nothing_is_lost(case: RoundTrip) -> None:
    dispatched, outputs, _, _ = round_trip(case)
    shared = case.shared_expert_num if case.shared_expert_rank_num else 0
    sent = sum(
        int((active(args) & (args["expert_ids"] < case.moe_expert_num)).sum()) + shared * int(active(args).any(dim=1).sum())
        for args in dispatched
    )
    copies = 2 if case.tp_world_size == 2 else 1
    assert sum(results[0][1] for results in outputs) == sent * copies
    for (_, ep_rank), results in zip(case.calls(), outputs, strict=True):
        nums = valid(results[3])
        total = nums[-1] if case.expert_token_nums_type == 0 else nums.sum()
        tensors = [tensor for tensor, _ in results]
        assert total == results[0][1] == case.total_rows(ep_rank, tensors)


@pytest.mark.parametrize("case", [case for case in NAMED if not case.quant_mode], ids=lambda case: case.id)
def test_rows_and_their_weights_are_those_of_the_triplets(case: RoundTrip) -> None:
    dispatched, outputs, _, _ = round_trip(case)
    order = case.alive if case.alive is not None else range(case.world_size)
    by_call = dict(zip(case.calls(), dispatched, strict=True))
    for (tp_rank, _), results in zip(case.calls(), outputs, strict=True):
        weights = valid(results[6])
        for i, (source, token, slot) in enumerate(valid(results[2]).reshape(-1, 3).tolist()):
            args = by_call[tp_rank, order[source]]
            torch.testing.assert_close(valid(results[0])[i], args["x"][token], rtol=0, atol=0, equal_nan=True)
            if len(weights):
                assert weights[i] == args["expert_scales"][token, slot]


# --- invariants --------------------------------------------------------------------------------------------------------


def assert_same(left: Outputs, right: Outputs) -> None:
    for one, other in zip(left, right, strict=True):
        for a, b in zip(one, other, strict=True):
            assert a[1] == b[1]
            torch.testing.assert_close(a[0], b[0], rtol=0, atol=0, equal_nan=True)


BY_ID = {case.id: case for case in NAMED}


@pytest.mark.parametrize("name", ["shared-int8-smooth", "elastic-ids-reordered", "tp-two-mask-2d", "all-special-experts"])
def test_order_of_the_calls_does_not_matter(name: str) -> None:
    dispatched, outputs, combined, results = round_trip(BY_ID[name])
    assert_same(dispatch_v2(dispatched[::-1]), outputs[::-1])
    assert_same(combine_v2(combined[::-1]), results[::-1])


@pytest.mark.parametrize("case", NAMED, ids=lambda case: case.id)
def test_inputs_are_left_alone(case: RoundTrip) -> None:
    dispatched, _, combined, _ = round_trip(case)
    fresh = [case.dispatch_args(ep_rank, tp_rank) for tp_rank, ep_rank in case.calls()]
    for args, expected in zip([*dispatched, *combined], [*fresh, *([None] * len(combined))], strict=True):
        timings = args["performance_info"]
        assert timings is None or not timings.any()
        for name, value in (expected or {}).items():
            if isinstance(value, Tensor):
                torch.testing.assert_close(args[name], value, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    "case",
    [case for case in NAMED if case.shared_expert_rank_num == 0 and case.tp_world_size == 0 and case.alive is None],
    ids=lambda case: case.id,
)
def test_a2_layout_changes_assist_info_alone(case: RoundTrip) -> None:
    _, outputs, _, results = round_trip(case)
    _, a2_outputs, _, a2_results = round_trip(case, product="A2")
    assert_same(a2_results, results)
    assert_same([[*rank[:2], *rank[3:]] for rank in a2_outputs], [[*rank[:2], *rank[3:]] for rank in outputs])


@pytest.mark.parametrize("layout", [{"non_contiguous": True}, {"comm_alg": "fullmesh_v2"}, {"with_performance_info": True}])
@pytest.mark.parametrize("name", ["base", "mask-2d", "shared-int8-smooth", "const-experts-alpha-2d", "tp-two"])
def test_what_must_not_change_a_bit(name: str, layout: dict[str, Any]) -> None:
    _, outputs, _, results = round_trip(BY_ID[name])
    _, same_outputs, _, same_results = round_trip(replace(BY_ID[name], **layout))
    assert_same(same_outputs, outputs)
    assert_same(same_results, results)


@pytest.mark.parametrize("name", ["base", "two-shared-experts", "shared-mask-2d", "int8-smooth"])
def test_elastic_flag_zero_changes_sizes_alone(name: str) -> None:
    _, outputs, _, results = round_trip(BY_ID[name])
    _, same_outputs, _, same_results = round_trip(replace(BY_ID[name], elastic_flag_zero=True))
    assert_same(same_results, results)
    for rank, same in zip(outputs, same_outputs, strict=True):
        for output, other in zip(rank, same, strict=True):
            assert torch.equal(valid(output), valid(other))


@pytest.mark.parametrize(
    "case",
    [case for case in NAMED if case.alive is not None and case.copy_expert_num == 0 and not case.smooth],
    ids=lambda case: case.id,
)
def test_shrunk_group_equals_a_small_one(case: RoundTrip) -> None:
    """The living ranks of a shrunk group do what a group of that size, made for it, does."""
    assert case.alive is not None
    dispatched, outputs, _, _ = round_trip(case)
    info = dispatched[0]["elastic_info"].tolist()
    small = [
        {
            **args,
            "elastic_info": None,
            "ep_world_size": info[1],
            "shared_expert_rank_num": info[2],
            "moe_expert_num": info[3],
            "ep_rank_id": case.alive.index(args["ep_rank_id"]),
            "global_bs": 12 * info[1],
        }
        for args in dispatched
    ]
    for rank, same in zip(outputs, dispatch_v2(small), strict=True):
        for output, other in zip(rank, same, strict=True):
            torch.testing.assert_close(valid(output), valid(other), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_identity_experts_and_one_weight_give_the_tokens_back(dtype: torch.dtype) -> None:
    case = replace(BY_ID["base"], dtype=dtype)
    dispatched = [case.dispatch_args(ep_rank) for _, ep_rank in case.calls()]
    outputs = dispatch_v2(dispatched)
    combined = []
    for (_, ep_rank), results in zip(case.calls(), outputs, strict=True):
        tensors: list[Any] = [tensor for tensor, _ in results]
        args = case.combine_args(ep_rank, 0, tensors, tensors[0])
        chosen = torch.arange(5) % case.top_k
        combined.append({**args, "expert_scales": torch.nn.functional.one_hot(chosen, case.top_k).float()})
    for args, results in zip(dispatched, combine_v2(combined), strict=True):
        assert torch.equal(valid(results[0]), args["x"])


def test_float64_round_trip_is_nearer_than_float32() -> None:
    """A float64 golden is what a tolerance for the other dtypes can be measured against."""
    case = replace(BY_ID["special-and-shared"], dtype=torch.float64, values="normal")
    assert_dense(case)


# --- the cases themselves ----------------------------------------------------------------------------------------------


def test_ids_are_unique_and_speak() -> None:
    assert len(BY_ID) == len(NAMED)
    for name in BY_ID:
        assert name.replace("-", "").isalnum()
        assert name == name.lower()


EVERY_VALUE: dict[str, set[Any]] = {
    "world_size": set(range(1, 9)),
    "tp_world_size": {0, 1, 2},
    "dtype": {torch.bfloat16, torch.float16, torch.float32},
    "quant_mode": {0, 2},
    "smooth": {False, True},
    "mask": {None, "1d", "2d", "1d-false", "2d-false"},
    "routing": {"uniform", "one-expert", "zipf", "special"},
    "values": {"normal", "extreme", "nonfinite"},
    "expert_token_nums_type": {0, 1},
    "comm_alg": {"", "fullmesh", "hierarchy", "fullmesh_v1", "fullmesh_v2", "ccu"},
    "comm_quant_mode": {0, 2},
    "with_expert_scales": {False, True},
    "shared_expert_x": {None, 2, 3},
    "alpha": {"1d", "2d"},
    "elastic_flag_zero": {False, True},
    "non_contiguous": {False, True},
    "with_performance_info": {False, True},
    "global_bs": {"zero", "max", "spare"},
}


@pytest.mark.parametrize("field", EVERY_VALUE)
def test_named_cases_take_every_value(field: str) -> None:
    assert {getattr(case, field) for case in NAMED} >= EVERY_VALUE[field]


@pytest.mark.parametrize("field", EVERY_VALUE)
def test_random_cases_take_every_value(field: str) -> None:
    drawn = {getattr(random_case(seed), field) for seed in range(2 * RANDOM)}
    assert drawn >= EVERY_VALUE[field] - {"nonfinite"}


def test_no_field_is_missing_above() -> None:
    sizes = {"id", "seed", "num_tokens", "hidden", "top_k", "moe_expert_num", "alive", "alive_shared_rank_num"}
    sizes |= {f"{kind}_expert_num" for kind in ("shared", "zero", "copy", "const")} | {"shared_expert_rank_num"}
    assert {field.name for field in fields(RoundTrip)} == sizes | set(EVERY_VALUE)


def test_inputs_depend_on_seed_and_rank_alone() -> None:
    case = BY_ID["tp-two-mask-2d"]
    first, again = case.dispatch_args(1, 1), case.dispatch_args(1, 1)
    assert torch.equal(first["expert_ids"], again["expert_ids"])
    for other in (case.dispatch_args(2, 1), case.dispatch_args(1, 0), replace(case, seed=1).dispatch_args(1, 1)):
        assert not torch.equal(first["x"], other["x"])
        assert not torch.equal(first["expert_ids"], other["expert_ids"])


@pytest.mark.parametrize("name", ["mask-1d", "mask-2d", "mask-1d-all-false", "shared-expert-x-3d-masked"])
def test_what_must_not_be_read_is_poison(name: str) -> None:
    dispatched, _, combined, _ = round_trip(BY_ID[name])
    for dispatch, combine in zip(dispatched, combined, strict=True):
        out = ~active(dispatch)
        ids = dispatch["expert_ids"][out]
        assert ((ids < 0) | (ids > 10_000)).all()
        assert combine["expert_scales"][out].isnan().all()
        assert dispatch["x"][out.all(dim=1)].isnan().all()
        assert dispatch["x"][~out.all(dim=1)].isfinite().all()


def test_rows_behind_the_valid_ones_are_nan_for_combine() -> None:
    _, outputs, combined, _ = round_trip(BY_ID["base"])
    for results, args in zip(outputs, combined, strict=True):
        assert args["expand_x"][results[0][1] :].isnan().all()
        assert args["expand_x"][: results[0][1]].isfinite().all()


def test_non_contiguous_inputs_are_so() -> None:
    dispatched, _, combined, _ = round_trip(BY_ID["shared-expert-x-3d-masked"])
    for args, names in (
        (dispatched[0], ["x", "expert_ids", "x_active_mask"]),
        (combined[0], ["expand_x", "expert_ids", "expert_scales", "shared_expert_x", "x_active_mask"]),
    ):
        assert not any(args[name].is_contiguous() for name in names)
