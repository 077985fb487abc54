"""From the ranks' clocks to figures: medians, percentiles and ratios, all within one launch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from .rank import Times

Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Of many times, in microseconds."""

    median: float
    p10: float
    p90: float


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What one method takes, in microseconds, over all rounds of one launch."""

    dispatch: Spread  # the slowest rank's own time
    combine: Spread  # the slowest rank's own time
    round_trip: Spread  # from the first rank's start to the last rank's end
    back_to_back: float  # per round trip, in a row without a barrier: median over the rounds
    transfer: float | None  # per round trip, while rows are on their way: the slowest rank's, median over the rounds
    iterations: int


FIGURES = tuple(field.name for field in fields(Figures) if field.name not in ("iterations", "transfer"))


def figures(rounds: Sequence[Sequence[Times]]) -> Figures:
    """Return the figures of one method; ``rounds[i][rank]`` are the clocks of round i, as many steps on every rank."""
    clocks = np.concatenate([np.array([times.steps for times in by_rank]) for by_rank in rounds], axis=1) / 1e3
    begins, betweens, ends = clocks[..., 0], clocks[..., 1], clocks[..., 2]  # [rank, iteration]
    loops = [_loop(by_rank) for by_rank in rounds]
    return Figures(
        dispatch=spread((betweens - begins).max(0)),
        combine=spread((ends - betweens).max(0)),
        round_trip=spread(ends.max(0) - begins.min(0)),
        back_to_back=float(np.median(loops)),
        transfer=_transfer(rounds),
        iterations=clocks.shape[1],
    )


def spread(times: Numbers) -> Spread:
    """Return median, 10th and 90th percentile of ``times``."""
    p10, median, p90 = (float(value) for value in np.percentile(times, (10, 50, 90)))
    return Spread(median=median, p10=p10, p90=p90)


def value(found: Figures, figure: str) -> float:
    """Return the figure that is compared: a median, in microseconds. ``figure``: one of `FIGURES`."""
    what = getattr(found, figure)
    return what.median if isinstance(what, Spread) else float(what)


def ratio(one: Figures, other: Figures, figure: str = "round_trip") -> float:
    """Return how many times as long ``one`` takes as ``other``."""
    return value(one, figure) / value(other, figure)


def _transfer(rounds: Sequence[Sequence[Times]]) -> float | None:
    slowest = []
    for by_rank in rounds:
        moved = [times.moved_ns / len(times.steps) / 1e3 for times in by_rank if times.moved_ns is not None]
        if not moved:
            return None
        slowest.append(max(moved))
    return float(np.median(slowest))


def _loop(by_rank: Sequence[Times]) -> float:
    begin = min(times.loop[0] for times in by_rank)
    end = max(times.loop[1] for times in by_rank)
    return (end - begin) / len(by_rank[0].steps) / 1e3
