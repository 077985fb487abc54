"""The goals, as rows: ratios within one launch, of which the median over several launches counts."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.text import Text

from .. import terminal
from .figures import ratio
from .launch import Launch

LAUNCHES = 5


@dataclass(frozen=True, kw_only=True)
class Goal:
    """``method`` against ``other`` in one case: at least so many times as fast, or at most so many times as slow."""

    case: str
    quant: str
    other: str
    at_least: float | None = None  # time of other / time of method
    at_most: float | None = None  # time of method / time of other
    figure: str = "round_trip"
    method: str = "cpu"

    @property
    def text(self) -> str:
        """What is asked for, in words."""
        in_a_row = ", in a row" if self.figure == "back_to_back" else ""
        if self.at_least is not None:
            return f"{self.method} at least {self.at_least:g} times as fast as {self.other}{in_a_row}"
        return f"{self.method} takes at most {self.at_most:g} times as long as {self.other}{in_a_row}"


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A goal, and what was measured."""

    goal: Goal
    ratios: tuple[float, ...]  # one of each launch in which both were measured

    @property
    def median(self) -> float | None:
        """The ratio that counts; None when nothing was measured."""
        return statistics.median(self.ratios) if self.ratios else None

    @property
    def reached(self) -> bool:
        """The median is on the right side. A goal of which nothing was measured is not reached."""
        if self.median is None:
            return False
        if self.goal.at_least is not None:
            return self.median >= self.goal.at_least
        return self.goal.at_most is not None and self.median <= self.goal.at_most


def _faster(case: str, other: str, plain: float, int8: float) -> tuple[Goal, ...]:
    by_quant = {"none": plain, "int8": int8}
    return tuple(Goal(case=case, quant=quant, other=other, at_least=times) for quant, times in by_quant.items())


def _near(case: str, other: str, times: float, figure: str = "round_trip", method: str = "cpu") -> tuple[Goal, ...]:
    return tuple(
        Goal(case=case, quant=quant, other=other, at_most=times, figure=figure, method=method) for quant in ("none", "int8")
    )


GOALS = (
    *_faster("A", "gloo", 10, 15),
    *_faster("B", "gloo", 12, 18),
    *_faster("C", "gloo", 15, 20),
    *_faster("D", "gloo", 80, 80),
    *_faster("E", "gloo", 10, 12),
    *_faster("A", "mpi", 5, 7),
    *_faster("B", "mpi", 4, 7),
    *_faster("C", "mpi", 5, 7),
    *_faster("D", "mpi", 10, 12),
    *_faster("E", "mpi", 3.5, 5),
    *_faster("A", "mpi-ag", 2.5, 2.5),
    *_faster("E", "mpi-ag", 2.5, 2.5),
    *_near("A", "memcpy", 1.2),
    *_near("B", "memcpy", 2.5, "back_to_back"),
    *_near("C", "memcpy", 6, "back_to_back"),
    *_near("D", "memcpy", 2.5),
    *_near("E", "memcpy", 1.3),
    *(goal for case in "ABCDE" for goal in _near(case, "cpu", 2, method="cpu-copy")),
)


def judge(launches: Sequence[Launch], rows: Sequence[Goal] = GOALS) -> list[Judged]:
    """Hold ``launches`` against the goals of their cases; those of cases that were not asked for are left out."""
    asked = {(launch.workload.name, launch.workload.quant) for launch in launches}
    return [Judged(goal=goal, ratios=_ratios(goal, launches)) for goal in rows if (goal.case, goal.quant) in asked]


def _ratios(goal: Goal, launches: Sequence[Launch]) -> tuple[float, ...]:
    found = []
    for launch in launches:
        method, other = launch.figures(goal.method), launch.figures(goal.other)
        if (launch.workload.name, launch.workload.quant) == (goal.case, goal.quant) and method is not None and other is not None:
            pair = (other, method) if goal.at_least is not None else (method, other)
            found.append(ratio(*pair, goal.figure))
    return tuple(found)


def as_json(judged: Sequence[Judged]) -> list[dict[str, Any]]:
    """Return every goal with its ratios."""
    return [{**asdict(row.goal), "ratios": list(row.ratios), "median": row.median, "reached": row.reached} for row in judged]


def draw(judged: Sequence[Judged], out: Console) -> None:
    """Print the goals that are missed, and how many there are."""
    missed = [row for row in judged if not row.reached]
    out.print(terminal.title(f"Goals: {len(judged) - len(missed)} of {len(judged)} reached (medians of {LAUNCHES} launches)"))
    table = terminal.table("case", "rows", "measured", "missed")
    table.columns[-1].justify = "left"
    for row in missed:
        measured = "nothing" if row.median is None else f"{row.median:.2f}"
        table.add_row(row.goal.case, row.goal.quant, measured, Text(row.goal.text))
    if missed:
        out.print(terminal.indented(table))
