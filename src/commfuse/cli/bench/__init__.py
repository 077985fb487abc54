"""``commfuse bench``: the operators and what people use today, side by side in one launch, after every result has been compared."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...ranks import RankFailedError
from .. import terminal
from ..arguments import UsageError, whole_number
from . import goals, matmul, matmul_report, matmul_shapes, mpi, plot, report
from .launch import Effort, Launch, launch, started
from .methods import METHODS, MethodRow
from .workload import CASES, DTYPES, QUANTS, ROUTINGS, Workload

MOST_RANKS = 32
_CUSTOM = replace(CASES["A"], name="custom")
_SIZES = {  # option: field of a workload, lowest, highest, meaning
    "ranks": ("ranks", 1, MOST_RANKS, "processes"),
    "tokens": ("num_tokens", 1, 4096, "tokens of each rank"),
    "hidden": ("hidden", 4, 65536, "hidden size, a multiple of 4"),
    "topk": ("top_k", 1, 64, "experts of each token"),
    "experts": ("num_experts", 1, 4096, "experts of all ranks together, a multiple of --ranks"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to ``parser``."""
    parser.add_argument(
        "--operators",
        choices=("moe", "matmul", *matmul_shapes.OPERATORS),
        default="moe",
        metavar="NAME",
        help="moe: dispatch and combine (default); matmul: all that fuse a matmul; or one of those: "
        + ", ".join(matmul_shapes.OPERATORS),
    )
    what = parser.add_argument_group("dispatch and combine")
    what.add_argument("--case", metavar="A,D", help=f"named cases, of {', '.join(CASES)} (default: all, or one of given sizes)")
    for option, (field, lowest, highest, meaning) in _SIZES.items():
        default = getattr(_CUSTOM, field)
        text = f"{meaning} (default: the case's, {default} without one)"
        what.add_argument(f"--{option}", type=whole_number(lowest, highest), metavar="N", help=text)
    _add_choice(what, "quant", {**QUANTS, "both": "one after the other"}, "both")
    _add_choice(what, "routing", ROUTINGS, "uniform")
    what.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the rows (default: bfloat16)")
    names = ", ".join(row.name for row in METHODS)
    what.add_argument("--methods", metavar="NAMES", help=f"only these, with commas: {names} (default: all)")
    other = parser.add_argument_group("operators that fuse a matmul")
    other.add_argument("--grid", action="store_true", help=f"{len(matmul_shapes.GRID)} shapes rather than a few")
    effort = parser.add_argument_group("effort and results")
    effort.add_argument("--rounds", type=whole_number(1, 100), default=4, metavar="N", help="turns of each method (default: 4)")
    effort.add_argument("--seconds", type=_seconds, default=1.5, metavar="S", help="for each method of a case (default: 1.5)")
    effort.add_argument(
        "--goals", action="store_true", help=f"say which goals are missed, and exit with 1 if any is; {goals.LAUNCHES} launches"
    )
    effort.add_argument(
        "--json", nargs="?", const="-", metavar="FILE", help="write one JSON object; without FILE, or with -, print it"
    )
    effort.add_argument("--plot", metavar="FILE", help="draw the round trips into FILE (.png, .svg, .pdf); needs matplotlib")


def main(args: argparse.Namespace) -> int:
    """Measure; 0 only if every result was right and, with ``--goals``, every goal is reached."""
    if args.plot:
        plot.need()
    try:
        return _moe(args) if args.operators == "moe" else _matmul(args)
    except RankFailedError as error:
        print(f"commfuse bench: {error}", file=sys.stderr)
        return 1


def _moe(args: argparse.Namespace) -> int:
    workloads, methods = _workloads(args), _methods(args.methods)
    there = _mpi()
    out, facts = terminal.console(), report.where()
    quiet = args.json == "-"
    if not quiet:
        report.draw_head(facts, there.version if isinstance(there, mpi.Mpi) else str(there), out)
    found: list[Launch] = []
    for _ in range(goals.LAUNCHES if args.goals else 1):
        for workload in workloads:
            found.append(_launch(args, workload, methods, there))
            if not quiet:
                report.draw(found[-1], out)
    judged = goals.judge(found) if args.goals else []
    _write(args.json, report.as_json(found, facts) | ({"goals": goals.as_json(judged)} if args.goals else {}))
    if args.goals and not quiet:
        goals.draw(judged, out)
    if args.plot:
        plot.draw(found, Path(args.plot))
    return 0 if all(launch.passed for launch in found) and all(goal.reached for goal in judged) else 1


