"""A wrong call as data: what one writes, what one reads; and the runner that carries out many of them on warm ranks.

Misuse     one wrong call, on all processes or on one of them
Odd        a call that looks wrong and is not: it must give what the plain call gives
carry_out  every case of a list on real ranks, each followed by the plain call on the same group
"""

from __future__ import annotations

import copy
import importlib
import os
import pickle
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist

import commfuse
from commfuse.checking import FAMILIES, RankRun, judge
from commfuse.checking.moe_distribute import experts, golden, groups_of
from commfuse.compare import difference
from commfuse.operators import OPERATORS
from commfuse.operators.moe_distribute.cases import RoundTrip
from commfuse.ranks import RankFailedError
from tests.conftest import RunRanks

DISPATCH, COMBINE = "npu_moe_distribute_dispatch_v2", "npu_moe_distribute_combine_v2"
TIMEOUT = 10.0  # seconds; a rank that is left waiting then reads an ExchangeError, and the case fails

Args = dict[str, Any]
Results = tuple[torch.Tensor | None, ...]


@dataclass(frozen=True, kw_only=True)
class Calls:
    """Valid calls of operators that stand alone, in the group of all processes; ``cases`` are those of `commfuse.checking`."""

    id: str
    cases: tuple[tuple[str, Any], ...]  # operator, case

    @property
    def world_size(self) -> int:
        """How many processes the calls take."""
        size: int = self.cases[0][1].world_size
        return size

    tp_world_size = 0


@dataclass(frozen=True, kw_only=True)
class Written:
    """A call as somebody writes it.

    ``base`` gives a valid call. ``wrong`` are Python statements about its arguments, by their names, that process ``on_rank`` alone
    writes (None: every process): they are executed, so what is printed is what is run.
    """

    id: str
    operator: str
    wrong: str
    base: RoundTrip | Calls
    on_rank: int | None = None
    product: str = "portable"
    settings: Mapping[str, Any] = field(default_factory=dict)

    def change(self, args: Args) -> Args:
        """Return ``args`` after the statements; its tensors are changed in place."""
        around = {"torch": torch, "np": np, "os": os, "commfuse": commfuse, "__builtins__": __builtins__}
        variables = {**args, **around}
        exec(self.wrong, variables)
        unknown = variables.keys() - args.keys() - around.keys()
        assert not unknown, f"{self.id}: {self.operator} has no argument {', '.join(unknown)}"
        return {name: variables[name] for name in args}

    @property
    def processes(self) -> int:
        """How many processes the call takes."""
        return self.base.world_size * max(self.base.tp_world_size, 1)

    @property
    def accepted(self) -> str:
        """The product setting under which the plain call runs; where a product needs more ranks than a test has, it only warns."""
        return f"{self.product},warn" if self.product == "A2" or self.processes == 1 else self.product


@dataclass(frozen=True, kw_only=True)
class Misuse(Written):
    """A wrong call: every process raises ``error`` with one and the same text, which has ``says`` and the operator's name in it.

    ``calls`` is the operator that ``on_rank`` calls in place of ``operator``. With ``own_domain`` the text names groups, and is then
    the same only among the ranks of each expert-parallel domain.
    """

    says: tuple[str, ...]
    error: type[commfuse.CommfuseError] = commfuse.ArgumentError
    calls: str = ""
    own_domain: bool = False


@dataclass(frozen=True, kw_only=True)
class Odd(Written):
    """A call that looks wrong and gives what the plain call gives."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one case on one process."""

    domain: str = ""  # the expert-parallel domain it belongs to
    error: str = ""  # the class that was raised
    text: str = ""
    differs: str = ""  # the odd call's result from that of the plain call
    afterwards: str = ""  # what was wrong with the plain call that followed


@dataclass(frozen=True, kw_only=True)
class Plain:
    """The plain calls of one base on this process: every argument by name, and the results, by operator."""

    domain: str  # the group that the text of an error may name
    args: Mapping[str, Args]
    results: Mapping[str, Results]

    def difference(self, operator: str, results: Results) -> str:
        """'' if ``results`` are those of the plain call, else what differs."""
        pairs = zip(OPERATORS[operator].outputs, self.results[operator], results, strict=True)
        return "; ".join(filter(None, (difference(row.name, wanted, got) for row, wanted, got in pairs)))


def carry_out(run_ranks: RunRanks, module: str, folder: Path) -> dict[str, list[Outcome]]:
    """Run every case of ``module.CASES``; outcomes by id, in the order of the processes.

    Raises:
        AssertionError: a process ended, or the plain call of a base is not the golden's.
    """
    outcomes: dict[str, list[Outcome]] = {}
    for size in sorted({case.processes for case in importlib.import_module(module).CASES}):
        try:
            replies = run_ranks(size, _serve, module, size, str(folder), deadline=120)
        except RankFailedError as error:
            reached = {path.name: path.read_text().split()[-1:] for path in sorted(folder.iterdir())}
            raise AssertionError(f"{module}: the processes were at {reached}") from error
        plains, found = zip(*(pickle.loads(reply) for reply in replies), strict=True)
        hold_against_golden(plains)
        for name in found[0]:
            outcomes[name] = [one[name] for one in found if one[name].error != "absent"]
    return outcomes


