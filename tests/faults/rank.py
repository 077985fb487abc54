"""What one process of a faulty group does, and what it notes for the test: a line of JSON for each thing that it has seen."""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

import commfuse
from commfuse import config

from .cases import Case, Place
from .work import ROUNDS, round_without

DEADLINE = 1.5  # COMMFUSE_TIMEOUT where it is to run out
PATIENCE = 30.0  # where it is not: longer than a case may take
_SHORT_DELAY = 0.1
_ROUNDS = 3  # after the fault: in the second at the latest, all are told


class Notes:
    """What a rank has seen, by name, in a folder that all ranks and the test share; each note appears as a whole."""

    def __init__(self, folder: Path, rank: int) -> None:
        self._folder, self._rank = folder, rank

    def write(self, name: str, content: Any) -> None:
        path = self._folder / f"{name}.{self._rank}"
        part = path.with_name(f"{path.name}.part")
        part.write_text(json.dumps(content))
        part.rename(path)

    def await_all(self, name: str, ranks: list[int]) -> None:
        """Wait until ``ranks`` have written ``name``."""
        end = time.monotonic() + PATIENCE
        while not all((self._folder / f"{name}.{rank}").exists() for rank in ranks):
            assert time.monotonic() < end, f"{name} of ranks {ranks} did not come"
            time.sleep(0.005)


def serve(rank: int, folder: Path, case: Case) -> None:
    """Be rank ``rank`` of a group in which ``case`` happens."""
    notes = join(rank, case.world_size, folder)
    with config.override(backend="cpu", timeout=PATIENCE, first_timeout=PATIENCE):
        if not case.place.first:
            assert ROUNDS[case.family](rank, case.world_size, 0)
            assert round_without(rank, case.world_size, tuple(range(case.world_size)), 0)
        before = num_open_files()
        _meet_the_fault(rank, case, notes)
        if not case.harmless:
            _afterwards(rank, case, notes)
        notes.write("files", [before, num_open_files()] if not case.place.first else [])


def join(rank: int, world_size: int, folder: Path) -> Notes:
    """Make this process a rank of the default group; what it prints on stderr goes to a file."""
    _to_file(folder / f"stderr.{rank}")
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=PATIENCE))
    notes = Notes(folder, rank)
    notes.write("joined", rank)
    notes.await_all("joined", list(range(world_size)))  # nobody ends while another one still connects
    return notes


def _to_file(path: Path) -> None:
    """Send stderr to ``path``, tracebacks and, on SIGUSR1, the stacks of all threads."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 2)
    os.close(file)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    faulthandler.register(signal.SIGUSR1, file=2, all_threads=True)


def num_open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


# --- the fault ---------------------------------------------------------------------------------------------------------------------


def _meet_the_fault(rank: int, case: Case, notes: Notes) -> None:
    """Make rounds of calls, in the first of which the victim meets its fault; note how they end."""
    limit = DEADLINE if case.late else PATIENCE
    right: list[bool] = []
    with ExitStack() as stack, config.override(timeout=limit, first_timeout=limit):
        if rank == case.victim:
            stack.enter_context(_fault_at(case.place, lambda: _strike(rank, case, notes)))
        try:
            for seed in range(1, 1 + _ROUNDS):
                right.append(ROUNDS[case.family](rank, case.world_size, seed))
            notes.write("met", {"right": right})
        except (commfuse.CommfuseError, KeyboardInterrupt) as error:
            notes.write("met", {"right": right, **told(error)})


def told(error: BaseException) -> dict[str, Any]:
    return {"error": type(error).__name__, "text": str(error), "at": time.monotonic()}


def _fault_at(place: Place, strike: Callable[[], None]) -> Any:
    """Put ``strike`` before or after one call of the place's function."""
    module, _, path = place.target.partition(":")
    *owners, name = path.split(".")
    owner: Any = importlib.import_module(module)
    for part in owners:
        owner = getattr(owner, part)
    original, calls = getattr(owner, name), [0]

    def with_fault(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] != place.nth:
            return original(*args, **kwargs)
        if not place.after:
            strike()
        result = original(*args, **kwargs)
        if place.after:
            strike()
        return result

    return mock.patch.object(owner, name, with_fault)


def _strike(rank: int, case: Case, notes: Notes) -> None:
    """Do to this process what the case says."""
    others = [other for other in range(case.world_size) if other != rank]
    notes.write("strike", {"at": time.monotonic(), "pid": os.getpid()})
    match case.kind.name:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stop" | "stop-long":
            os.kill(os.getpid(), signal.SIGSTOP)  # the test sends SIGCONT
        case "delay":
            time.sleep(_SHORT_DELAY)
        case "delay-long":
            notes.await_all("met", others)
        case "exception":
            raise ZeroDivisionError("a mistake in the user's code")
        case "exit":
            sys.exit(0)
        case "interrupt":
            if case.place.own:
                try:
                    signal.raise_signal(signal.SIGINT)
                except KeyboardInterrupt:
                    notes.await_all("met", others)
            else:
                signal.raise_signal(signal.SIGINT)


# --- afterwards --------------------------------------------------------------------------------------------------------------------


def _afterwards(rank: int, case: Case, notes: Notes) -> None:
    """Call again, which gives the same cause; then go on: without the dead, or all together anew."""
    try:
        ROUNDS[case.family](rank, case.world_size, 9)
        notes.write("again", {})
    except commfuse.CommfuseError as error:
        notes.write("again", told(error))
    if case.place.first:
        return  # the windows were never joined: a new process group is needed
    living = [other for other in range(case.world_size) if not (case.kind.ends and other == case.victim)]
    notes.await_all("again", living)
    group = str(dist.group.WORLD.group_name)
    if case.kind.ends:
        alive = commfuse.alive(group)
        right = [round_without(rank, case.world_size, alive, seed) for seed in (4, 5)]
    else:
        alive = tuple(living)
        commfuse.reset(group)
        right = [ROUNDS[case.family](rank, case.world_size, seed) for seed in (4, 5)]
    notes.write("after", {"alive": alive, "right": right})
