"""``commfuse check``: a backend against the published formulas, over named and random cases."""

from __future__ import annotations

import argparse
import itertools
import random
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.text import Text

from .. import __version__, config
from ..checking import FAMILIES, Family, Outcome, check
from . import soak, terminal
from .arguments import UsageError, add_backend, add_json, whole_number
from .processes import Processes

MOST_RANKS = 16
RANDOM = 20  # cases, unless asked for another number
_LAST_SEED = 2**31 - 1
_TRIES = 1000  # seeds looked at for one random case on a wanted number of ranks
_SHOWN = 10  # differences that are printed in full


@dataclass(frozen=True, kw_only=True)
class Row:
    """The result for one operator."""

    operator: str
    cases: int
    outputs: int  # compared, over all ranks and cases
    failed: tuple[str, ...]  # cases


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to ``parser``."""
    names = [operator for family in FAMILIES.values() for operator in family.operators]
    parser.add_argument("--operator", choices=names, metavar="NAME", help=f"only this one of {', '.join(names)}")
    add_backend(parser)
    parser.add_argument(
        "--ranks", type=whole_number(1, MOST_RANKS), nargs="+", metavar="N", help="only cases on these numbers of processes"
    )
    parser.add_argument(
        "--case", nargs="+", metavar="ID", help="only these cases: named ones (see --list), or a random one again"
    )
    parser.add_argument(
        "--random", type=whole_number(0, 100_000), metavar="N", help=f"random cases per family (default: {RANDOM})"
    )
    parser.add_argument(
        "--seed", type=whole_number(0, _LAST_SEED), metavar="S", help="of the first random case (default: 0; to soak, any)"
    )
    parser.add_argument(
        "--soak",
        type=whole_number(1, 10_000_000),
        metavar="SECONDS",
        help=f"random cases without end, for so long, on the same processes ({soak.RANKS}, or --ranks N), whose memory must stay flat",
    )
    parser.add_argument("--list", action="store_true", help="print the named cases and their numbers of processes, run nothing")
    add_json(parser)


def main(args: argparse.Namespace) -> int:
    """Run the cases; 0 only if every compared output is as it should be."""
    families = [family for family in FAMILIES.values() if args.operator in (None, *family.operators)]
    if args.soak:
        return _soak(args, families)
    args.seed = args.seed or 0
    cases = [(family, case) for family in families for case in _cases(family, args)]
    if args.list:
        _list(cases, as_json=args.json)
        return 0
    _know_all(args.case, cases)
    if not cases:
        raise UsageError("no case is left to run")
    begin = time.perf_counter()
    outcomes = list(_run(cases, args.backend or config.get("backend")))
    rows = _rows(families, outcomes, args.operator)
    seconds = time.perf_counter() - begin
    if args.json:
        terminal.print_json(_as_json(args, rows, outcomes, seconds))
    else:
        _draw(rows, outcomes, seconds, terminal.console())
    return 1 if any(row.failed for row in rows) else 0


def _soak(args: argparse.Namespace, families: Sequence[Family]) -> int:
    """Run cases for ``--soak`` seconds; 0 only if every output was as it should be and no memory has grown."""
    if args.case or args.random is not None or args.list or len(args.ranks or [soak.RANKS]) > 1:
        raise UsageError("--soak takes random cases of its own, on one number of processes")
    (ranks,) = args.ranks or [soak.RANKS]
    args.seed = random.randrange(_LAST_SEED // 2) if args.seed is None else args.seed
    begin = time.perf_counter()
    found = soak.run(families, ranks, args.soak, args.seed, args.backend or config.get("backend"))
    rows = _rows(families, found.outcomes, args.operator)
    seconds = time.perf_counter() - begin
    if args.json:
        held = [[vars(rank) for rank in sample.ranks] for sample in found.samples]
        report = _as_json(args, rows, found.outcomes, seconds)
        passed = bool(report["passed"] and not found.growth)
        terminal.print_json({**report, "ranks": ranks, "grown": found.growth, "memory": held, "passed": passed})
    else:
        _draw_soak(found, ranks, args.seed)
        _draw(rows, found.outcomes, seconds, terminal.console(), found.growth)
    return 1 if found.growth or any(row.failed for row in rows) else 0


def _draw_soak(found: soak.Soak, ranks: int, seed: int) -> None:
    out = terminal.console()
    out.print(terminal.title(f"{len(found.outcomes):,} random cases on {ranks} processes, seed {seed}"))
    table = terminal.table("most memory of one process [MiB]", "warm-up", "after it")
    for name, kind in (("resident", "resident"), ("of that, window", "window")):
        table.add_row(name, *(f"{soak.largest(found.samples, kind, warm=warm):,.1f}" for warm in (False, True)))
    out.print(terminal.indented(table))


def _cases(family: Family, args: argparse.Namespace) -> list[Any]:
    named = [case for case in family.named_cases() if _wanted(family, case, args)]
    if args.list:
        return named
    if args.case is None:
        return [*named, *_random_cases(family, args)]
    seeds = [int(found[1]) for name in args.case if (found := re.search(r"random-(\d+)$", name))]
    again = [case for case in map(family.random_case, seeds) if _wanted(family, case, args)]
    return [case for case in (*named, *again) if case.id in args.case]


def _random_cases(family: Family, args: argparse.Namespace) -> Iterator[Any]:
    count = RANDOM if args.random is None else args.random
    seeds = range(args.seed, args.seed + count * _TRIES)
    return itertools.islice((case for case in map(family.random_case, seeds) if _wanted(family, case, args)), count)


def _wanted(family: Family, case: Any, args: argparse.Namespace) -> bool:
    return args.ranks is None or family.world_size(case) in args.ranks


def _know_all(names: Sequence[str] | None, cases: Sequence[tuple[Family, Any]]) -> None:
    missing = sorted(set(names or ()) - {case.id for _, case in cases})
    if missing:
        raise UsageError(f"no case is named {' or '.join(missing)} among those asked for; `commfuse check --list` names them")


def _run(cases: Sequence[tuple[Family, Any]], backend: str) -> Iterator[Outcome]:
    preload = ("commfuse.checking",)
    with terminal.progress() as show, Processes(*preload) as processes:
        show("processes start", 0, len(cases))
        done = itertools.count(1)
        for family in dict.fromkeys(family for family, _ in cases):
            for outcome in check(processes.run, family, [case for of, case in cases if of is family], backend=backend):
                show(outcome.case, next(done), len(cases))
                yield outcome


def _rows(families: Sequence[Family], outcomes: Sequence[Outcome], only: str | None) -> list[Row]:
    rows = []
    for family in families:
        mine = [outcome for outcome in outcomes if outcome.family == family.name]
        compared: Counter[str] = sum((outcome.compared for outcome in mine), Counter())
        for operator in family.operators:
            failed = tuple(outcome.case for outcome in mine if not outcome.passed_for(operator))
            rows.append(Row(operator=operator, cases=len(mine), outputs=compared[operator], failed=failed))
    return [row for row in rows if row.cases and only in (None, row.operator)]


def _backends(outcomes: Sequence[Outcome]) -> list[str]:
    return sorted({name for outcome in outcomes for name in outcome.backends})


def _problems(rows: Sequence[Row], outcomes: Sequence[Outcome]) -> list[tuple[str, str]]:
    """What went wrong with the operators in ``rows``: the case, and one problem of it."""
    bad = {case for row in rows for case in row.failed}
    return [(outcome.case, text) for outcome in outcomes if outcome.case in bad for text in outcome.problems]


def _as_json(args: argparse.Namespace, rows: Sequence[Row], outcomes: Sequence[Outcome], seconds: float) -> dict[str, Any]:
    return {
        "command": "check",
        "version": __version__,
        "backends": _backends(outcomes),
        "seed": args.seed,
        "operators": [{**vars(row), "failed": list(row.failed)} for row in rows],
        "problems": [{"case": case, "text": text} for case, text in _problems(rows, outcomes)],
        "seconds": seconds,
        "passed": not any(row.failed for row in rows),
    }


def _draw(rows: Sequence[Row], outcomes: Sequence[Outcome], seconds: float, out: Console, grown: Sequence[str] = ()) -> None:
    names = ", ".join(_backends(outcomes)) or "no backend"
    out.print(terminal.title(f"{names} against the published formulas"))
    table = terminal.table("operator", "cases", "outputs", "cases that differ")
    for row in rows:
        style = "bold red" if row.failed else "green"
        table.add_row(row.operator, f"{row.cases:,}", f"{row.outputs:,}", Text(f"{len(row.failed):,}", style=style))
    out.print(terminal.indented(table))
    _draw_problems(_problems(rows, outcomes), out)
    if grown:
        out.print(terminal.title("What has grown"))
    for text in grown:
        out.print(terminal.indented(text))
    failed = bool(grown) or any(row.failed for row in rows)
    word, style = ("FAILED", "bold red") if failed else ("passed", "bold green")
    out.print(Text.assemble("\n", (word, style), f" after {seconds:.1f} s"))


def _draw_problems(texts: Sequence[tuple[str, str]], out: Console) -> None:
    """The first problems; one that several cases share is printed once."""
    cases: dict[str, list[str]] = {}
    for case, text in texts:
        cases.setdefault(text, []).append(case)
    if cases:
        out.print(terminal.title("What is wrong"))
    for text, names in itertools.islice(cases.items(), _SHOWN):
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        out.print(terminal.indented(Text.assemble((f"{names[0]}{more}: ", "dim"), text)))
    if len(cases) > _SHOWN:
        out.print(terminal.indented(f"and {len(cases) - _SHOWN} more; --json lists all"))


def _list(cases: Sequence[tuple[Family, Any]], as_json: bool) -> None:
    found = [{"family": family.name, "case": case.id, "processes": family.world_size(case)} for family, case in cases]
    if as_json:
        terminal.print_json({"command": "check", "cases": found})
        return
    for row in found:
        print(f"{row['family']}  {row['processes']:>2}  {row['case']}")
