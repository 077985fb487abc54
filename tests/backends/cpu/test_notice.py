"""A death is noticed soon, and Ctrl-C ends a wait."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

import commfuse
from commfuse import groups
from tests.faults.bodies import Body, die, error_of, run, world
from tests.faults.rank import Notes
from tests.faults.work import v2

from . import core, layer  # noqa: F401 - skips where the core is not built


def killed_when_large(rank: int, world_size: int, notes: Notes, num_bytes: int) -> None:
    memory = np.ones(num_bytes if rank == 1 else 1, np.uint8)
    assert v2(rank, world_size, 0)
    if rank == 1:
        notes.write("strike", {"at": time.monotonic(), "held": len(memory)})
        die()
    notes.write("met", error_of(lambda: v2(rank, world_size, 1)))


def killed_when_small(rank: int, world_size: int, notes: Notes) -> None:
    killed_when_large(rank, world_size, notes, 1)


def killed_with_a_gigabyte(rank: int, world_size: int, notes: Notes) -> None:
    killed_when_large(rank, world_size, notes, 1 << 30)


@pytest.mark.parametrize("body", [killed_when_small, killed_with_a_gigabyte])
def test_a_death_is_reported_within_a_second(tmp_path: Path, body: Body) -> None:
    notes = run(tmp_path, 4, body, 1)
    for rank in (0, 2, 3):
        assert "rank 1 (pid " in notes[rank]["met"]["text"]
        assert notes[rank]["met"]["at"] - notes[1]["strike"]["at"] < 1


def interrupted(rank: int, world_size: int, notes: Notes) -> None:
    """Rank 1 waits until rank 0 waits for it in a call, and presses Ctrl-C there; then both start afresh. Three times."""
    from commfuse import _core
    from commfuse.backends.cpu import domain

    assert v2(rank, world_size, 0)
    whole = domain.of(groups.resolve(world())).whole
    seconds = []
    for turn in range(3):
        other = Path(f"/proc/{pid_of(0)}/stat") if rank else Path()
        if rank:
            awaited = whole.newest + 1
            while whole.channel.counter(0, _core.PUBLISHED) < awaited or " S " not in other.read_text():
                time.sleep(0.001)
            notes.write(f"pressed{turn}", time.monotonic())
            os.kill(pid_of(0), signal.SIGINT)
            notes.await_all(f"ended{turn}", [0])  # a rank whose peer comes as the signal does may end its call as if nothing were
            error = error_of(lambda: v2(rank, world_size, 1))
        else:
            error = error_of(lambda: v2(rank, world_size, 1))
            notes.write(f"ended{turn}", True)
            notes.await_all(f"pressed{turn}", [1])
        seconds.append(error)
        commfuse.reset(world())
        assert v2(rank, world_size, 2)
    notes.write("errors", seconds)


def pid_of(rank: int) -> int:
    from commfuse.backends.cpu import domain

    return int(domain.of(groups.resolve(world())).pids[rank])


def test_ctrl_c_ends_a_wait_at_once_and_the_others_are_told(tmp_path: Path) -> None:
    notes = run(tmp_path, 2, interrupted)
    seconds = []
    for turn, (mine, theirs) in enumerate(zip(notes[0]["errors"], notes[1]["errors"], strict=True)):
        assert mine["error"] == "KeyboardInterrupt"
        assert "rank 0 broke off: KeyboardInterrupt" in theirs["text"]
        seconds.append(mine["at"] - notes[1][f"pressed{turn}"])
    assert min(seconds) < 0.1  # of three, since other processes use the cores too
    assert max(seconds) < 1
