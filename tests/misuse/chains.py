"""The runner for operators that only make sense after others: the halves of the split path, the first version, combine with norm.

Each case stands in its place in the chain. What is wrong with a setup is read there or, by the ranks that accepted theirs, in the
teardown; what is wrong with a teardown is read by each rank for itself. Then the chain goes on from the same place without the mistake.
"""

from __future__ import annotations

import copy
import importlib
import os
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import commfuse
from commfuse import groups
from commfuse.operators import OPERATORS
from commfuse.operators.moe_distribute.cases import RoundTrip
from commfuse.operators.moe_distribute.flights import in_flight
from commfuse.ranks import RankFailedError
from commfuse.spec.model import Attr, Tensor
from tests.conftest import RunRanks
from tests.operators.moe_distribute import companions
from tests.operators.moe_distribute.halves import HALVES, MicroBatch, one_shot, same_bits, world
from tests.operators.moe_distribute.round_trips import experts

from .case import TIMEOUT, Args, Misuse, Outcome

SPLIT = tuple(f"npu_moe_distribute_{half}" for half in HALVES)
DISPATCH, COMBINE = "npu_moe_distribute_dispatch", "npu_moe_distribute_combine"
NORM = "npu_moe_distribute_combine_add_rms_norm"
DISPATCH_V2 = "npu_moe_distribute_dispatch_v2"

_WRONG_KINDS = {"int": "'many'", "str": "7", "float": "'small'", "group": "0", "int?": "'int8'"}


def wrong_kinds(operator: str, base: RoundTrip, **more: Any) -> list[Misuse]:
    """Every argument but the group: of another kind, missing, of another dtype, with other dimensions."""
    cases = []
    for row in OPERATORS[operator].args:
        if row.name == OPERATORS[operator].group:
            continue
        for name, wrong, says in _wrong(row):
            cases.append(
                Misuse(id=f"{row.name}-{name}", operator=operator, wrong=f"{row.name} = {wrong}", says=says, base=base, **more)
            )
    return cases


def _wrong(row: Tensor | Attr) -> list[tuple[str, str, tuple[str, ...]]]:
    if isinstance(row, Attr):
        value = _WRONG_KINDS[row.schema]
        return [("of-another-kind", value, (f"{row.name} = {value}: must be ", ", got "))]
    found = [("a-list", "[1]", (f"{row.name} = [1]: must be a tensor", ", got list"))]
    if row.when == "True":  # other rows are looked at in some calls only
        found += [
            ("of-another-dtype", "torch.zeros(3, dtype=torch.complex64)", (f"{row.name}.dtype = complex64: must be ",)),
            ("with-5-dimensions", "torch.zeros(1, 1, 1, 1, 1)", (f"{row.name}.shape = (1, 1, 1, 1, 1): must be ", "-D")),
        ]
    if not row.optional:
        found.append(("none", "None", (f"{row.name} = None: must be a tensor",)))
    return found


def carry_out(run_ranks: RunRanks, module: str, folder: Path) -> dict[str, list[Outcome]]:
    """Run every case of ``module.CASES``; outcomes by id, in the order of the processes.

    Raises:
        AssertionError: a process ended.
    """
    outcomes: dict[str, list[Outcome]] = {}
    for size in sorted({case.processes for case in importlib.import_module(module).CASES}):
        try:
            replies = run_ranks(size, _serve, module, size, str(folder), deadline=180)
        except RankFailedError as error:
            reached = {path.name: path.read_text().split()[-1:] for path in sorted(folder.iterdir())}
            raise AssertionError(f"{module}: the processes were at {reached}") from error
        found = [pickle.loads(reply) for reply in replies]
        for name in found[0]:
            outcomes[name] = [one[name] for one in found]
    return outcomes


def _serve(rank: int, module: str, size: int, folder: str) -> bytes:
    """Run the cases of ``module`` that take ``size`` processes; pickled outcomes."""
    cases = [case for case in importlib.import_module(module).CASES if case.processes == size]
    outcomes = {case.id: Outcome(error="not run", text="the group was lost in a case before") for case in cases}
    with Path(folder, str(rank)).open("w", buffering=1) as progress:
        for case in cases:
            print(case.id, file=progress)
            outcomes[case.id] = found = _carry_out(rank, case)
            if "ExchangeError" in (found.error, found.afterwards.partition(":")[0]):
                break
    return pickle.dumps(outcomes)


def _carry_out(rank: int, case: Misuse) -> Outcome:
    settings = {"product": case.accepted, "timeout": TIMEOUT, "poison": True, **case.settings}
    with commfuse.config.override(**settings), warnings.catch_warnings():
        warnings.simplefilter("ignore", commfuse.CommfuseWarning)
        return _halves(rank, case) if case.operator in SPLIT else _whole(rank, case)


