"""What the demo shows: who sent how much to whom, how busy each expert was, bytes, times, and the comparison."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from ... import __version__
from .. import bars, terminal
from .layer import HIDDEN, INNER, TOP_K, Layer, words
from .rank import Report
from .verdict import BOUND, INT8_BOUND, Verdict

MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Result:
    """Everything there is to show."""

    layer: Layer
    reports: Sequence[Report]
    seconds: dict[str, list[float]]  # per phase, per rank
    verdict: Verdict
    elapsed: float  # seconds, from the start of the command

    @property
    def rows_sent(self) -> list[list[int]]:
        """Rows from each rank (first index) to each rank, counted by the receivers."""
        return [[report.rows_per_source[source] for report in self.reports] for source in range(self.layer.ranks)]

    @property
    def rows_per_expert(self) -> list[int]:
        """Rows that each expert received."""
        return [count for report in self.reports for count in report.rows_per_expert]


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Rows and bytes of one direction; a row that stays on its rank counts in the first two alone."""

    rows: int
    bytes: int
    rows_between_ranks: int
    bytes_between_ranks: int


def traffic(result: Result) -> dict[str, Traffic]:
    """Return what dispatch and combine moved: the rows and their int8 factors, without notes and headers."""
    sent = result.rows_sent
    rows = sum(map(sum, sent))
    away = rows - sum(sent[rank][rank] for rank in range(result.layer.ranks))
    row_bytes = {"dispatch": HIDDEN + 4 if result.layer.int8_rows else 2 * HIDDEN, "combine": 2 * HIDDEN}
    return {
        name: Traffic(rows=rows, bytes=rows * size, rows_between_ranks=away, bytes_between_ranks=away * size)
        for name, size in row_bytes.items()
    }


def as_json(result: Result) -> dict[str, Any]:
    """Return all of it as plain values."""
    layer, found = result.layer, result.verdict
    return {
        "command": "demo",
        "version": __version__,
        "torch": torch.__version__,
        "backend": result.reports[0].backend,
        "transport": result.reports[0].transport,
        "ranks": layer.ranks,
        "tokens_per_rank": layer.tokens,
        "experts": layer.experts,
        "hidden": HIDDEN,
        "inner": INNER,
        "top_k": TOP_K,
        "rows": _row_type(layer),
        "seed": layer.seed,
        "rows_sent": result.rows_sent,
        "rows_per_expert": result.rows_per_expert,
        "traffic": {name: asdict(moved) for name, moved in traffic(result).items()},
        "seconds": {name: {"slowest": max(of), "mean": sum(of) / len(of)} for name, of in result.seconds.items()},
        "seconds_in_all": result.elapsed,
        "comparison": {"tokens": found.tokens, "other_choice": found.other_choice, **asdict(found.difference), "bound": BOUND},
        "int8": None if found.int8 is None else {**asdict(found.int8), "bound": INT8_BOUND},
        "passed": found.passed,
    }


def draw(result: Result, out: Console) -> None:
    """Print it."""
    layer, first = result.layer, result.reports[0]

    def section(title: str, *parts: RenderableType) -> None:
        out.print(terminal.title(title), *map(terminal.indented, parts), sep="\n")

    section(
        f"An expert-parallel MoE layer over {layer.ranks} process{'es' * (layer.ranks > 1)}",
        Text(f"{layer.all_tokens} tokens ({layer.tokens} per rank), hidden size {HIDDEN}, {_row_type(layer)} rows"),
        Text(f"{layer.experts} experts, {layer.experts_per_rank} per rank, the best {TOP_K} for each token; one shared expert"),
        Text(f"backend {first.backend} over {first.transport}, torch {torch.__version__} on {platform.machine()}"),
    )
    section("Rows sent by dispatch: from each rank (down) to each rank (across)", bars.heat_map(result.rows_sent, out))
    per_rank = [report.rows_per_expert for report in result.reports]
    section("Rows received by each expert", bars.columns(per_rank, "rank", out), _busiest(result))
    section("Bytes of the rows", _bytes_table(result))
    section("Time", _time_table(result))
    section("Every token against the same layer in one process (float64)", _comparison(result.verdict))
    word, style = ("passed", "bold green") if result.verdict.passed else ("FAILED", "bold red")
    out.print(Text.assemble("\n", (word, style), f" after {result.elapsed:.1f} s in all"))


def _row_type(layer: Layer) -> str:
    return "int8" if layer.int8_rows else "bfloat16"


def _busiest(result: Result) -> Text:
    """The mean, and the busiest expert with the words that went there most often."""
    counts, layer = result.rows_per_expert, result.layer
    most = max(range(len(counts)), key=counts.__getitem__)
    visitors = Counter(
        word
        for rank, report in enumerate(result.reports)
        for word, ids in zip(words(layer, rank), report.expert_ids.tolist(), strict=True)
        if most in ids and word.isalpha()
    )
    named = ", ".join(f"{word} x{count}" for word, count in visitors.most_common(3))
    return Text(f"mean {sum(counts) / len(counts):.0f}, least {min(counts)}, most {counts[most]} (expert {most}: {named})")


def _bytes_table(result: Result) -> Table:
    table = terminal.table("", "rows", "MiB", "between ranks: rows", "MiB")
    for name, moved in traffic(result).items():
        table.add_row(
            name,
            f"{moved.rows:,}",
            f"{moved.bytes / MIB:.1f}",
            f"{moved.rows_between_ranks:,}",
            f"{moved.bytes_between_ranks / MIB:.1f}",
        )
    return table


def _time_table(result: Result) -> Table:
    table = terminal.table("", "slowest rank", "mean of the ranks")
    for name, seconds in result.seconds.items():
        table.add_row(name, f"{max(seconds) * 1e3:.1f} ms", f"{sum(seconds) / len(seconds) * 1e3:.1f} ms")
    return table


def _comparison(found: Verdict) -> Table:
    worst = found.difference
    facts = terminal.facts()
    place = f"rank {worst.rank}, token {worst.token}, column {worst.column}"
    facts.add_row("largest difference", f"{worst.largest:.3g} ({place}; allowed there: {worst.bound_there:.3g})")
    facts.add_row("closest to its bound", f"{worst.closest:.2f} of it")
    facts.add_row("bound", BOUND)
    facts.add_row("within it", _share(worst.tokens_within, found))
    if found.other_choice:
        facts.add_row("routing", f"{found.other_choice} tokens went to other experts than in one process")
    if found.int8 is not None:
        cost = found.int8
        facts.add_row(
            "cost of int8", f"a token changes by {cost.largest:.2%} of its norm at most (allowed there: {cost.bound_there:.2%})"
        )
        facts.add_row("bound", INT8_BOUND)
        facts.add_row("within it", _share(cost.tokens_within, found))
    return facts


def _share(count: int, found: Verdict) -> str:
    return f"{count} of {found.tokens} tokens"
