"""Calls that repeat a form go a short way; nothing else about them may differ: results, refusals, disagreements, deaths."""

from __future__ import annotations

import functools
import gc
import importlib
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import commfuse
from commfuse import config, engine, groups, repeats
from commfuse.checking import FAMILIES, SETTINGS, judge
from commfuse.operators.moe_distribute.cases import RoundTrip, random_case
from tests.conftest import RunRanks
from tests.faults.bodies import die, error_of, run, struck, world
from tests.faults.rank import Notes
from tests.faults.work import round_without, v2

from . import core, layer  # noqa: F401 - skips where the core is not built

Stages, Slabs, Session = (
    getattr(importlib.import_module(f"commfuse.backends.cpu.{module}"), name)
    for module, name in (("stages", "Stages"), ("slabs", "Slabs"), ("session", "Session"))
)

FAMILY = FAMILIES["moe_distribute"]
PLAIN = {**SETTINGS, "poison": False, "backend": "cpu"}
DISPATCH, COMBINE = FAMILY.operators


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """How many calls went the short way, and how many the long one."""
    ways = {"short": 0, "long": 0}
    short, long = repeats.Repeats.run, engine.bind

    def run_short(self: repeats.Repeats, args: dict[str, Any]) -> Any:
        outputs = short(self, args)
        ways["short"] += outputs is not None
        return outputs

    def bind(*args: Any, **named: Any) -> Any:
        ways["long"] += not named  # by name: for the messages of a short way
        return long(*args, **named)

    with mock.patch.object(repeats.Repeats, "run", run_short), mock.patch.object(engine, "bind", bind):
        yield ways


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


def test_a_group_that_is_dropped_takes_them_with_it(run_ranks: RunRanks) -> None:
    assert run_ranks(2, forgotten) == [True, True]


# --- what goes wrong -----------------------------------------------------------------------------------------------------------


def bad_ids(rank: int) -> tuple[dict[str, Any], bool, dict[str, int]]:
    with config.override(**PLAIN):
        for seed in range(3):
            layer.dispatch(rank, 2, seed)
        ids = layer.inputs(rank)[1]
        if rank:
            ids[1, 0] = 99
        error = error_of(lambda: layer.dispatch(rank, 2, expert_ids=ids))
        with counted() as ways:
            out = layer.dispatch(rank, 2, 5)
            x = layer.combine(rank, 2, out, out[0].mul_(2), 5)
        return error, torch.equal(x, layer.expected(rank, seed=5)), ways


def test_bad_ids_are_refused_on_all_ranks_and_the_next_call_is_short_again(run_ranks: RunRanks) -> None:
    for error, right, ways in run_ranks(2, bad_ids):
        assert error["error"] == "ArgumentError"
        assert "expert_ids[1, 0] = 99" in error["text"]
        assert right
        assert ways["short"] >= 1


def other_argument(rank: int) -> tuple[dict[str, Any], bool]:
    with config.override(**PLAIN):
        for seed in range(3):
            layer.dispatch(rank, 2, seed)
        error = error_of(lambda: layer.dispatch(rank, 2, quant_mode=2 * rank))
        out = layer.dispatch(rank, 2, 5)
        return error, torch.equal(layer.combine(rank, 2, out, out[0].mul_(2), 5), layer.expected(rank, seed=5))


def test_a_rank_in_another_call_is_named(run_ranks: RunRanks) -> None:
    for error, right in run_ranks(2, other_argument):
        assert error["error"] == "MismatchError"
        assert "quant_mode: 0 on rank 0 of 2; 2 on rank 1 of 2" in error["text"]
        assert right


