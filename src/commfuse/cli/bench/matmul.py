"""The operators that fuse a matmul with communication, against the plain ways: shapes, and ratios that are paired."""

from __future__ import annotations

import itertools
import os
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ..processes import Processes
from ..terminal import Show
from . import matmul_rank
from .figures import Numbers, Spread, spread
from .launch import Effort, shared_memory
from .matmul_shapes import COMPUTE, OWN, PLAIN, Shape

FEWEST, MOST = 5, 200  # iterations of each method
_DEADLINE = 300  # seconds for one step


@dataclass(frozen=True, kw_only=True)
class Row:
    """What came of one shape."""

    shape: Shape
    times: dict[str, Spread]  # microseconds, by method: from the first rank's start to the last rank's end
    against_plain: float  # median of paired ratios: commfuse's time over that of the best plain way; NaN without figures
    against_compute: float  # likewise, over the products alone
    best_plain: str
    wrong: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Every method returned what it should."""
        return not self.wrong


def measure(shapes: Sequence[Shape], effort: Effort, show: Show) -> list[Row]:
    """Measure ``shapes``, those of one world size after another, each with all its methods."""
    rows = []
    with Processes(matmul_rank.__name__) as processes:
        for done, shape in enumerate(sorted(shapes, key=lambda shape: shape.ranks)):
            show(shape.title, done, len(shapes))
            rows.append(_measure(processes, shape, effort))
    return rows


def _measure(processes: Processes, shape: Shape, effort: Effort) -> Row:
    with tempfile.TemporaryDirectory(prefix="commfuse-", dir=shared_memory()) as folder:
        barrier = os.path.join(folder, "barrier")
        made = processes.run(shape.ranks, matmul_rank.make, shape, barrier, deadline=_DEADLINE)
        if wrong := tuple(text for texts in made for text in texts):
            return row(shape, {}, wrong)
        trial = processes.run(shape.ranks, matmul_rank.measure, FEWEST, deadline=_DEADLINE)
        count = iterations(trips(trial), effort)
        by_rank = processes.run(shape.ranks, matmul_rank.measure, count, deadline=_DEADLINE)
    return row(shape, trips(by_rank), ())


def row(shape: Shape, times: dict[str, Numbers], wrong: tuple[str, ...]) -> Row:
    """Return the figures of ``times``: by method, the microseconds of each turn; turn i of all methods is one pair."""
    plain = {name: taken for name, taken in times.items() if name in PLAIN}
    best = min(plain, key=lambda name: float(np.median(plain[name])), default="")
    return Row(
        shape=shape,
        times={name: spread(taken) for name, taken in times.items()},
        against_plain=float(np.median(times[OWN] / times[best])) if best else float("nan"),
        against_compute=float(np.median(times[OWN] / times[COMPUTE])) if best else float("nan"),
        best_plain=best,
        wrong=wrong,
    )


def trips(by_rank: Sequence[matmul_rank.Turns]) -> dict[str, Numbers]:
    """Return, by method, how long each turn took: from the first rank's start to the last rank's end, in microseconds."""
    found = {}
    for name in by_rank[0]:
        clocks = np.array([turns[name] for turns in by_rank]) / 1e3  # [rank, turn, 2]
        found[name] = clocks[..., 1].max(0) - clocks[..., 0].min(0)
    return found


def iterations(times: dict[str, Numbers], effort: Effort) -> int:
    """Return how many turns of all methods fit into the time of one method times their number."""
    turn = sum(float(np.median(taken)) for taken in times.values())
    return int(min(max(effort.seconds * 1e6 * len(times) / turn, FEWEST), MOST))


@dataclass(frozen=True, kw_only=True)
class Summary:
    """One operator over all its shapes, and whether it keeps the goals."""

    operator: str
    shapes: int
    median: float  # over the shapes, of the paired ratio to the best plain way
    worst: float
    worst_shape: str
    wide_against_compute: float  # the worst paired ratio to the products alone among shapes with n >= 2048; NaN without any

    @property
    def reached(self) -> bool:
        """The goals: as fast as the best plain way (1.03 in the middle, 1.10 at worst), and wide products within 3 % of compute alone."""
        wide = self.operator != "all-gather-mm" or not self.wide_against_compute > _WIDE_AT_MOST
        return self.median <= _MEDIAN_AT_MOST and self.worst <= _WORST_AT_MOST and wide


_MEDIAN_AT_MOST, _WORST_AT_MOST, _WIDE_AT_MOST = 1.03, 1.10, 1.03
_WIDE = 2048


def summaries(rows: Sequence[Row]) -> Iterator[Summary]:
    """Return one summary for each operator that has figures."""
    measured = sorted((row for row in rows if row.times), key=lambda row: row.shape.operator)
    for operator, group in itertools.groupby(measured, key=lambda row: row.shape.operator):
        mine = list(group)
        worst = max(mine, key=lambda row: row.against_plain)
        wide = [row.against_compute for row in mine if row.shape.n >= _WIDE]
        yield Summary(
            operator=operator,
            shapes=len(mine),
            median=statistics.median(row.against_plain for row in mine),
            worst=worst.against_plain,
            worst_shape=worst.shape.title,
            wide_against_compute=max(wide, default=float("nan")),
        )
