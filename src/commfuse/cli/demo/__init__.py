"""``commfuse demo``: an expert-parallel MoE layer over real processes, and the same layer in one process, compared."""

from __future__ import annotations

import argparse
import functools
import pickle
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ... import config
from ...errors import CommfuseError
from ...ranks import RankFailedError, Ranks
from .. import terminal
from ..arguments import UsageError, add_backend, add_json, whole_number
from ..processes import Processes
from . import one_process, picture, rank, verdict
from .layer import TOP_K, Layer

MOST_RANKS = 32
MOST_TOKENS = 2048  # of all ranks together: what two cores do within a minute
_DEADLINE = 120  # seconds for any one phase
FEWEST_EXPERTS, MOST_EXPERTS = 32, 256  # the first unless asked for fewer; the second is DeepSeek-V3's


@dataclass(frozen=True, kw_only=True)
class Run:
    """What came of the layer on the ranks."""

    reports: list[rank.Report]
    seconds: dict[str, list[float]]  # per phase, per rank


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to ``parser``."""
    ranks = whole_number(1, MOST_RANKS)
    parser.add_argument("--ranks", type=ranks, default=4, metavar="N", help=f"processes, 1..{MOST_RANKS} (default: 4)")
    parser.add_argument(
        "--tokens", type=whole_number(1, 512), default=64, metavar="N", help="tokens per rank, 1..512 (default: 64)"
    )
    parser.add_argument(
        "--experts",
        type=whole_number(TOP_K, MOST_EXPERTS),
        metavar="N",
        help=f"MoE experts, {TOP_K}..{MOST_EXPERTS}, a multiple of --ranks (default: the first one from {FEWEST_EXPERTS} on)",
    )
    parser.add_argument("--quant", action="store_true", help="dispatch the rows as int8")
    add_backend(parser)
    parser.add_argument("--seed", type=whole_number(0, 2**31 - 1), default=0, metavar="N", help="of all weights (default: 0)")
    add_json(parser)


def main(args: argparse.Namespace) -> int:
    """Run the layer both ways; 0 only if every token is within the bound."""
    begin = time.perf_counter()
    layer = _layer(args)
    backend = args.backend or config.get("backend")
    with terminal.progress() as show:
        try:
            run = travel(layer, backend, show)
        except RankFailedError as error:
            print(f"commfuse demo: {error}", file=sys.stderr)
            return 1
        whole = one_process.compute(layer, lambda done: show("the same in one process", done, layer.experts))
        found = verdict.judge(layer, run.reports, whole)
    result = picture.Result(
        layer=layer, reports=run.reports, seconds=run.seconds, verdict=found, elapsed=time.perf_counter() - begin
    )
    if args.json:
        terminal.print_json(picture.as_json(result))
    else:
        picture.draw(result, terminal.console())
    return 0 if found.passed else 1


def travel(layer: Layer, backend: str, show: terminal.Show) -> Run:
    """Run the layer on ``layer.ranks`` processes.

    Raises:
        CommfuseError: the ranks' refusal.
        RankFailedError: a rank died.
    """
    show(f"{layer.ranks} processes start")
    with Processes(rank.__name__) as processes:
        run = functools.partial(_on_all, processes.start(layer.ranks))
        show("tokens and experts")
        run(rank.prepare, layer, backend)
        seconds = {}
        for number, name in enumerate(rank.PHASES):
            show(name, number, len(rank.PHASES))
            seconds[name] = run(rank.phase, name)
        show("results come in")
        return Run(reports=[pickle.loads(data) for data in run(rank.report)], seconds=seconds)


def _on_all(ranks: Ranks, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Run ``function(rank, *args)`` on every rank; a refusal that it returns is raised here."""
    results = ranks.run(function, *args, deadline=_DEADLINE)
    for result in results:
        if isinstance(result, CommfuseError):
            raise result
    return results


def _layer(args: argparse.Namespace) -> Layer:
    experts = args.experts or -(-FEWEST_EXPERTS // args.ranks) * args.ranks
    if experts % args.ranks:
        near = experts // args.ranks * args.ranks
        there = " or ".join(str(n) for n in (near, near + args.ranks) if n >= TOP_K)
        raise UsageError(f"{experts} experts do not divide among {args.ranks} ranks; take {there}")
    if args.ranks * args.tokens > MOST_TOKENS:
        raise UsageError(f"{args.ranks} ranks of {args.tokens} tokens are more than {MOST_TOKENS} tokens in all; take fewer")
    return Layer(ranks=args.ranks, tokens=args.tokens, experts=experts, int8_rows=args.quant, seed=args.seed)
