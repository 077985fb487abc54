"""What came of the fused matmuls, as a table and as JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.text import Text

from .. import terminal
from .matmul import Row, Summary, summaries
from .matmul_shapes import COMPUTE, OWN
from .report import number


def as_json(rows: Sequence[Row], machine_facts: dict[str, Any]) -> dict[str, Any]:
    """Return everything that was measured, in microseconds."""
    return {
        "command": "bench",
        "machine": machine_facts,
        "matmul": [_row_json(row) for row in rows],
        "summaries": [_without_nan(asdict(summary)) | {"reached": summary.reached} for summary in summaries(rows)],
        "passed": all(row.passed for row in rows),
    }


def _row_json(row: Row) -> dict[str, Any]:
    return {
        **asdict(row.shape),
        "wrong": list(row.wrong),
        "microseconds": {name: asdict(found) for name, found in row.times.items()},
        "best_plain": row.best_plain,
        **_without_nan({"against_plain": row.against_plain, "against_compute": row.against_compute}),
    }


def _without_nan(values: dict[str, Any]) -> dict[str, Any]:
    return {name: None if isinstance(found, float) and math.isnan(found) else found for name, found in values.items()}


def draw(rows: Sequence[Row], facts: dict[str, Any], out: Console) -> None:
    """Print a line for each shape and one for each operator."""
    out.print(terminal.title("A matmul and communication, fused and plain, turn by turn in the same processes"))
    text = f"{facts['processor']}, {facts['cores']:g} cores, torch {facts['torch']}; microseconds, medians; x: medians of paired ratios"
    out.print(terminal.indented(Text(text)))
    table = terminal.table("operator", "ranks", "m", "k", "n", OWN, "plain", COMPUTE, "x plain", "x compute")
    for row in rows:
        if row.times:
            times = [number(row.times[name].median) for name in (OWN, row.best_plain, COMPUTE)]
            sizes = [str(size) for size in (row.shape.ranks, row.shape.m, row.shape.k, row.shape.n)]
            table.add_row(row.shape.operator, *sizes, *times, f"{row.against_plain:.2f}", f"{row.against_compute:.2f}")
    out.print(terminal.indented(table))
    for row in rows:
        for text in row.wrong:
            out.print(terminal.indented(Text.assemble((f"{row.shape.title} is WRONG: ", "bold red"), text)))
    _draw_summaries(list(summaries(rows)), out)


def _draw_summaries(found: Sequence[Summary], out: Console) -> None:
    table = terminal.table("operator", "shapes", "x plain, median", "worst", "worst x compute, n >= 2048", "goals")
    for row in found:
        wide = "-" if math.isnan(row.wide_against_compute) else f"{row.wide_against_compute:.2f}"
        word = "reached" if row.reached else "missed"
        table.add_row(row.operator, str(row.shapes), f"{row.median:.2f}", f"{row.worst:.2f}", wide, word)
    out.print(terminal.title("Over all shapes"))
    out.print(terminal.indented(table))
