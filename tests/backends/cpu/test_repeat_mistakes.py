"""What goes wrong in a call that takes the short way is found and told as on the long one: refusals, disagreements, loans, deaths."""

from __future__ import annotations

import functools
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from commfuse import config, groups, repeats
from tests.conftest import RunRanks
from tests.faults.bodies import die, error_of, run, world
from tests.faults.rank import Notes
from tests.faults.work import round_without, v2

from . import core, layer  # noqa: F401 - skips where the core is not built
from .ways import COMBINE, DISPATCH, PLAIN, counted


def at_step(operator: str, name: str, act: Callable[[], object]) -> None:
    """Let this rank do ``act`` when the next repeated calls of ``operator`` come to step ``name``."""

    def at(step: str) -> None:
        if step == name:
            act()

    for known in repeats.of(groups.resolve(world()), operator).known:
        known._core.at_step = at  # type: ignore[attr-defined]


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


def lent(rank: int, world_size: int, notes: Notes) -> None:
    """Rank 0 changes its rows while rank 1 has found them and not summed them yet."""
    with counted() as ways:
        for seed in range(5):
            out = layer.dispatch(rank, world_size, seed)
            if rank == 1 and seed == 4:
                at_step(COMBINE, "sum", lambda: notes.await_all("changed", [0]))
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


def interrupted(rank: int, world_size: int, notes: Notes, with_grad: bool) -> None:
    """Ctrl-C ends rank 0's wait in a repeated combine, whose rows its peer can read by then."""
    for seed in range(4):
        out = layer.dispatch(rank, world_size, seed)
        y = out[0].mul_(2).requires_grad_(with_grad)
        if seed < 3:
            layer.combine(rank, world_size, out, y, seed)
    if rank == 1:
        notes.await_all("interrupted", [0])
        return
    session = groups.resolve(world()).shared["windows"][0].whole
    threading.Timer(0.03, os.kill, (os.getpid(), signal.SIGINT)).start()
    found = error_of(lambda: layer.combine(rank, world_size, out, y, 3))
    slab = session.slabs.holding(y)
    notes.write("interrupted", {**found, "held": slab.in_use(), "published": session.published})


@pytest.mark.parametrize("with_grad", [False, True])
def test_rows_that_peers_can_read_are_held_after_an_interrupt(tmp_path: Path, with_grad: bool) -> None:
    seen = run(tmp_path, 2, functools.partial(interrupted, with_grad=with_grad))[0]["interrupted"]
    assert (seen["error"], seen["held"], seen["published"]) == ("KeyboardInterrupt", True, 8)


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


def never_there(rank: int, world_size: int, notes: Notes) -> None:
    """Rank 3 has no part in the group's calls from the first one on; calls of one form are made again and again."""
    notes.write("right", rank == 3 or all(round_without(rank, world_size, (0, 1, 2), seed) for seed in range(6)))


def test_a_rank_that_is_never_there_is_not_waited_for(tmp_path: Path) -> None:
    assert [one["right"] for one in run(tmp_path, 4, never_there)] == [True] * 4


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
STEPS = [
    (DISPATCH, "publish"),
    (DISPATCH, "pull"),
    (DISPATCH, "end"),
    (COMBINE, "publish"),
    (COMBINE, "sum"),
    (COMBINE, "end"),
    (COMBINE, "take back"),
]


def struck_down(rank: int, world_size: int, notes: Notes, operator: str, step: str, act: str) -> None:
    """Rank 1 is struck in a repeated round trip; the others read that, at the latest in the next one."""
    for seed in range(4):
        assert v2(rank, world_size, seed)
    with counted() as ways:
        if rank == 1:
            at_step(operator, step, ACTS[act])
            with pytest.raises(RuntimeError, match="stumbled"):
                v2(rank, world_size, 4)
        found = error_of(lambda: notes.write("right", v2(rank, world_size, 4)) if rank != 1 else None)
        found = found or error_of(lambda: v2(rank, world_size, 5))
    notes.write("found", {**found, **ways})


@pytest.mark.parametrize("act", list(ACTS))
@pytest.mark.parametrize(("operator", "step"), STEPS)
def test_a_rank_that_is_struck_at_a_step_is_named(tmp_path: Path, operator: str, step: str, act: str) -> None:
    body = functools.partial(struck_down, operator=operator, step=step, act=act)
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
