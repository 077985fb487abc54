"""What the ranks of a process group tell each other beside their messages: why one of them has given it up, in the store behind it.

The store's own process may have stopped, and torch's requests to it hear no signal, so a thread asks in the caller's place.
"""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

_KEY = "commfuse/given up"
_PATIENCE = 1.0  # seconds for an answer that is needed
_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 0.5  # seconds between two questions while a rank waits


def first(group: dist.ProcessGroup, mine: dict[str, Any]) -> dict[str, Any]:
    """Put ``mine`` there unless a rank was faster; return what is there now, ``mine`` if the store does not answer."""
    answers: list[dict[str, Any]] = []
    _ask(lambda: answers.append(json.loads(_store(group).compare_set(_KEY, "", json.dumps(mine))))).join(_PATIENCE)
    return answers[0] if answers else mine


class Listening:
    """Asks now and then, less often as time goes by, whether a rank has given the group up."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._pause, self._next, self._heard = _FIRST_PAUSE, 0.0, False

    def heard(self) -> bool:
        """Whether one has; of the last question that was answered."""
        if not self._heard and time.monotonic() >= self._next:
            self._next = math.inf  # until there is an answer: a store that is gone is asked once
            _ask(self._question)
        return self._heard

    def _question(self) -> None:
        self._heard = _store(self._group).check([_KEY])
        self._next, self._pause = time.monotonic() + self._pause, min(2 * self._pause, _LONGEST_PAUSE)


def _store(group: dist.ProcessGroup) -> dist.Store:
    store: dist.Store = c10d._get_process_group_store(group)
    return store


def _ask(question: Callable[[], None]) -> threading.Thread:
    def ask() -> None:
        try:
            question()
        except Exception:  # whatever ails the store: each rank has its own cause
            return

    thread = threading.Thread(target=ask, name="commfuse asks the store", daemon=True)
    thread.start()
    return thread
