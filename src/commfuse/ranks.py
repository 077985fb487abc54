"""Ranks on this machine for the demo, checks, measurements and tests: warm processes with a gloo group, forked in milliseconds.

>>> from commfuse.ranks import Ranks
>>> with Ranks(4) as ranks:                                   # doctest: +SKIP
...     ranks.run(some_function, argument)                    # some_function(rank, argument) on each; list of results
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, ForkServerProcess
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

_GRACE = 3.0  # seconds that the others get to report once one rank has failed


class RankFailedError(AssertionError):
    """A rank raised, died or did not finish in time; the text has every rank's traceback."""


class Ranks:
    """``world_size`` processes that wait for functions to run; their default process group is gloo over all of them."""

    def __init__(self, world_size: int, preload: tuple[str, ...] = ()) -> None:
        self.world_size = world_size
        self._folder = tempfile.TemporaryDirectory(prefix="commfuse-")
        context = _context(preload)
        self._pipes: list[Connection] = []
        self._processes: list[ForkServerProcess] = []
        for rank in range(world_size):
            here, there = context.Pipe()
            store = os.path.join(self._folder.name, "store")
            process = context.Process(target=_serve, args=(there, rank, world_size, store), daemon=True)
            process.start()
            there.close()
            self._pipes.append(here)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any, deadline: float = 60) -> list[Any]:
        """Run ``function(rank, *args)`` on every rank and return the results in rank order.

        Raises:
            RankFailedError: a rank raised, died, or was not done after ``deadline`` seconds. The ranks are gone then.
        """
        for pipe in self._pipes:
            pipe.send((function, args))
        results: dict[int, tuple[bool, Any]] = {}
        end = time.monotonic() + deadline
        while len(results) < self.world_size:
            waiting = [pipe for rank, pipe in enumerate(self._pipes) if rank not in results]
            ready = wait(waiting, max(0.0, end - time.monotonic()))
            if not ready:
                break
            for found in ready:
                rank = next(rank for rank, pipe in enumerate(self._pipes) if pipe is found)
                results[rank] = _receive(self._pipes[rank])
                if not results[rank][0]:
                    end = min(end, time.monotonic() + _GRACE)
        self._judge(results, deadline)
        return [results[rank][1] for rank in range(self.world_size)]

    @property
    def pids(self) -> list[int]:
        """The process ids, by rank."""
        return [process.pid or 0 for process in self._processes]

    def close(self) -> None:
        """End the processes."""
        for pipe in self._pipes:
            with contextlib.suppress(OSError):
                pipe.send(None)
            pipe.close()
        for process in self._processes:
            process.join(2)
            if process.is_alive():
                process.kill()
                process.join()
        self._folder.cleanup()

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _judge(self, results: dict[int, tuple[bool, Any]], deadline: float) -> None:
        late = [rank for rank in range(self.world_size) if rank not in results]
        failed = not all(fine for fine, _ in results.values())
        when = f"{_GRACE:.0f} s after another had failed" if failed else f"after {deadline:.0f} s"
        texts = [f"rank {rank}: not done {when}" for rank in late]
        texts += [f"rank {rank}:\n{text}" for rank, (fine, text) in sorted(results.items()) if not fine]
        if texts:
            for process in self._processes:
                process.kill()
            self.close()
            raise RankFailedError("\n".join(texts))


def _context(preload: tuple[str, ...]) -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["commfuse", "commfuse.ranks", *preload])
    return context


def _receive(pipe: Connection) -> tuple[bool, Any]:
    try:
        fine, value = pipe.recv()
    except EOFError:
        return False, "the process ended"
    return fine, value


def _serve(pipe: Connection, rank: int, world_size: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, world_size),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(minutes=5),
    )
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        if job is None:
            return
        function, args = job
        try:
            pipe.send((True, function(rank, *args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
