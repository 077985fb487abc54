"""Which way calls go: the long one, or the short one of a form that repeats."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from commfuse import engine, repeats
from commfuse.checking import FAMILIES, SETTINGS

FAMILY = FAMILIES["moe_distribute"]
PLAIN = {**SETTINGS, "poison": False, "backend": "cpu"}  # what fills tails goes the long way
DISPATCH, COMBINE = FAMILY.operators


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """How many calls went the short way, and how many the long one."""
    ways = {"short": 0, "long": 0}
    short, long = repeats.run, engine.bind

    def run_short(*args: Any) -> Any:
        outputs = short(*args)
        ways["short"] += outputs is not None
        return outputs

    def bind(*args: Any, **named: Any) -> Any:
        ways["long"] += not named  # by name: for the messages of a short way
        return long(*args, **named)

    with mock.patch.object(repeats, "run", run_short), mock.patch.object(engine, "bind", bind):
        yield ways
