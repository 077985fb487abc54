"""Living ranks that others leave out, and take in again: nobody is hurried, mistaken for another, or left behind."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import commfuse
from tests.backends.switching import one_round
from tests.faults.bodies import die, error_of, run, struck, world
from tests.faults.rank import Notes
from tests.faults.work import round_without, split, v2

from . import core, layer  # noqa: F401 - skips where the core is not built

ALL, FEW = (0, 1, 2, 3), (0, 1, 2)


def slow(seconds: float) -> Callable[[], None]:
    def pause() -> None:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            pass

    return pause


def behind(rank: int, world_size: int, notes: Notes) -> None:
    """Rank 3 is left out of more calls than a ring of headers holds, and slow to begin anew with the others."""
    from commfuse.backends.cpu.session import Session

    right = [v2(rank, world_size, 0)]
    right += [one_round(rank, FEW, seed) for seed in range(8) if rank in FEW]
    with struck(Session, "restart", slow(0.05)) if rank == 3 else nullcontext():
        right += [v2(rank, world_size, 9)]
    notes.write("right", right)


def test_a_rank_that_is_far_behind_is_awaited_when_it_is_taken_in(tmp_path: Path) -> None:
    assert all(all(notes["right"]) for notes in run(tmp_path, 4, behind))


def still_reading(rank: int, world_size: int, notes: Notes) -> None:
    """Rank 3 has met the others in a dispatch and reads slowly, while they go on without it, overwriting what they showed before."""
    from commfuse.backends.cpu.session import Session

    right = [v2(rank, world_size, 0)]
    with struck(Session, "wait", slow(0.3), after=True) if rank == 3 else nullcontext():
        out = layer.dispatch(rank, world_size, 1, num_tokens=5)
    if rank in FEW:
        right += [one_round(rank, FEW, seed) for seed in range(8)]
    right += [one_round(rank, ALL, seed) for seed in range(2)]
    again = layer.dispatch(rank, world_size, 1, 5)
    right.append(torch.equal(layer.combine(rank, world_size, again, out[0] * 2, 1, 5), layer.expected(rank, 5, 1)))
    notes.write("right", right)


def test_what_a_rank_still_reads_is_not_overwritten_by_those_that_leave_it_out(tmp_path: Path) -> None:
    assert all(all(notes["right"]) for notes in run(tmp_path, 4, still_reading))


def stuck_in_a_call(rank: int, world_size: int, notes: Notes) -> None:
    """Rank 3 does not come out of a dispatch; the others want to go on without it, wait for it, and then do so as after any late rank."""
    from commfuse.backends.cpu.session import Session

    right = [v2(rank, world_size, 0)]
    found: dict[str, Any] = {}
    if rank == 3:
        with struck(Session, "wait", lambda: notes.await_all("late", [0, 1, 2]), after=True):
            error_of(lambda: layer.dispatch(rank, world_size, 1, num_tokens=5))
    else:
        layer.dispatch(rank, world_size, 1, num_tokens=5)
        with commfuse.config.override(timeout=0.5):
            found = error_of(lambda: one_round(rank, FEW, 2))
            right.append(one_round(rank, FEW, 3))
        notes.write("late", rank)
    commfuse.reset(world())
    notes.write("found", {"error": found, "right": [*right, one_round(rank, ALL, 4)]})


def test_a_rank_that_does_not_finish_reading_is_late(tmp_path: Path) -> None:
    found = [notes["found"] for notes in run(tmp_path, 4, stuck_in_a_call)]
    assert all(all(one["right"]) for one in found)
    for one in found[:3]:
        assert one["error"]["error"] == "ExchangeError"
        assert "rank 3 (pid " in one["error"]["text"]
        assert "that it has read what was published by call" in one["error"]["text"]


def different_tables(rank: int, world_size: int, notes: Notes) -> None:
    """Rank 2 leaves out rank 1, which, like rank 0, calls with both; then all do the same again."""
    assert one_round(rank, ALL, 0)
    if rank in FEW:
        assert one_round(rank, FEW, 0)
        notes.write("error", error_of(lambda: one_round(rank, (0, 2) if rank == 2 else FEW, 1)))
        assert one_round(rank, FEW, 2)
    notes.write("right", [one_round(rank, ALL, seed) for seed in range(3)])


def test_who_has_failed_to_agree_is_in_step_again_with_the_next_call(tmp_path: Path) -> None:
    notes = run(tmp_path, 4, different_tables)
    for rank in FEW:
        assert notes[rank]["error"]["error"] == "MismatchError"
        assert "rank 2: goes on with ranks 0, 2" in notes[rank]["error"]["text"]
    assert all(all(one["right"]) for one in notes)


def table_out_of_range(rank: int, world_size: int, notes: Notes) -> None:
    """Of those who go on without rank 3, rank 1 gives a table that says nothing; in the end all give one."""
    assert one_round(rank, ALL, 0)
    errors = []
    for seed in range(2) if rank in FEW else ():
        assert one_round(rank, FEW, seed)
        errors.append(error_of(lambda seed=seed: one_round(rank, FEW, seed, "bad-table" if rank == 1 else "")))
    all_wrong = error_of(lambda: one_round(rank, ALL, 2, "bad-table"))
    notes.write("found", {"errors": errors, "all wrong": all_wrong, "right": one_round(rank, ALL, 2)})


def test_a_table_that_cannot_be_read_is_refused_wherever_it_comes_from(tmp_path: Path) -> None:
    found = [notes["found"] for notes in run(tmp_path, 4, table_out_of_range)]
    assert all(one["right"] for one in found)
    assert all(one["all wrong"]["error"] == "ArgumentError" for one in found)
    assert all("refused on all 4 ranks" in one["all wrong"]["text"] for one in found)
    for rank in FEW:
        for error in found[rank]["errors"]:
            assert error["error"] == "ArgumentError"
            assert "refused on rank 1 of 4" in error["text"]
            assert "elastic_info[0] = 99" in error["text"]


def refused_after_a_death(rank: int, world_size: int, notes: Notes) -> None:
    """Rank 1 is dead, rank 3 was left out and does not know; its next call is wrong, and names nobody who is left."""
    assert v2(rank, world_size, 0)
    if rank == 1:
        die()
    error_of(lambda: v2(rank, world_size, 1))
    assert round_without(rank, world_size, (0, 2, 3), 2)
    if rank in (0, 2):
        assert round_without(rank, world_size, (0, 2), 3)
        notes.write("error", error_of(lambda: one_round(rank, (0, 2, 3), 4)))
    else:
        ids = layer.inputs(rank)[1] + 99
        notes.write("error", error_of(lambda: layer.dispatch(rank, world_size, 4, expert_ids=ids)))
    notes.write("right", round_without(rank, world_size, (0, 2, 3), 5))


def test_a_wrong_call_of_a_rank_that_was_left_out_ends(tmp_path: Path) -> None:
    notes = run(tmp_path, 4, refused_after_a_death, 1)
    for rank in (0, 2, 3):
        assert notes[rank]["error"]["error"] == "ArgumentError"
        assert "refused on rank 3 of 4" in notes[rank]["error"]["text"]
        assert notes[rank]["right"]


def interrupted_while_agreeing(rank: int, world_size: int, notes: Notes) -> None:
    """Ctrl-C on rank 1, which has shown whom it goes on with, when rank 0 has agreed to that and is in the call."""
    from commfuse.backends.cpu.align import _Attempt

    assert v2(rank, world_size, 0)
    if rank < 2:
        with mock.patch.object(_Attempt, "_read", _break_off_late) if rank == 1 else nullcontext():
            notes.write("error", error_of(lambda: one_round(rank, (0, 1), 1)))
        assert one_round(rank, (0, 1), 2)
    notes.write("right", v2(rank, world_size, 3) and split(rank, world_size, 4))


def _break_off_late(attempt: Any) -> None:
    end = time.monotonic() + 20
    while time.monotonic() < end:
        note = attempt._domain.board.read(0)
        if note is not None and note.settled.attempt == attempt._mine.attempt:
            raise KeyboardInterrupt
    raise AssertionError("the other rank has not agreed")


def test_ctrl_c_while_agreeing_ends_the_call_of_those_that_have_agreed(tmp_path: Path) -> None:
    notes = run(tmp_path, 4, interrupted_while_agreeing)
    assert [notes[rank]["error"]["error"] for rank in (0, 1)] == ["ExchangeError", "KeyboardInterrupt"]
    assert "rank 1 broke off: KeyboardInterrupt" in notes[0]["error"]["text"]
    assert all(one["right"] for one in notes)


def setup_that_is_void(rank: int, world_size: int, notes: Notes) -> None:
    """Rank 3 has a setup under way when the others, who have dropped theirs, go on without it."""
    assert split(rank, world_size, 0)
    x, ids, _ = layer.inputs(rank)
    common = layer.common(rank, world_size)
    y, _, command = commfuse.npu_moe_distribute_dispatch_setup(x, ids, **common)
    notes.write("set up", rank)
    if rank in FEW:
        assert one_round(rank, FEW, 1)
        notes.write("error", {})
    else:
        notes.await_all("error", list(FEW))
        notes.write("error", error_of(lambda: commfuse.npu_moe_distribute_dispatch_teardown(x, y, ids, command, **common)))
    notes.write("right", v2(rank, world_size, 2) and split(rank, world_size, 3) and torch.equal(x, layer.inputs(rank)[0]))


def test_a_setup_of_a_rank_that_was_left_out_is_void(tmp_path: Path) -> None:
    notes = run(tmp_path, 4, setup_that_is_void)
    assert notes[3]["error"]["error"] == "ExchangeError"
    assert "its setup is void" in notes[3]["error"]["text"]
    assert all(one["right"] for one in notes)
