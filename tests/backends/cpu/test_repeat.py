"""Calls that repeat a form go a short way, with the results of the long one; all others do not."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

import commfuse
from commfuse import config, groups, repeats
from commfuse.checking import judge
from commfuse.operators.moe_distribute.cases import RoundTrip, random_case
from tests.conftest import RunRanks
from tests.faults.bodies import error_of, world

from . import core, layer  # noqa: F401 - skips where the core is not built
from .ways import DISPATCH, FAMILY, PLAIN, counted

# --- results -----------------------------------------------------------------------------------------------------------------


def plain_case(seed: int) -> RoundTrip:
    """A random case without what makes a call go the long way, but for ranks without tokens and special experts of combine."""
    case = random_case(seed)
    return replace(
        case,
        tp_world_size=min(case.tp_world_size, 1),
        top_k=min(case.top_k, case.moe_expert_num),
        smooth=False,
        routing="uniform" if case.routing == "special" else case.routing,
        shared_expert_x=None,
        alive=None,
        alive_shared_rank_num=0,
        elastic_flag_zero=False,
        non_contiguous=False,
        with_performance_info=False,
        comm_quant_mode=0,
        copy_expert_num=0,
        const_expert_num=0,
    )


def repeated(rank: int, seeds: list[int]) -> tuple[list[list[Any]], dict[str, int]]:
    """Each case four times, the group's other cases between."""
    results: list[list[Any]] = [[] for _ in seeds]
    with config.override(**PLAIN), counted() as ways:
        for _ in range(4):
            for found, seed in zip(results, seeds, strict=True):
                found.append(FAMILY.run_on_rank(rank, plain_case(seed)))
    return results, ways


def seeds_of(size: int, wanted: int) -> list[int]:
    fitting = (seed for seed in range(9000, 20000) if FAMILY.world_size(plain_case(seed)) == size)
    return [seed for seed, _ in zip(fitting, range(wanted), strict=False)]


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_results_are_the_golden_s(run_ranks: RunRanks, size: int) -> None:
    seeds = seeds_of(size, 14)
    by_rank = run_ranks(size, repeated, seeds)
    for i, seed in enumerate(seeds):
        for turn in range(4):
            outcome = judge(FAMILY, plain_case(seed), [results[i][turn] for results, _ in by_rank])
            assert outcome.passed, "\n".join(outcome.problems)
    assert all(ways["short"] >= 30 for _, ways in by_rank), [ways for _, ways in by_rank]


def layers(rank: int, world_size: int, quant_mode: int, calls: int) -> tuple[list[bool], dict[str, int]]:
    """Ranks leave the short way at different calls; their peers need not."""
    right = []
    with config.override(**PLAIN), counted() as ways:
        for seed in range(calls):
            if seed % world_size == rank:
                repeats.of(groups.resolve(world()), DISPATCH).forget()
            out = layer.dispatch(rank, world_size, seed, quant_mode=quant_mode)
            y = (
                commfuse.window_empty(out[0].shape, torch.bfloat16)
                if seed % 3
                else torch.empty(out[0].shape, dtype=torch.bfloat16)
            )
            total = int(out[4][-1])
            y[:total] = out[0][:total] * (out[1][:total, None] if quant_mode else 1) * 2
            x = layer.combine(rank, world_size, out, y, seed)
            right.append(torch.allclose(x.float(), layer.expected(rank, seed=seed).float(), rtol=0.05, atol=0.1))
            if not quant_mode:
                right.append(torch.equal(x, layer.expected(rank, seed=seed)))
    return right, ways


@pytest.mark.parametrize("quant_mode", [0, 2])
def test_ranks_of_one_call_may_go_either_way(run_ranks: RunRanks, quant_mode: int) -> None:
    for right, ways in run_ranks(4, layers, 4, quant_mode, 30):
        assert all(right)
        assert ways["short"] > 25
        assert ways["long"] > 10


def kept(rank: int) -> list[int]:
    """Outputs that are kept stay as they are; inputs need not be the same objects."""
    with config.override(**PLAIN):
        outs = [layer.dispatch(rank, 2, seed) for seed in range(12)]
        copies = [[tensor.clone() for tensor in layer.dispatch(rank, 2, seed)] for seed in range(12)]
        totals = [int(out[4][-1]) for out in outs]
        return [
            i
            for i, (out, copy, total) in enumerate(zip(outs, copies, totals, strict=True))
            if not torch.equal(out[0][:total], copy[0][:total]) or not torch.equal(out[4], copy[4])
        ]


def test_outputs_that_are_kept_stay(run_ranks: RunRanks) -> None:
    assert run_ranks(2, kept) == [[], []]


def two_at_a_time(rank: int) -> tuple[bool, dict[str, int]]:
    """Two micro-batches: what the first dispatch gave is not what the latest one gave."""
    right = True
    with config.override(**PLAIN), counted() as ways:
        for seed in range(0, 16, 2):
            outs = [layer.dispatch(rank, 4, seed + i) for i in (0, 1)]
            for i, out in enumerate(outs):
                right = right and torch.equal(
                    layer.combine(rank, 4, out, out[0] * 2, seed + i), layer.expected(rank, seed=seed + i)
                )
    return right, ways


