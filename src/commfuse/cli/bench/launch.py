"""One launch: ranks start, every method is made and tried, and the methods take turns, round by round."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...ranks import Ranks
from ..processes import Processes
from ..terminal import Show
from . import rank
from .figures import Figures, figures, value
from .methods import MethodRow
from .mpi import Mpi, MpiMissingError, MpiRanks
from .proof import Proof
from .workload import Workload

Run = Callable[..., list[Any]]
"""``run(function, *args)``: function(rank, *args) on every rank, results in rank order."""

FEWEST, MOST = 5, 400  # iterations of a method in one round
_DEADLINE = 300  # seconds for one step


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How long to measure."""

    rounds: int
    seconds: float  # for each method, all rounds together, half of it without a barrier


@dataclass(frozen=True, kw_only=True)
class Row:
    """What came of one method. Without figures there is a reason: it is absent, or its results are wrong."""

    name: str
    figures: Figures | None
    absent: str = ""
    wrong: tuple[str, ...] = ()
    proof: Proof | None = None
    logical_bytes: int = 0  # of all ranks
    bytes_between_ranks: int = 0  # of all ranks


@dataclass(frozen=True, kw_only=True)
class Launch:
    """What came of one workload."""

    workload: Workload
    rows: tuple[Row, ...]
    mpi: str  # its version, or why there is none

    @property
    def passed(self) -> bool:
        """No method has returned anything wrong."""
        return not any(row.wrong for row in self.rows)

    def row(self, name: str) -> Row | None:
        """Return the row of one method, if it was asked for."""
        return next((row for row in self.rows if row.name == name), None)

    def figures(self, name: str) -> Figures | None:
        """Return one method's figures, if there are any."""
        row = self.row(name)
        return None if row is None else row.figures


@contextlib.contextmanager
def started(world_size: int, mpi: Mpi | MpiMissingError) -> Iterator[Run]:
    """Give warm ranks: MPI's own where there is an MPI, so that all methods share them."""
    with contextlib.ExitStack() as stack:
        if isinstance(mpi, Mpi):
            ranks: Ranks = stack.enter_context(MpiRanks(world_size, mpi))
        else:
            ranks = stack.enter_context(Processes("commfuse.cli.bench.rank")).start(world_size)

        def run(function: Callable[..., Any], *args: Any) -> list[Any]:
            return ranks.run(function, *args, deadline=_DEADLINE)

        yield run


def launch(
    run: Run, workload: Workload, methods: Sequence[MethodRow], effort: Effort, show: Show, mpi: Mpi | MpiMissingError
) -> Launch:
    """Measure ``methods`` on ranks that are there already, as many as ``workload.ranks``."""
    with tempfile.TemporaryDirectory(prefix="commfuse-", dir=shared_memory()) as folder:
        run(rank.prepare, workload, os.path.join(folder, "barrier"))
        ready = {row.name: _made(run, row, show, mpi) for row in methods}
        fine = [name for name, row in ready.items() if not row.absent and not row.wrong]
        times = _rounds(run, fine, effort, show)
    rows = tuple(_with_figures(row, times.get(row.name, [])) for row in ready.values())
    return Launch(workload=workload, rows=rows, mpi=mpi.version if isinstance(mpi, Mpi) else str(mpi))


def _made(run: Run, row: MethodRow, show: Show, mpi: Mpi | MpiMissingError) -> Row:
    show(f"{row.name}: made, and its results compared")
    if row.needs_mpi and isinstance(mpi, MpiMissingError):
        return Row(name=row.name, figures=None, absent=str(mpi))
    by_rank: list[rank.Ready] = run(rank.make, row)
    wrong = tuple(text for ready in by_rank for text in ready.wrong)
    return Row(
        name=row.name,
        figures=None,
        absent=next((ready.absent for ready in by_rank if ready.absent), ""),
        wrong=wrong + _unproven(row, by_rank),
        proof=by_rank[0].proof,
        logical_bytes=sum(ready.logical_bytes for ready in by_rank),
        bytes_between_ranks=sum(ready.bytes_between_ranks for ready in by_rank),
    )


def _unproven(row: MethodRow, by_rank: Sequence[rank.Ready]) -> tuple[str, ...]:
    """Say where another path ran than the one that the row is about."""
    found = [ready.proof.wrong(row.backend) if ready.proof and row.backend else "" for ready in by_rank]
    return tuple(f"rank {number}: {text}" for number, text in enumerate(found) if text)


def _rounds(run: Run, names: Sequence[str], effort: Effort, show: Show) -> dict[str, list[list[rank.Times]]]:
    """Let the methods take turns. A first, short round warms up and says how often each fits into its time."""
    trial: dict[str, list[rank.Times]] = {name: run(rank.measure, name, FEWEST) for name in names}
    counts = {name: iterations(figures([by_rank]), effort) for name, by_rank in trial.items()}
    times: dict[str, list[list[rank.Times]]] = {name: [] for name in names}
    for turn in range(effort.rounds):
        for i, name in enumerate(names):
            show(f"round {turn + 1}: {name}", turn * len(names) + i, effort.rounds * len(names))
            times[name].append(run(rank.measure, name, counts[name]))
    return times


def iterations(found: Figures, effort: Effort) -> int:
    """Return how many iterations of a round fit into the time that ``effort`` gives a method."""
    microseconds = effort.seconds / effort.rounds / 2 * 1e6
    return int(min(max(microseconds / value(found, "round_trip"), FEWEST), MOST))


def _with_figures(row: Row, rounds: list[list[rank.Times]]) -> Row:
    wrong = tuple(text for by_rank in rounds for times in by_rank for text in times.wrong)
    found = figures(rounds) if rounds and not wrong else None
    return Row(**{**vars(row), "wrong": row.wrong + wrong, "figures": found})


def shared_memory() -> str | None:
    """Return a folder in memory, so that the barrier's page is never written to a disk."""
    return "/dev/shm" if Path("/dev/shm").is_dir() else None