def altered(rank: int, what: str) -> tuple[dict[str, Any], bool]:
    """Rank 0 alters what dispatch gave it, where a repeated combine reads it."""
    with config.override(**PLAIN):
        for seed in range(4):
            out = list(layer.dispatch(rank, 2, seed))
            total = int(out[4][-1])
            if seed == 3 and rank == 0:
                if what == "place":
                    out[2][: 3 * total] = out[2][: 3 * total].reshape(-1, 3).flip(0).reshape(-1)
                elif what == "fewer":
                    out[4].clamp_(max=total - 1)
                else:
                    out[4][-1] = 1 << 30
            error = error_of(lambda out=out, seed=seed: layer.combine(rank, 2, tuple(out), out[0].mul_(2), seed))  # type: ignore[misc]
        out = list(layer.dispatch(rank, 2, 5))
        return error, torch.equal(layer.combine(rank, 2, tuple(out), out[0].mul_(2), 5), layer.expected(rank, seed=5))


@pytest.mark.parametrize("what", ["place", "fewer", "more"])
def test_rows_of_another_dispatch_are_found(run_ranks: RunRanks, what: str) -> None:
    errors = run_ranks(2, altered, what)
    assert {error["error"] for error, _ in errors} == {"ArgumentError"}
    assert len({error["text"] for error, _ in errors}) == 1
    assert all(right for _, right in errors)


class Slow:
    """The core's half of a repeated combine, which sums only when told so."""

    def __init__(self, half: Any, wait: Callable[[], None]) -> None:
        self._half, self._wait = half, wait

    def sum(self) -> torch.Tensor:
        self._wait()
        return cast(torch.Tensor, self._half.sum())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._half, name)


def lent(rank: int, world_size: int, notes: Notes) -> None:
    """Rank 0 changes its rows while rank 1 has found them and not summed them yet."""
    with counted() as ways:
        for seed in range(5):
            out = layer.dispatch(rank, world_size, seed)
            if rank == 1 and seed == 4:
                for known in repeats.of(groups.resolve(world()), COMBINE)._known.values():
                    known._core = Slow(known._core, lambda: notes.await_all("changed", [0]))
            y = out[0].mul_(2)
            layer.combine(rank, world_size, out, y, seed)
    y.add_(1)
    notes.write("changed", ways)
    notes.write("found", error_of(lambda: layer.dispatch(rank, world_size, 5)))


def test_rows_that_are_changed_while_they_are_lent_are_noticed(tmp_path: Path) -> None:
    notes = run(tmp_path, 2, lent)
    assert [one["changed"]["short"] for one in notes] == [6, 6]
    for one in notes:
        assert one["found"]["error"] == "ExchangeError"
        assert "rank 0 changed a tensor that call " in one["found"]["text"]


def left_out(rank: int, world_size: int, notes: Notes) -> None:
    """The others go on without rank 3, which waits for them in a repeated call; then they take it in again."""
    for seed in range(4):
        assert v2(rank, world_size, seed)
    if rank != 3:
        assert round_without(rank, world_size, (0, 1, 2), 4)
    right = v2(rank, world_size, 5)
    with counted() as ways:
        right = all(v2(rank, world_size, seed) for seed in range(6, 10)) and right
    notes.write("right", right)
    notes.write("ways", ways)


def test_a_rank_that_was_left_out_is_taken_in_again(tmp_path: Path) -> None:
    notes = run(tmp_path, 4, left_out)
    assert [one["right"] for one in notes] == [True] * 4
    assert all(one["ways"]["short"] >= 4 for one in notes), notes


def two_threads(rank: int, world_size: int, notes: Notes) -> None:
    """While rank 0 waits in a repeated combine, another of its threads makes one with other weights; rank 1 comes after that."""
    for seed in range(4):
        out = layer.dispatch(rank, world_size, seed)
        y = out[0] * 2
        if seed < 3:
            layer.combine(rank, world_size, out, y, seed)
    sums: list[torch.Tensor] = []
    if rank == 1:
        notes.await_all("tried", [0])
        sums.append(layer.combine(rank, world_size, out, y, 3))
    else:
        first = threading.Thread(target=lambda: sums.append(layer.combine(rank, world_size, out, y, 3)))
        first.start()
        domain = groups.resolve(world()).shared["windows"][0]
        while domain.whole.published < 8:
            pass
        other = torch.full((4, layer.TOP_K), 1e6)
        notes.write("tried", error_of(lambda: layer.combine(rank, world_size, out, y, 3, expert_scales=other)))
        first.join()
    notes.write("right", torch.equal(sums[0], layer.expected(rank, seed=3)))


