"""What came of a launch, as a table and as JSON."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ... import __version__
from .. import machine, terminal
from .figures import Figures, ratio
from .launch import Launch, Row
from .methods import LIMIT, METHODS

MIB = 2**20
BASELINE = "cpu"

_HEADS = {
    "times": "microseconds, medians over all rounds",
    "dispatch, combine": "the slowest rank's own time, from a common start",
    "trip": "both, from the first rank's start to the last rank's end",
    "p10, p90": "of trip: one in ten is faster, one in ten slower",
    "rows": "of trip, the slowest rank's time while rows are on their way: in collectives, or written, copied and summed",
    "loop": "one of many round trips in a row, without a barrier between them",
    "MiB": "bytes of rows that pass from one rank to another, all ranks together",
    "x": "how many times as long as that method, by trip; by loop where ranks outnumber cores",
}


def where() -> dict[str, Any]:
    """Return what a figure depends on beside the code: the machine and the versions."""
    return {
        "cores": machine.cores(),
        "processor": _processor(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commfuse": __version__,
    }


def as_json(launches: Sequence[Launch], machine_facts: dict[str, Any]) -> dict[str, Any]:
    """Return everything that was measured, in microseconds and bytes."""
    return {
        "command": "bench",
        "machine": machine_facts,
        "launches": [_launch_json(launch) for launch in launches],
        "passed": all(launch.passed for launch in launches),
    }


def _launch_json(launch: Launch) -> dict[str, Any]:
    return {
        "workload": asdict(launch.workload),
        "mpi": launch.mpi,
        "methods": [_row_json(launch, row) for row in launch.rows],
    }


def _row_json(launch: Launch, row: Row) -> dict[str, Any]:
    return {
        "name": row.name,
        "absent": row.absent,
        "wrong": list(row.wrong),
        "proof": None if row.proof is None else asdict(row.proof),
        "logical_bytes": row.logical_bytes,
        "bytes_between_ranks": row.bytes_between_ranks,
        "microseconds": None if row.figures is None else asdict(row.figures),
        "round_trip_ratio_to": ratios(launch, row, "round_trip"),
        "back_to_back_ratio_to": ratios(launch, row, "back_to_back"),
    }


def ratios(launch: Launch, row: Row, figure: str) -> dict[str, float]:
    """Return how many times as long ``row`` takes as each other method of the launch."""
    others = [other for other in launch.rows if other.name != row.name and other.figures is not None]
    if row.figures is None:
        return {}
    return {other.name: ratio(row.figures, other.figures, figure) for other in others if other.figures is not None}


def draw_head(facts: dict[str, Any], mpi: str, out: Console) -> None:
    """Print what holds for all tables."""
    out.print(terminal.title("Dispatch and combine, side by side in the same processes"))
    table = terminal.facts()
    table.add_row("machine", f"{facts['processor']}, {facts['cores']:g} cores to use, one thread a rank")
    table.add_row("versions", f"commfuse {facts['commfuse']}, torch {facts['torch']}, Python {facts['python']}")
    table.add_row("MPI", Text(mpi))
    for name, meaning in _HEADS.items():
        table.add_row(name, meaning)
    for row in METHODS:
        table.add_row(row.name, row.meaning)
    out.print(terminal.indented(table))


def draw(launch: Launch, out: Console) -> None:
    """Print one table."""
    out.print(terminal.title(launch.workload.title))
    out.print(terminal.indented(_table(launch)))
    for row in launch.rows:
        for text in row.wrong:
            out.print(terminal.indented(Text.assemble((f"{row.name} is WRONG: ", "bold red"), text)))
        if row.absent:
            out.print(terminal.indented(Text(f"{row.name}: {row.absent}", style="dim")))


def _table(launch: Launch) -> Table:
    figure = figure_of(launch)
    table = terminal.table(
        "method", "dispatch", "combine", "trip", "p10", "p90", "rows", "loop", "MiB", f"x {BASELINE}", f"x {LIMIT}"
    )
    for row in launch.rows:
        if row.figures is None:
            continue
        found = ratios(launch, row, figure) | {row.name: 1.0}
        table.add_row(
            row.name,
            *_times(row.figures),
            f"{row.bytes_between_ranks / MIB:.1f}",
            *(f"{found[other]:.2f}" if other in found else "-" for other in (BASELINE, LIMIT)),
            style="bold" if row.name == BASELINE else "",
        )
    return table


def figure_of(launch: Launch) -> str:
    """Return the figure that ratios are about: where ranks outnumber cores, a single round trip mostly shows the scheduler."""
    return "round_trip" if launch.workload.ranks <= machine.cores() else "back_to_back"


def _times(found: Figures) -> list[str]:
    trip = found.round_trip
    medians = [number(part.median) for part in (found.dispatch, found.combine, trip)]
    transfer = "-" if found.transfer is None else number(found.transfer)
    return [*medians, number(trip.p10), number(trip.p90), transfer, number(found.back_to_back)]


def number(microseconds: float) -> str:
    """Return a time with three digits or more."""
    return f"{microseconds:.0f}" if microseconds >= 100 else f"{microseconds:.1f}"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.machine()