def _launch(
    args: argparse.Namespace, workload: Workload, methods: Sequence[MethodRow], there: mpi.Mpi | mpi.MpiMissingError
) -> Launch:
    effort = Effort(rounds=args.rounds, seconds=args.seconds)
    with terminal.progress() as show:
        show(f"{workload.name}: {workload.ranks} processes start")

        def show_case(what: str, done: int | None = None, total: int | None = None) -> None:
            show(f"{workload.name} {workload.quant}, {what}", done, total)

        with started(workload.ranks, there) as run:
            return launch(run, workload, methods, effort, show_case, there)


def _matmul(args: argparse.Namespace) -> int:
    out, facts = terminal.console(), report.where()
    every = matmul_shapes.GRID if args.grid or args.goals else matmul_shapes.SHAPES
    shapes = [shape for shape in every if args.operators in ("matmul", shape.operator)]
    with terminal.progress() as show:
        found = matmul.measure(shapes, Effort(rounds=args.rounds, seconds=args.seconds), show)
    _write(args.json, matmul_report.as_json(found, facts))
    if args.json != "-":
        matmul_report.draw(found, facts, out)
    missed = args.goals and not all(summary.reached for summary in matmul.summaries(found))
    return 0 if all(row.passed for row in found) and not missed else 1


def _workloads(args: argparse.Namespace) -> list[Workload]:
    given = {field: getattr(args, option) for option, (field, *_) in _SIZES.items() if getattr(args, option) is not None}
    given |= {"routing": args.routing, "dtype": args.dtype}
    names = args.case.split(",") if args.case else None
    unknown = [name for name in names or () if name not in CASES]
    if unknown:
        raise UsageError(f"there is no case {unknown[0]!r}; there are {', '.join(CASES)}")
    custom = names is None and any(getattr(args, option) is not None for option in _SIZES)
    bases = [_CUSTOM] if custom else [CASES[name] for name in names or CASES]
    quants = list(QUANTS) if args.quant == "both" else [args.quant]
    return [_checked(replace(base, **given, quant=quant)) for base in bases for quant in quants]


def _checked(workload: Workload) -> Workload:
    if workload.num_experts % workload.ranks:
        raise UsageError(f"{workload.num_experts} experts do not divide among {workload.ranks} ranks")
    if workload.top_k > workload.num_experts:
        raise UsageError(f"a token cannot choose {workload.top_k} of {workload.num_experts} experts")
    if workload.hidden % 4:
        raise UsageError(f"--hidden {workload.hidden}: must be a multiple of 4, for the peers' messages")
    return workload


def _methods(names: str | None) -> list[MethodRow]:
    by_name = {row.name: row for row in METHODS}
    wanted = names.split(",") if names else list(by_name)
    unknown = [name for name in wanted if name not in by_name]
    if unknown:
        raise UsageError(f"there is no method {unknown[0]!r}; there are {', '.join(by_name)}")
    return [by_name[name] for name in wanted]


def _mpi() -> mpi.Mpi | mpi.MpiMissingError:
    try:
        return mpi.find()
    except mpi.MpiMissingError as missing:
        return missing


def _write(where: str | None, value: dict[str, Any]) -> None:
    if where == "-":
        terminal.print_json(value)
    elif where:
        Path(where).write_text(json.dumps(value, indent=2) + "\n")


def _add_choice(group: Any, name: str, choices: dict[str, str], default: str) -> None:
    meanings = "; ".join(f"{choice}: {meaning}" for choice, meaning in choices.items())
    group.add_argument(f"--{name}", choices=choices, default=default, help=f"{meanings} (default: {default})")


def _seconds(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number of seconds, not {text!r}") from None
    if not 0.01 <= number <= 600:
        raise argparse.ArgumentTypeError(f"must be in 0.01..600 seconds, not {number:g}")
    return number
