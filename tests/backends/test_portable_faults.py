"""On portable, too, a rank that dies, is late or breaks off is named on all others, with one cause, and whoever waits is told."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import commfuse
from commfuse import config, groups, works
from commfuse.checking import FAMILIES
from tests.faults.bodies import Body, die, error_of, run, world
from tests.faults.rank import Notes
from tests.faults.work import ROUNDS

OTHERS = [0, 2, 3]  # of four ranks, but the one that has the fault
REMEDY = "Now: make a new process group of the ranks that are left"
BARRIER = "_npu_distribute_barrier"


def barrier(group: str, size: int) -> None:
    commfuse._npu_distribute_barrier(torch.ones(1), group, size)


def cause_of(text: str) -> str:
    """What is wrong, without who found it and who reads it."""
    return text.partition("): ")[2] if "given up (found by" in text else text


def killed_in(family: str) -> Body:
    """Rank 1 ends while the others call on; those then go on in a group without it."""

    def body(rank: int, world_size: int, notes: Notes) -> None:
        round_of_calls = ROUNDS[family]
        assert round_of_calls(rank, world_size, 0)
        if rank == 1:
            notes.write("strike", {"at": time.monotonic(), "pid": os.getpid()})
            die()
        notes.write("met", error_of(lambda: round_of_calls(rank, world_size, 1)))
        notes.write("again", error_of(lambda: barrier(world(), world_size)))
        notes.write("alive", error_of(lambda: commfuse.alive(world())))
        notes.write("reset", error_of(lambda: commfuse.reset(world())))
        left = dist.new_group(OTHERS, use_local_synchronization=True)
        notes.write("after", error_of(lambda: barrier(str(left.group_name), 3)))

    return body


def killed(rank: int, world_size: int, notes: Notes) -> None:
    killed_in("v2")(rank, world_size, notes)


def killed_in_halves(rank: int, world_size: int, notes: Notes) -> None:
    killed_in("split")(rank, world_size, notes)


def killed_in_matmul(rank: int, world_size: int, notes: Notes) -> None:
    killed_in("gmm")(rank, world_size, notes)


@pytest.mark.parametrize("body", [killed, killed_in_halves, killed_in_matmul])
def test_a_death_has_one_cause_on_all_others_and_a_new_group_works(tmp_path: Path, body: Body) -> None:
    notes = run(tmp_path, 4, body, 1, backend="portable")
    assert len({cause_of(notes[rank]["met"]["text"]) for rank in OTHERS}) == 1
    for rank in OTHERS:
        met, again = notes[rank]["met"]["text"], notes[rank]["again"]["text"]
        assert notes[rank]["met"]["error"] == notes[rank]["again"]["error"] == "ExchangeError"
        assert met.startswith("npu_")
        assert f": group '0', rank {rank} of 4, call " in met
        assert f"rank 1 (pid {notes[1]['strike']['pid']}) has ended; awaited for 0." in met
        assert met.endswith(REMEDY)
        assert again.startswith(f"{BARRIER}: group '0', rank {rank} of 4")
        assert cause_of(met).removesuffix(f". {REMEDY}") in again
        assert notes[rank]["after"] == {}
        for name in ("alive", "reset"):
            assert notes[rank][name]["error"] == "BackendError"
            assert "make a new process group of the ranks that are left" in notes[rank][name]["text"]


@pytest.mark.alone
def test_a_death_is_reported_within_a_second(tmp_path: Path) -> None:
    notes = run(tmp_path, 4, killed, 1, backend="portable")
    assert max(notes[rank]["met"]["at"] for rank in OTHERS) - notes[1]["strike"]["at"] < 1


def killed_before_the_first_call(rank: int, world_size: int, notes: Notes) -> None:
    if rank == 1:
        die()
    errors = [error_of(lambda: barrier(world(), world_size)) for _ in range(2)]
    notes.write("errors", errors)


@pytest.mark.parametrize("backend", ["portable", "auto"])
def test_a_death_before_the_first_call_is_kept_too(tmp_path: Path, backend: str) -> None:
    notes = run(tmp_path, 4, killed_before_the_first_call, 1, backend=backend)
    first, again = ([notes[rank]["errors"][turn] for rank in OTHERS] for turn in (0, 1))
    assert len({cause_of(error["text"]) for error in first}) == 1
    for error in (*first, *again):  # nobody knows its process yet
        assert error["error"] == "ExchangeError"
        assert f"choice of a backend for '{backend}': group '0', rank " in error["text"]
        assert "exchange with rank 1 failed (" in error["text"]


def late(rank: int, world_size: int, notes: Notes) -> None:
    """Rank 1 comes when all others have given up waiting for it."""
    barrier(world(), world_size)
    if rank == 1:
        notes.write("pid", os.getpid())
        notes.await_all("met", OTHERS)
    with config.override(timeout=30.0 if rank == 1 else 0.5):
        notes.write("met", error_of(lambda: barrier(world(), world_size)))


def test_a_late_rank_is_named_at_the_deadline_and_reads_it_when_it_comes(tmp_path: Path) -> None:
    notes = run(tmp_path, 4, late, backend="portable")
    assert len({cause_of(one["met"]["text"]) for one in notes}) == 1
    assert f"rank 1 (pid {notes[1]['pid']}) did not come in time; awaited for 0.5" in notes[1]["met"]["text"]
    assert "its arguments of call 3. " in notes[1]["met"]["text"]


def interrupted(rank: int, world_size: int, notes: Notes) -> None:
    """All others wait for rank 1; rank 0 breaks off. Three groups, since each is given up."""
    names = [str(dist.new_group(list(range(world_size))).group_name) for _ in range(3)]
    errors = []
    for turn, name in enumerate(names):
        barrier(name, world_size)
        if rank == 1:
            notes.await_all(f"met{turn}", OTHERS)
        pressed: list[float] = []
        shared = groups.resolve(name).shared
        presser = threading.Thread(target=_press, args=(shared, shared["number"] + 1, pressed))
        if rank == 0:
            presser.start()
        errors.append({**error_of(lambda name=name: barrier(name, world_size)), "pressed": pressed})
        presser.join() if rank == 0 else None
        notes.write(f"met{turn}", rank)
    notes.write("errors", errors)


def _press(shared: dict[str, Any], number: int, pressed: list[float]) -> None:
    """Press Ctrl-C when call ``number`` of a group has told the others of itself."""
    while shared["number"] < number:
        time.sleep(0.001)
    time.sleep(0.1)  # soon it waits, though that does not matter
    pressed.append(time.monotonic())
    os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_ends_a_wait_and_those_who_wait_for_another_rank_are_told(tmp_path: Path) -> None:
    notes = run(tmp_path, 4, interrupted, backend="portable")
    for turn in range(3):
        assert notes[0]["errors"][turn]["error"] == "KeyboardInterrupt"
        for rank in (1, 2, 3):
            assert "rank 0 (pid " in notes[rank]["errors"][turn]["text"]
            assert ") broke off: KeyboardInterrupt" in notes[rank]["errors"][turn]["text"]
    seconds = [one["at"] - one["pressed"][0] for one in notes[0]["errors"]]
    assert min(seconds) < 0.1  # of three, since other processes use the cores too
    assert max(seconds) < 1


def killed_in_the_other_domain(rank: int, world_size: int, notes: Notes) -> None:
    """Four ranks, two by two in expert-parallel and tensor-parallel groups: rank 0 shares none with rank 3, which ends."""
    family = FAMILIES["moe_distribute"]
    case = family.random_case(28)
    assert (case.world_size, case.tp_world_size) == (2, 2)
    assert family.run_on_rank(rank, case)
    if rank == 3:
        notes.write("pid", os.getpid())
        die()
    notes.write("met", error_of(lambda: family.run_on_rank(rank, case)))
    notes.await_all("met", [0, 1, 2])  # nobody ends, which would be told as well


def test_a_death_in_a_tensor_parallel_group_reaches_all(tmp_path: Path) -> None:
    notes = run(tmp_path, 4, killed_in_the_other_domain, 3, backend="portable")
    assert {one["met"]["error"] for one in notes[:3]} == {"ExchangeError"}
    for one in notes[:3]:
        assert f"rank 1 (pid {notes[3]['pid']}) has ended" in one["met"]["text"]


# --- waits ---------------------------------------------------------------------------------------------------------------------------


class Work:
    """A work that is done, or fails, when it is told to."""

    def __init__(self) -> None:
        self.done, self.error = threading.Event(), ""

    def wait(self, _: Any) -> None:
        self.done.wait()
        if self.error:
            raise RuntimeError(self.error)

    def fail(self) -> None:
        self.error = "closed"
        self.done.set()


def nothing(*_: Any) -> None:
    return


def test_a_wait_says_which_work_was_late_or_failed() -> None:
    fine, stuck = Work(), Work()
    fine.done.set()
    with pytest.raises(works.StuckError) as late:
        works.wait([fine, stuck], 0.01, nothing, nothing)
    assert (late.value.index, late.value.error) == (1, None)
    stuck.fail()
    with pytest.raises(works.StuckError) as failed:
        works.wait([fine, stuck], 60, nothing, nothing)
    assert (failed.value.index, str(failed.value.error)) == (1, "closed")
    assert len(works.wait([fine, fine], 60, nothing, nothing)) == 2


def test_what_looks_at_the_peers_can_end_a_wait() -> None:
    def look(index: int, seconds: float) -> None:
        raise commfuse.ExchangeError(f"work {index}")

    stuck = Work()
    with pytest.raises(commfuse.ExchangeError, match="work 0"):
        works.wait([stuck], 60, look, stuck.fail)


def left(close: Callable[[], None], stuck: Work) -> threading.Thread:
    before = set(threading.enumerate())
    works._idle.clear()
    with pytest.raises(works.StuckError):
        works.wait([stuck], 0.01, nothing, close)
    (thread,) = set(threading.enumerate()) - before
    return thread


def test_no_thread_is_within_torch_when_the_interpreter_ends() -> None:
    """One that came back from there then would abort the process."""
    stuck = Work()
    thread = left(stuck.fail, stuck)
    assert thread.is_alive()
    works._end()
    thread.join(10)
    assert not thread.is_alive()
