"""Fixtures: warm ranks, kept for the whole session."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from commfuse.ranks import RankFailedError, Ranks

torch.set_num_threads(1)
signal.signal(
    signal.SIGINT, signal.default_int_handler
)  # a shell lets what it starts in the background ignore it, all children too
FAULT_SEED = os.environ.setdefault("COMMFUSE_FAULT_SEED", str(random.randrange(10000)))  # for all processes of this run

RunRanks = Callable[..., list[Any]]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="also more cases of what the short tests cover")


def pytest_report_header() -> list[str]:
    return [
        "random configurations are numbered, and the number is their seed: `commfuse check --case random-17` repeats one",
        f"faults are chosen by COMMFUSE_FAULT_SEED={FAULT_SEED}",
    ]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: "shim" not in item.path.parts)  # the longest files first, so that none is left over at the end
    if not config.getoption("--long"):
        short = pytest.mark.skip(reason="more cases of what short tests cover: run with --long (make test-all)")
        for item in items:
            if "long" in item.keywords:
                item.add_marker(short)


class _Pool:
    """One set of warm ranks per world size; a set that failed is replaced."""

    def __init__(self) -> None:
        self._ranks: dict[int, Ranks] = {}

    def run(self, world_size: int, function: Callable[..., Any], *args: Any, deadline: float = 60) -> list[Any]:
        if world_size not in self._ranks:
            self._ranks[world_size] = Ranks(world_size, preload=("pytest", "numpy"))
        try:
            return self._ranks[world_size].run(function, *args, deadline=deadline)
        except RankFailedError:
            del self._ranks[world_size]
            raise

    def close(self) -> None:
        while self._ranks:
            self._ranks.popitem()[1].close()


@pytest.fixture(scope="session")
def _pool() -> Iterator[_Pool]:
    pool = _Pool()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def run_ranks(_pool: _Pool) -> RunRanks:
    """``run_ranks(world_size, function, *args)``: function(rank, *args) on every rank, results in rank order."""
    return _pool.run


@pytest.fixture
def no_ranks(_pool: _Pool) -> None:
    """No warm ranks: for scripts with a port of their own (theirs may have any), and for tests whose ranks must have no past."""
    _pool.close()