def hold_against_golden(plains: Sequence[Mapping[tuple[RoundTrip | Calls, str], Plain]]) -> None:
    """Assert that the plain calls, by (base, product) on each process, gave what the golden gives."""
    for base, product in plains[0]:
        if isinstance(base, Calls):
            for operator, case in base.cases:
                runs = [RankRun(outputs=list(one[base, product].results[operator]), backend="any") for one in plains]
                assert judge(FAMILIES[operator], case, runs).problems == []
            continue
        tp = max(base.tp_world_size, 1)
        for (tp_rank, ep_rank), expected in golden(base, product=product.removesuffix(",warn")).items():
            got = plains[ep_rank * tp + tp_rank][base, product].results
            for operator, name in ((DISPATCH, "dispatch"), (COMBINE, "combine")):
                for (wanted, valid), actual in zip(expected[name], got[operator], strict=True):
                    wrong = difference(f"{base.id}, {product}, {name}", wanted, actual, valid)
                    assert not wrong, wrong


def _serve(rank: int, module: str, size: int, folder: str) -> bytes:
    """Run the cases of ``module`` that take ``size`` processes; pickled plain calls and outcomes."""
    cases = [case for case in importlib.import_module(module).CASES if case.processes == size]
    plains: dict[tuple[RoundTrip | Calls, str], Plain] = {}
    outcomes = {case.id: Outcome(error="not run", text="the group was lost in a case before") for case in cases}
    with Path(folder, str(rank)).open("w", buffering=1) as progress:
        for case in cases:
            print(case.id, file=progress)
            outcomes[case.id] = found = _carry_out(rank, case, plains)
            if "ExchangeError" in (found.error, found.afterwards.partition(":")[0]):
                break
    return pickle.dumps((plains, outcomes))


def _carry_out(rank: int, case: Written, plains: dict[tuple[RoundTrip | Calls, str], Plain]) -> Outcome:
    if not _takes_part(rank, case.base):
        return Outcome(error="absent")
    settings = {"product": case.accepted, "timeout": TIMEOUT, "poison": True, **case.settings}
    with commfuse.config.override(**settings), warnings.catch_warnings():
        warnings.simplefilter("ignore", commfuse.CommfuseWarning)
        key = case.base, case.accepted
        if key not in plains:
            plains[key] = plain_calls(rank, case.base)
        return _one(rank, case, plains[key])


def _takes_part(rank: int, base: RoundTrip | Calls) -> bool:
    if isinstance(base, Calls):
        return True
    groups_of(base)  # also on a rank that does not call
    ep_rank, tp_rank = divmod(rank, max(base.tp_world_size, 1))
    return (tp_rank, ep_rank) in base.calls()


def plain_calls(rank: int, base: RoundTrip | Calls) -> Plain:
    """Carry out the plain calls of ``base`` on this process: those it lists, or dispatch and combine."""
    if isinstance(base, Calls):
        return _plain_calls_alone(rank, base)
    ep_groups, tp_groups = groups_of(base)
    ep_rank, tp_rank = divmod(rank, max(base.tp_world_size, 1))
    names = {"group_ep": ep_groups[tp_rank].group_name}
    if base.tp_world_size == 2:
        names["group_tp"] = tp_groups[ep_rank].group_name
    args = {DISPATCH: _complete(DISPATCH, {**base.dispatch_args(ep_rank, tp_rank), **names})}
    results = {DISPATCH: _call(DISPATCH, args[DISPATCH])}
    y = experts(base, ep_rank, tp_rank, results[DISPATCH])
    back = base.combine_args(ep_rank, tp_rank, results[DISPATCH], y)
    args[COMBINE] = _complete(COMBINE, {**back, **names})
    results[COMBINE] = _call(COMBINE, args[COMBINE])
    return Plain(domain=names["group_ep"], args=args, results=results)


def _plain_calls_alone(rank: int, base: Calls) -> Plain:
    domain = str(dist.group.WORLD.group_name)
    args = {}
    for operator, case in base.cases:
        given = {"input" if name == "self" else name: value for name, value in case.args(rank).items()}
        args[operator] = _complete(operator, {**given, OPERATORS[operator].group: domain})
    return Plain(domain=domain, args=args, results={operator: _call(operator, args[operator]) for operator in args})


def _complete(operator: str, args: Args) -> Args:
    """Every argument by name, in the published order."""
    return {row.name: args[row.name] if row.name in args else getattr(row, "default", None) for row in OPERATORS[operator].args}


def _call(operator: str, args: Args) -> Results:
    results = getattr(commfuse, operator)(**args)
    return results if isinstance(results, tuple) else (results,)


def _one(rank: int, case: Written, plain: Plain) -> Outcome:
    error, text, differs = "", "", ""
    mine = case.on_rank in (None, rank)
    try:
        with mock.patch.dict(os.environ), commfuse.config.override(product=case.product, backend="auto"):
            operator = (mine and isinstance(case, Misuse) and case.calls) or case.operator
            args = copy.deepcopy(plain.args[operator])
            results = _call(operator, case.change(args) if mine else args)
        differs = plain.difference(operator, results)
    except Exception as raised:  # whatever it is, it is what the user reads
        error, text = type(raised).__name__, str(raised)
    try:
        afterwards = plain.difference(case.operator, _call(case.operator, plain.args[case.operator]))
    except Exception as raised:
        afterwards = f"{type(raised).__name__}: {raised}"
    return Outcome(domain=plain.domain, error=error, text=text, differs=differs, afterwards=afterwards)
