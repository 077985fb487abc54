"""``commfuse check --soak SECONDS``: random cases of every family on the same ranks, for as long as wanted, and what they leave behind.

The ranks live through all of it, so what a call does not give back adds up. The first half of the time is the warm-up: pools fill, and
caches of shapes; after it neither the windows nor the processes may grow beyond `_GROWTH` times and `_SLACK` more bytes.
"""

from __future__ import annotations

import gc
import itertools
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..backends.cpu import host
from ..checking import Family, Outcome, check
from . import terminal
from .processes import Processes

RANKS = 4  # unless asked for another number
_AT_ONCE = 5  # cases of one family, between two looks at the memory of nobody else's
_GROWTH = 1.1
_SLACK = {"resident": 24 << 20, "window": 2 << 20}
_CACHES_OF_TORCH = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16", "LRU_CACHE_CAPACITY": "16"}  # products, by shape: up to a gigabyte


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes that one rank holds: of its process, and of its window."""

    resident: int
    window: int


@dataclass(frozen=True, kw_only=True)
class Sample:
    """The memory of all ranks at one moment; ``warm`` once the warm-up was over."""

    warm: bool
    ranks: tuple[Memory, ...]


@dataclass(frozen=True, kw_only=True)
class Soak:
    """What came of it."""

    outcomes: tuple[Outcome, ...]
    samples: tuple[Sample, ...]

    @property
    def growth(self) -> list[str]:
        """What has grown after the warm-up, in words; empty when the memory was flat."""
        return growth(self.samples)


def run(families: Sequence[Family], world_size: int, seconds: float, seed: int, backend: str) -> Soak:
    """Run random cases of ``families`` on ``world_size`` ranks for ``seconds``; all is decided by ``seed`` but how far it gets."""
    outcomes: list[Outcome] = []
    samples: list[Sample] = []
    os.environ.update(_CACHES_OF_TORCH)  # of the ranks, so that what grows is commfuse's own
    begin = time.monotonic()
    with terminal.progress() as show, Processes("commfuse.checking", "commfuse.cli.soak") as processes:
        for turn, (family, cases) in enumerate(_batches(families, world_size, seed), 1):
            passed = time.monotonic() - begin
            if passed >= seconds and samples and samples[-1].warm:
                break
            show(f"{len(outcomes):,} cases on {world_size} processes, seed {seed}", int(passed), int(seconds))
            again = len(samples) % 2 == 1  # in every other round each case four times, for calls that repeat a form
            outcomes += check(processes.run, family, cases * (4 if again else 1), backend=backend, poison=not again)
            if turn % len(families) == 0:  # once round
                samples.append(_sample(processes.run, world_size, warm=passed >= seconds / 2))
    return Soak(outcomes=tuple(outcomes), samples=tuple(samples))


def _batches(families: Sequence[Family], world_size: int, seed: int) -> Iterator[tuple[Family, list[Any]]]:
    """Give a few cases of each family in turn, in an order that changes from round to round, without end."""
    draw = random.Random(seed)
    cases = {family.name: _cases(family, world_size, seed) for family in families}
    while True:
        for family in draw.sample(list(families), len(families)):
            yield family, list(itertools.islice(cases[family.name], _AT_ONCE))


def _cases(family: Family, world_size: int, seed: int) -> Iterator[Any]:
    return (case for case in map(family.random_case, itertools.count(seed)) if family.world_size(case) == world_size)


def _sample(run_ranks: Callable[..., list[Any]], world_size: int, *, warm: bool) -> Sample:
    return Sample(warm=warm, ranks=tuple(run_ranks(world_size, memory)))


def memory(rank: int) -> Memory:
    """Return what this process holds, after a collection of garbage."""
    gc.collect()
    with open("/proc/self/statm", encoding="ascii") as file:
        pages = int(file.read().split()[1])
    return Memory(resident=pages * os.sysconf("SC_PAGE_SIZE"), window=_window_bytes())


def _window_bytes() -> int:
    if host.missing():
        return 0
    from ..backends.cpu import slabs

    return slabs.own().arena.allocated_bytes()


def growth(samples: Sequence[Sample]) -> list[str]:
    """Return what has grown after the warm-up, one text for each rank and kind of memory."""
    before, after = ([sample.ranks for sample in samples if sample.warm is warm] for warm in (False, True))
    if not before or not after:
        return ["the time was too short to see whether the memory stays flat"]
    found = []
    for rank, kind in itertools.product(range(len(before[0])), _SLACK):
        first, then = (max(getattr(ranks[rank], kind) for ranks in part) for part in (before, after))
        if then > _GROWTH * first + _SLACK[kind]:
            found.append(
                f"rank {rank}: {_WORDS[kind]} grew from {first / 2**20:.1f} MiB to {then / 2**20:.1f} MiB after the warm-up"
            )
    return found


def largest(samples: Sequence[Sample], kind: str, *, warm: bool) -> float:
    """Return the most that any rank held of a ``kind`` of memory in one half of the time, in MiB; 0 if nobody looked."""
    held = [getattr(rank, kind) for sample in samples if sample.warm is warm for rank in sample.ranks]
    return max(held, default=0) / 2**20


_WORDS = {"resident": "the process", "window": "the window"}