def complete(operator: str, args: Mapping[str, Any]) -> Args:
    """Every argument by name, in the published order."""
    return {row.name: args[row.name] if row.name in args else getattr(row, "default", None) for row in OPERATORS[operator].args}


# --- operators that are not halves ---------------------------------------------------------------------------------------------------


def _whole(rank: int, case: Misuse) -> Outcome:
    assert isinstance(case.base, RoundTrip)
    plain = complete(case.operator, _plain_args(rank, case.operator, case.base))
    expected = _call(case.operator, plain)
    error, text = _wrong_call(rank, case, plain, lambda args: _call(case.operator, args), plain["group_ep"])
    try:
        again = _call(case.operator, plain)
        afterwards = "" if _same_valid(case, expected, again, plain) else "other results"
    except Exception as raised:
        afterwards = f"{type(raised).__name__}: {raised}"
    return Outcome(domain=plain["group_ep"], error=error, text=text, afterwards=afterwards)


def _plain_args(rank: int, operator: str, base: RoundTrip) -> Args:
    ep, tp, names = companions.where(rank, base)
    if operator == NORM:
        out = _call(DISPATCH_V2, {**base.dispatch_args(ep, tp), **names})
        return {**companions.norm_back(base, ep, tp, out, experts(base, ep, tp, out)), **names}
    args = {**companions.v1_args(base, ep, tp), **names}
    if operator == DISPATCH:
        return args
    out = _call(DISPATCH, args)
    return {**companions.v1_back(base, ep, tp, out, experts(base, ep, tp, out)), **names}


def _call(operator: str, args: Mapping[str, Any]) -> tuple[torch.Tensor, ...]:
    results = getattr(commfuse, operator)(**args)
    return results if isinstance(results, tuple) else (results,)


def _same_valid(case: Misuse, expected: Any, got: Any, plain: Args) -> bool:
    """Whether two calls gave the same; of a dispatch only the rows that came."""
    rows = int(expected[4][-1]) if case.operator == DISPATCH else None
    pairs = list(zip(expected, got, strict=True))
    return all(same_bits(a[:rows], b[:rows]) for a, b in (pairs[:1] if rows is not None else pairs))


# --- halves ------------------------------------------------------------------------------------------------------------------------------


def _halves(rank: int, case: Misuse) -> Outcome:
    assert isinstance(case.base, RoundTrip)
    half = case.operator.removeprefix("npu_moe_distribute_")
    expected = one_shot(rank, case.base)[1]
    batch = MicroBatch(rank, case.base)
    place = HALVES.index(half)
    if place:
        batch.call_all(last=HALVES[place - 1])
    plain = complete(case.operator, {"group_ep": world(), **batch.args[half]})
    error, text = _wrong_call(rank, case, plain, lambda args: _to_the_teardown(batch, half, args), world())
    try:
        afterwards = "" if same_bits(batch.call_all(half), expected) else "other results"
    except Exception as raised:
        afterwards = f"{type(raised).__name__}: {raised}"
    under_way = len(in_flight(groups.resolve(world())))
    return Outcome(
        domain=world(), error=error, text=text, afterwards=afterwards or (f"{under_way} under way" if under_way else "")
    )


def _to_the_teardown(batch: MicroBatch, half: str, args: Args) -> None:
    """Call ``half``; after a setup that was accepted, also its teardown, with the same arguments."""
    batch.call(half, **args)
    if half.endswith("setup"):
        teardown = half.replace("setup", "teardown")
        names = OPERATORS[f"npu_moe_distribute_{teardown}"].names
        batch.call(teardown, **{name: value for name, value in args.items() if name in names})


# --- the mistake -------------------------------------------------------------------------------------------------------------------------


def _wrong_call(rank: int, case: Misuse, plain: Args, call: Any, group: str) -> tuple[str, str]:
    """Make the wrong call, or dispatch_v2 in ``group`` instead of it, and return (class, text) of what it raised."""
    assert isinstance(case.base, RoundTrip)
    mine = case.on_rank in (None, rank)
    try:
        with mock.patch.dict(os.environ), commfuse.config.override(product=case.product):
            args = copy.deepcopy(plain)
            if mine and case.calls:
                _call(case.calls, {**case.base.dispatch_args(rank), "group_ep": group})
            else:
                call(case.change(args) if mine else args)
    except Exception as raised:  # whatever it is, it is what the user reads
        return type(raised).__name__, str(raised)
    return "", ""
