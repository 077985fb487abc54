"""The processes that a command starts, and their end: also when the user does not want to wait."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable
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
            self._ranks = Ranks(world_size, preload=("numpy", *self._preload))
            self._ranks.run(_leave_interrupts_to_the_parent)
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


def _leave_interrupts_to_the_parent(rank: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
