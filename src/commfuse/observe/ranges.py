"""Ranges for torch.profiler, one for each phase of a call: what is published, whom the call waits for, what is pulled and summed.

Without an active profiler they cost one look at that.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

PREFIX = "commfuse::"

_P = ParamSpec("_P")
_T = TypeVar("_T")
_NOTHING = contextlib.nullcontext()


def active() -> bool:
    """Whether a profiler listens to this thread."""
    return bool(torch.autograd._profiler_enabled())


def phase(name: str) -> Callable[[Callable[_P, _T]], Callable[_P, _T]]:
    """Make every call of the decorated function the range ``commfuse::NAME``."""

    def decorate(function: Callable[_P, _T]) -> Callable[_P, _T]:
        @functools.wraps(function)
        def run(*args: _P.args, **kwargs: _P.kwargs) -> _T:
            if not torch.autograd._profiler_enabled():
                return function(*args, **kwargs)
            with torch.profiler.record_function(PREFIX + name):
                return function(*args, **kwargs)

        return run

    return decorate


def waiting(rank: int) -> contextlib.AbstractContextManager[object]:
    """Return the range ``commfuse::wait for rank N``, to be around a wait for that rank of the group."""
    return torch.profiler.record_function(f"{PREFIX}wait for rank {rank}") if active() else _NOTHING
