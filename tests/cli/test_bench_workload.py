"""What ``commfuse bench`` measures on: routing, sizes, and its formula, which is held against the operators' goldens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from commfuse.cli.bench.formula import Expected, expected, stand_in
from commfuse.cli.bench.workload import CASES, ROUTINGS, Workload, all_inputs, choose_experts
from commfuse.compare import difference
from commfuse.operators.moe_distribute import reference
from commfuse.ops import npu_moe_distribute_combine_v2, npu_moe_distribute_dispatch_v2

SMALL = Workload(name="small", ranks=3, num_tokens=5, hidden=8, top_k=3, num_experts=6)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_every_token_chooses_different_experts(routing: str) -> None:
    ids = choose_experts(replace(SMALL, num_tokens=200, routing=routing), torch.Generator().manual_seed(0))
    assert (ids.shape, ids.dtype) == ((200, 3), torch.int32)
    assert 0 <= int(ids.min()) <= int(ids.max()) < 6
    assert (ids.sort(1).values.diff(dim=1) > 0).all()


@pytest.mark.parametrize(
    ("routing", "fewest", "most"),
    [  # of 4000 choices, the part of experts 0 and 1: a half each of 2 experts of 4, or by the formula of the routing
        ("uniform", (0.22, 0.22), (0.28, 0.28)),
        ("zipf", (0.35, 0.25), (0.45, 0.33)),
        ("one-hot", (0.5, 0.14), (0.5, 0.19)),
    ],
)
def test_routing_is_as_it_says(routing: str, fewest: tuple[float, float], most: tuple[float, float]) -> None:
    workload = replace(SMALL, num_tokens=2000, num_experts=4, ranks=1, top_k=2, routing=routing)
    ids = choose_experts(workload, torch.Generator().manual_seed(0))
    parts = torch.bincount(ids.flatten(), minlength=4)[:2] / ids.numel()
    assert all(low <= part <= high for low, part, high in zip(fewest, parts.tolist(), most, strict=True)), parts


def test_inputs_are_the_same_everywhere_and_differ_between_ranks() -> None:
    first, second, _ = all_inputs(SMALL)
    all_inputs.cache_clear()
    assert torch.equal(all_inputs(SMALL)[0].x, first.x)
    assert not torch.equal(first.x, second.x)


def test_cases() -> None:
    sizes = {name: (work.ranks, work.num_tokens, work.hidden, work.top_k, work.num_experts) for name, work in CASES.items()}
    assert sizes == {
        "A": (2, 128, 7168, 8, 16),
        "B": (4, 64, 4096, 8, 32),
        "C": (16, 8, 7168, 8, 32),
        "D": (2, 1, 7168, 8, 16),
        "E": (2, 512, 4096, 8, 64),
    }


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("quant", ["none", "int8"])
def test_the_formula_is_that_of_the_goldens(quant: str, routing: str) -> None:
    workload = replace(SMALL, quant=quant, routing=routing)
    here = [expected(workload, rank) for rank in range(3)]
    for rank, outputs in enumerate(reference.dispatch_v2([_dispatch_args(workload, rank) for rank in range(3)])):
        (rows, valid), (scales, _) = outputs[:2]
        assert rows is not None
        assert scales is not None
        assert difference("rows", rows[:valid], here[rank].rows) == ""
        if quant == "int8":
            assert difference("scales", scales[:valid], here[rank].scales) == ""
    backs = [_combine_args(workload, rank, here[rank]) for rank in range(3)]
    for rank, ((sums, _),) in enumerate(reference.combine_v2(backs)):
        assert difference("sums", sums, here[rank].out) == ""


def test_rows_of_two_experts_are_told_apart() -> None:
    made = stand_in(torch.ones(64, 1), torch.arange(64))
    assert len(made.unique()) == 64


def test_rows_from_ranks_add_up() -> None:
    found = [expected(SMALL, rank) for rank in range(3)]
    assert all(sum(one.rows_from_ranks) == len(one.rows) for one in found)
    assert sum(len(one.rows) for one in found) == 3 * 5 * 3


def test_what_is_off_is_told() -> None:
    judge = expected(SMALL, 0)
    assert judge.wrong_exactly(judge.rows, None, judge.out) == []
    assert judge.wrong_beyond_rounding(judge.rows, None, judge.out) == []
    sums = judge.out.clone()
    sums[1, 2] += 1
    assert judge.wrong_exactly(judge.rows, None, sums)[0].startswith("sums: 1 of 40 values differ; the first at (1, 2)")
    assert judge.wrong_beyond_rounding(judge.rows, None, sums)[0].startswith("sums: 1 of 40 values are off; the worst at (1, 2)")
    assert judge.wrong_beyond_rounding(judge.rows.flip(0), None, judge.out)[0].startswith("rows: ")
    assert judge.wrong_beyond_rounding(judge.rows, None, torch.full_like(judge.out, torch.nan))


def test_a_peer_may_round_int8_by_half_a_step_and_no_more() -> None:
    judge = expected(replace(SMALL, quant="int8"), 0)
    assert judge.scales is not None
    assert judge.wrong_beyond_rounding(judge.rows, judge.scales, judge.out) == []
    off = judge.rows.clone()
    off[0, 0] += 1 if off[0, 0] < 0 else -1
    off[0, 1] += 1 if off[0, 1] < 0 else -1
    assert judge.wrong_beyond_rounding(off, judge.scales, judge.out)[0].startswith("rows: ")
    assert judge.wrong_beyond_rounding(judge.rows, judge.scales * 1.01, judge.out)[0].startswith("rows: ")
    assert judge.wrong_beyond_rounding(judge.rows, None, judge.out)[0].startswith("rows: ")


def _dispatch_args(workload: Workload, rank: int) -> dict[str, Any]:
    own = all_inputs(workload)[rank]
    given = {"x": own.x, "expert_ids": own.expert_ids, "quant_mode": 2 if workload.quantised else 0}
    return {**_defaults(npu_moe_distribute_dispatch_v2), **given, **_sizes(workload, rank)}


def _combine_args(workload: Workload, rank: int, found: Expected) -> dict[str, Any]:
    own = all_inputs(workload)[rank]
    outputs = reference.dispatch_v2([_dispatch_args(workload, peer) for peer in range(workload.ranks)])[rank]
    given = {
        "expand_x": found.y,
        "expert_ids": own.expert_ids,
        "assist_info_for_combine": outputs[2][0],
        "ep_send_counts": outputs[4][0],
        "expert_scales": own.expert_scales,
    }
    return {**_defaults(npu_moe_distribute_combine_v2), **given, **_sizes(workload, rank)}


def _sizes(workload: Workload, rank: int) -> dict[str, Any]:
    return {"group_ep": "", "ep_world_size": workload.ranks, "ep_rank_id": rank, "moe_expert_num": workload.num_experts}


def _defaults(function: Any) -> dict[str, Any]:
    return dict(function.__kwdefaults__)
