"""Faults that are told as a story: a function that every rank runs, some of which die, and what they have noted in the end."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist

import commfuse
from commfuse import config

from . import harness
from .rank import Notes, join, told

LIMIT = 30.0  # seconds; nothing waits for it
Body = Callable[[int, int, Notes], None]  # rank, world size, where to write what has been seen


def run(folder: Path, world_size: int, body: Body, *dead: int, backend: str = "cpu") -> list[dict[str, Any]]:
    """What the ranks have noted; ranks ``dead`` were killed, all others ended well, and nothing is left."""
    report = harness.run(serve, world_size, folder, world_size, body, backend)
    expected = [-signal.SIGKILL if rank in dead else 0 for rank in range(world_size)]
    assert report.exit_codes == expected, "\n".join(report.stderr)
    assert report.left == []
    return report.notes


def serve(rank: int, folder: Path, world_size: int, body: Body, backend: str) -> None:
    notes = join(rank, world_size, folder)
    with config.override(backend=backend, timeout=LIMIT, first_timeout=LIMIT):
        body(rank, world_size, notes)


def world() -> str:
    """The name of the group of all ranks."""
    return str(dist.group.WORLD.group_name)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def error_of(call: Callable[[], Any]) -> dict[str, Any]:
    """What ``call`` raises, and when; {} if nothing."""
    try:
        call()
    except (commfuse.CommfuseError, KeyboardInterrupt) as error:
        return told(error)
    return {}


def struck(target: Any, name: str, act: Callable[[], None], after: bool = False) -> Any:
    """Put ``act`` before or after every call of ``target.name``."""
    original = getattr(target, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if not after:
            act()
        result = original(*args, **kwargs)
        if after:
            act()
        return result

    return mock.patch.object(target, name, wrapped)
