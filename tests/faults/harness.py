"""Runs one faulty group: starts its processes, continues a stopped one, watches the time, and gathers what the ranks have noted."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing import forkserver
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from commfuse.ranks import _context

_LIMIT = 60.0  # seconds that a case may take, with every core busy elsewhere
_TICK = 0.005
_PAUSE = 0.1  # seconds that a short stop lasts


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was seen of a faulty group; notes by rank, then by name."""

    pids: list[int]
    exit_codes: list[int | None]
    notes: list[dict[str, Any]]
    stderr: list[str]
    left: list[str] = field(default_factory=list)  # what should be gone: processes, shared memory, files of this process


def run(
    serve: Callable[..., None], world_size: int, folder: Path, *args: Any, stop_until: str = "", limit: float = _LIMIT
) -> Report:
    """Run ``serve(rank, folder, *args)`` on ``world_size`` processes until all have ended.

    ``stop_until``: a process that has stopped itself goes on soon (''), or when all others have noted this.

    Raises:
        AssertionError: they were not done in time; the text has every rank's stack. All are gone then.
    """
    context = _context(("pytest", "numpy", "tests.faults.rank"))
    forkserver.ensure_running()
    segments, files = _segments(), _open_files()
    processes = [context.Process(target=serve, args=(rank, folder, *args), daemon=True) for rank in range(world_size)]
    for process in processes:
        process.start()
    pids = [process.pid or 0 for process in processes]
    try:
        _watch(processes, folder, stop_until, limit)
    finally:
        for process in processes:
            process.kill()
            process.join()
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.close()
    left = [f"process {pid}" for pid in pids if Path(f"/proc/{pid}").exists()]
    left += sorted(_segments() - segments) + sorted(_open_files() - files)
    return Report(
        pids=pids,
        exit_codes=codes,
        notes=[_notes(folder, rank) for rank in range(world_size)],
        stderr=[_read(folder / f"stderr.{rank}") for rank in range(world_size)],
        left=left,
    )


def _watch(processes: list[ForkServerProcess], folder: Path, stop_until: str, limit: float) -> None:
    begin = time.monotonic()
    stopped: dict[int, float] = {}  # since when
    while living := [rank for rank, process in enumerate(processes) if process.is_alive()]:
        now = time.monotonic()
        if now - begin > limit:
            raise AssertionError(_stacks(processes, folder, living))
        for rank in living:
            if not _is_stopped(processes[rank].pid):
                stopped.pop(rank, None)
                continue
            since = stopped.setdefault(rank, now)
            others = [folder / f"{stop_until}.{other}" for other in range(len(processes)) if other != rank]
            if all(path.exists() for path in others) if stop_until else now - since > _PAUSE:
                os.kill(processes[rank].pid or 0, signal.SIGCONT)
        wait([processes[rank].sentinel for rank in living], _TICK)


def _is_stopped(pid: int | None) -> bool:
    return _read(Path(f"/proc/{pid}/stat")).rpartition(") ")[2][:1] == "T"


def _stacks(processes: list[ForkServerProcess], folder: Path, living: list[int]) -> str:
    """Let the ``living`` ranks write their stacks, and return them with what all have noted."""
    for rank in living:
        for number in (signal.SIGCONT, signal.SIGUSR1):
            os.kill(processes[rank].pid or 0, number)
    wait([processes[rank].sentinel for rank in living], 1)  # they do not end: time for the stacks
    lines = [f"ranks {living} were not done in time"]
    for rank in range(len(processes)):
        lines += [f"--- rank {rank}: {_notes(folder, rank)}", _read(folder / f"stderr.{rank}")]
    return "\n".join(lines)


def _notes(folder: Path, rank: int) -> dict[str, Any]:
    return {path.stem: json.loads(path.read_text()) for path in folder.glob(f"*.{rank}") if path.stem != "stderr"}


def _segments() -> set[str]:
    """Shared memory by name; semaphores and folders are those of tests that run beside this one."""
    return {entry.name for entry in os.scandir("/dev/shm") if entry.is_file() and not entry.name.startswith("sem.")}


def _open_files() -> set[str]:
    return {_link(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")}


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:  # that of the listing itself
        return ""


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
