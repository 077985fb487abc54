"""The processes that a command starts, and their end: also when the user does not want to wait."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from multiprocessing import forkserver, resource_tracker
from types import TracebackType
from typing import Any

from ..ranks import RankFailedError, Ranks


class Processes:
    """Warm ranks, of one world size at a time; on Ctrl-C they are killed at whatever they are doing."""

    def __init__(self, *preload: str) -> None:
        self._preload = preload
        self._ranks: Ranks | None = None

    def start(self, world_size: int) -> Ranks:
        """Return ``world_size`` warm ranks; those of another size are ended."""
        if self._ranks is None or self._ranks.world_size != world_size:
            self.close()
            with _interrupt_later():  # a rank that is being forked cannot be ended yet
                _start_server(("numpy", *self._preload))
                self._ranks = Ranks(world_size, preload=("numpy", *self._preload))
        return self._ranks

    def run(self, world_size: int, function: Callable[..., Any], *args: Any, deadline: float = 120) -> list[Any]:
        """Run ``function(rank, *args)`` on every rank; see `Ranks.run`. Ranks that failed are replaced at the next call."""
        try:
            return self.start(world_size).run(function, *args, deadline=deadline)
        except RankFailedError:
            self._ranks = None
            raise

    def close(self) -> None:
        """End the processes."""
        if self._ranks is not None:
            self._ranks.close()
            self._ranks = None

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None and self._ranks is not None:
            for pid in self._ranks.pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self.close()


@contextlib.contextmanager
def _interrupt_later() -> Iterator[None]:
    """Put Ctrl-C off to the end of the block."""
    pressed = []
    before = signal.signal(signal.SIGINT, lambda *_: pressed.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        raise KeyboardInterrupt


def _start_server(preload: tuple[str, ...]) -> None:
    """Start the process that all ranks are forked from, with Ctrl-C blocked: a terminal sends it to every process, and only the
    command itself is to act on it.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload(["commfuse", "commfuse.ranks", *preload])
    resource_tracker.ensure_running()  # unblocks Ctrl-C itself when it starts, so it goes first
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
