"""Fixtures: warm ranks, kept for the whole session."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from commfuse.ranks import RankFailedError, Ranks

torch.set_num_threads(1)

RunRanks = Callable[..., list[Any]]


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
        for ranks in self._ranks.values():
            ranks.close()


@pytest.fixture(scope="session")
def run_ranks() -> Iterator[RunRanks]:
    """``run_ranks(world_size, function, *args)``: function(rank, *args) on every rank, results in rank order."""
    pool = _Pool()
    yield pool.run
    pool.close()