def test_a_second_thread_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    notes = run(tmp_path, 2, two_threads)
    assert notes[0]["tried"]["error"] == "GroupError"
    assert "another thread is in a call of group" in notes[0]["tried"]["text"]
    assert [one["right"] for one in notes] == [True, True]


def killed(rank: int, world_size: int, notes: Notes) -> None:
    """Rank 1 dies before its fifth call; the others' fifth is a repeated one."""
    for seed in range(4):
        layer.dispatch(rank, world_size, seed)
    if rank == 1:
        die()
    notes.write("found", error_of(lambda: layer.dispatch(rank, world_size, 4)))
    notes.write("again", error_of(lambda: layer.dispatch(rank, world_size, 5)))


def test_a_death_is_named_on_all_survivors(tmp_path: Path) -> None:
    notes = run(tmp_path, 4, killed, 1)
    for rank in (0, 2, 3):
        for when in ("found", "again"):
            assert notes[rank][when]["error"] == "ExchangeError"
            assert DISPATCH in notes[rank][when]["text"]
            assert "rank 1 (pid " in notes[rank][when]["text"]


def stumble() -> None:
    raise RuntimeError("stumbled")


ACTS = {"die": die, "stumble": stumble}
PLACES: dict[str, tuple[Any, str]] = {
    "before-publish": (Stages, "take"),
    "before-pull": (Slabs, "empty"),
    "before-end": (Session, "end"),
    "before-taking-back": (Session, "take_back"),
}


def struck_down(rank: int, world_size: int, notes: Notes, place: str, act: str) -> None:
    """Rank 1 is struck in a repeated round trip; the others read that, at the latest in the next one."""
    for seed in range(4):
        assert v2(rank, world_size, seed)
    with counted() as ways:
        if rank == 1:
            with struck(*PLACES[place], ACTS[act]), pytest.raises(RuntimeError, match="stumbled"):
                v2(rank, world_size, 4)
        found = error_of(lambda: notes.write("right", v2(rank, world_size, 4)) if rank != 1 else None)
        found = found or error_of(lambda: v2(rank, world_size, 5))
    notes.write("found", {**found, **ways})


@pytest.mark.parametrize("act", list(ACTS))
@pytest.mark.parametrize("place", list(PLACES))
def test_a_rank_that_is_struck_at_a_step_is_named(tmp_path: Path, place: str, act: str) -> None:
    body = functools.partial(struck_down, place=place, act=act)
    notes = run(tmp_path, 4, body, *([1] if act == "die" else []))
    for rank in (0, 2, 3):
        assert notes[rank].get("right", True)
        assert notes[rank]["found"]["error"] == "ExchangeError"
        assert "rank 1" in notes[rank]["found"]["text"]
        assert ("stumbled" if act == "stumble" else "has ended") in notes[rank]["found"]["text"]


def busy(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


def late(rank: int, world_size: int, notes: Notes) -> None:
    """Rank 1 comes when the others have begun to look around; everybody ends well."""
    for seed in range(4):
        layer.dispatch(rank, world_size, seed)
    if rank == 1:
        notes.await_all("waiting", [0])
        busy(0.2)
    else:
        notes.write("waiting", True)
    out = layer.dispatch(rank, world_size, 4)
    notes.write("right", torch.equal(layer.combine(rank, world_size, out, out[0].mul_(2), 4), layer.expected(rank, seed=4)))


def test_a_late_rank_is_waited_for(tmp_path: Path) -> None:
    notes = run(tmp_path, 2, late)
    assert [one["right"] for one in notes] == [True, True]
