"""Waiting for works of torch.distributed so that Ctrl-C, a deadline and a peer's end are heard.

A wait within torch hears no signal, and gloo closes all connections of a process group when one runs out. So a thread waits in the
caller's place, without a limit, and the caller waits for the thread. A wait that is broken off leaves its thread behind; it ends with
the connections of its group, at the latest before the interpreter does, which must not find it on its way back from torch.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from queue import SimpleQueue
from typing import Any

import torch
import torch.distributed as dist

_SLICE = 0.05  # seconds between two looks at the peers
_NEVER = timedelta(days=365)
_TAG = 0xC10  # of a message that nobody sends
_PATIENCE = 1.0  # seconds that a thread gets to see its connections close


class StuckError(Exception):
    """Work number ``index`` was not done after ``seconds``: too late, or because of ``error``."""

    def __init__(self, index: int, seconds: float, error: BaseException | None = None) -> None:
        super().__init__(index, seconds, error)
        self.index, self.seconds, self.error = index, seconds, error


class _Job:
    """Works that a thread waits for, one after the other."""

    def __init__(self, works: Sequence[Any], close: Callable[[], None]) -> None:
        self.works, self.close = works, close
        self.times = [time.perf_counter()]  # of the beginning, then of each work's end
        self.error: BaseException | None = None
        self.running = threading.Lock()
        self.running.acquire()
        self.is_left = False

    def run(self) -> None:
        try:
            for work in self.works:
                work.wait(_NEVER)
                self.times.append(time.perf_counter())
        except BaseException as error:
            self.error = error
        self.running.release()

    @property
    def index(self) -> int:
        """The work that is waited for."""
        return len(self.times) - 1

    @property
    def seconds(self) -> float:
        """For how long."""
        return time.perf_counter() - self.times[-1]


_idle: list[SimpleQueue[_Job]] = []  # of threads that have nothing to do
_left: list[_Job] = []


def wait(works: Sequence[Any], limit: float, look: Callable[[int, float], None], close: Callable[[], None]) -> list[float]:
    """Wait until each of ``works`` is done, for no more than ``limit`` seconds each; return how long each took.

    ``look(index, seconds)`` is called now and then while a work is waited for, and may raise. ``close()`` makes works of this group
    fail that are still under way; it is called when the interpreter ends and this wait was broken off.

    Raises:
        StuckError: a work failed, or was not done in time.
    """
    job = _Job(works, close)
    try:
        jobs = _idle.pop() if _idle else _new_thread()
        jobs.put(job)
        while not job.running.acquire(timeout=min(_SLICE, limit)):
            index, seconds = job.index, job.seconds
            if index == len(works):  # it is about to say so
                continue
            if seconds > limit:
                raise StuckError(index, seconds)
            look(index, seconds)
    except BaseException:
        job.is_left = True
        _left[:] = [*(old for old in _left if old.running.locked()), job]
        raise
    _idle.append(jobs)
    if job.error is not None:
        raise StuckError(job.index, job.seconds, job.error) from job.error
    return [end - begin for begin, end in zip(job.times, job.times[1:], strict=False)]


def close(group: dist.ProcessGroup) -> None:
    """Make all works of ``group`` fail that are under way, on its other ranks too, if gloo runs it."""
    try:
        is_gloo = group._get_backend(torch.device("cpu")).name() == "gloo"
    except RuntimeError:  # it has none for the CPU
        return
    if is_gloo:
        for rank in range(group.size()):
            if rank != group.rank():
                with contextlib.suppress(RuntimeError):  # a wait that runs out closes all connections
                    group.recv([torch.empty(1)], rank, _TAG).wait(timedelta(milliseconds=1))


def _new_thread() -> SimpleQueue[_Job]:
    jobs: SimpleQueue[_Job] = SimpleQueue()
    threading.Thread(target=_serve, args=(jobs,), name="commfuse waits", daemon=True).start()
    return jobs


def _serve(jobs: SimpleQueue[_Job]) -> None:
    while True:
        job = jobs.get()
        job.run()
        if job.is_left:
            return
        del job  # holds tensors


@atexit.register
def _end() -> None:
    """End the threads that are still within torch."""
    for job in _left:
        if job.running.locked():
            job.close()
            job.running.acquire(timeout=_PATIENCE)


def _forget() -> None:
    """In a forked child, which has none of the threads."""
    _idle.clear()
    _left.clear()


os.register_at_fork(after_in_child=_forget)