def test_two_micro_batches_under_way(run_ranks: RunRanks) -> None:
    for right, ways in run_ranks(4, two_at_a_time):
        assert right
        assert ways["short"] >= 24


def in_inference_mode(rank: int) -> tuple[bool, bool]:
    with config.override(**PLAIN), torch.inference_mode():
        for seed in range(4):
            out = layer.dispatch(rank, 2, seed)
            x = layer.combine(rank, 2, out, out[0].mul_(2), seed)
    return torch.equal(x, layer.expected(rank, seed=3)), out[0].is_inference()


def test_in_inference_mode_rows_are_normal_tensors(run_ranks: RunRanks) -> None:
    """Their changes are counted: a row that is changed while it is lent is noticed there, too."""
    assert run_ranks(2, in_inference_mode) == [(True, False)] * 2


# --- which calls ---------------------------------------------------------------------------------------------------------------


def ways_of(rank: int, change: str) -> dict[str, int]:
    """Of one call, after three that were alike."""
    changes: dict[str, Any] = {
        "nothing": {},
        "mask that is given now": {"x_active_mask": torch.ones(4, dtype=torch.bool)},
        "strides": {"x": layer.inputs(rank)[0].T.contiguous().T},
        "dtype": {"x": layer.inputs(rank)[0].half()},
        "tokens": {"x": layer.inputs(rank)[0][:3], "expert_ids": layer.inputs(rank)[1][:3]},
        "experts": {"moe_expert_num": 16},
        "type": {"moe_expert_num": 8.0},
        "subclass": {"x": torch.nn.Parameter(layer.inputs(rank)[0])},
        "log": {},
        "check": {},
    }[change]
    with config.override(**PLAIN):
        for _ in range(3):
            layer.dispatch(rank, 2)
        setting = {"log": {"log": "statistics"}, "check": {"check": True}}.get(change, {})
        with config.override(**setting), counted() as ways:
            error_of(lambda: layer.dispatch(rank, 2, **changes))
    return ways


@pytest.mark.parametrize(
    "change", ["nothing", "mask that is given now", "strides", "dtype", "tokens", "experts", "type", "subclass", "log", "check"]
)
def test_only_a_call_of_the_same_form_goes_the_short_way(run_ranks: RunRanks, change: str) -> None:
    short = change == "nothing"
    assert run_ranks(2, ways_of, change) == [{"short": int(short), "long": int(not short)}] * 2


def in_a_range(rank: int) -> dict[str, int]:
    with config.override(**PLAIN):
        for _ in range(3):
            layer.dispatch(rank, 2)
        with counted() as ways, torch.profiler.profile():
            layer.dispatch(rank, 2)
    return ways


def test_a_profiler_sees_the_phases(run_ranks: RunRanks) -> None:
    assert run_ranks(2, in_a_range) == [{"short": 0, "long": 1}] * 2


def statistics(rank: int) -> tuple[int, int]:
    with config.override(**PLAIN):
        before = commfuse.stats(world()).operators
        for _ in range(5):
            layer.dispatch(rank, 2)
        after = commfuse.stats(world()).operators
    return after[DISPATCH].calls - (before[DISPATCH].calls if DISPATCH in before else 0), after[DISPATCH].errors


def test_statistics_count_them(run_ranks: RunRanks) -> None:
    assert [calls for calls, _ in run_ranks(2, statistics)] == [5, 5]


def forgotten(rank: int) -> bool:
    """Whether a group that is dropped is dropped with all that was kept for it."""
    ranks = dist.new_group([0, 1])
    name = str(ranks.group_name)
    x, ids, _ = layer.inputs(rank)
    with config.override(**PLAIN):
        for _ in range(4):
            commfuse.npu_moe_distribute_dispatch_v2(x, ids, name, 2, rank, layer.EXPERTS)
    domain = weakref.ref(groups.resolve(name).shared["windows"][0])
    dist.barrier()
    dist.destroy_process_group(ranks)
    del ranks
    other = dist.new_group([0, 1])
    groups.resolve(other)  # forgets groups that are gone
    gc.collect()
    return domain() is None


def one_group_after_the_other(rank: int) -> list[int]:
    """The window's memory after each of some groups that were made, used and dropped."""
    from commfuse.backends.cpu import slabs

    x, ids, _ = layer.inputs(rank)
    held = []
    with config.override(**PLAIN):
        for _ in range(8):
            ranks = dist.new_group([0, 1])
            for _ in range(4):
                commfuse.npu_moe_distribute_dispatch_v2(x, ids, str(ranks.group_name), 2, rank, layer.EXPERTS)
            dist.barrier()
            dist.destroy_process_group(ranks)
            del ranks
            groups.resolve(world())
            gc.collect()
            held.append(slabs.own().arena.allocated_bytes())
    return held


def test_groups_that_are_dropped_leave_their_memory_to_the_next_ones(run_ranks: RunRanks) -> None:
    for held in run_ranks(2, one_group_after_the_other):
        assert len(set(held[3:])) == 1, held


def test_a_group_that_is_dropped_takes_them_with_it(run_ranks: RunRanks) -> None:
    assert run_ranks(2, forgotten) == [True, True]
