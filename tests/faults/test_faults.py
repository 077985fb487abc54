"""Something happens to one rank in the middle of its calls: all others read the same cause in time, and go on afterwards.

COMMFUSE_FAULT_SEED repeats a run's choice of cases; it is in the name of each.
"""

from __future__ import annotations

import os
import random
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from commfuse.operators import OPERATORS

from . import harness
from .cases import CASES, KINDS, PLACES, Case, chosen
from .rank import join, serve
from .work import ROUNDS

pytestmark = pytest.mark.alone

_SHORT, _LONG = 60, 240
_SEED = int(os.environ.get("COMMFUSE_FAULT_SEED") or random.randrange(10000))
_ROWS = chosen(_SEED, _LONG)
_EXIT_CODES = {"kill": -9, "exception": 1}
_CAUSES = "has ended; awaited for ", "did not come in time; awaited for ", "broke off: KeyboardInterrupt"
_MARKS = [[] if number < _SHORT else [pytest.mark.long] for number in range(_LONG)]


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=f"seed{_SEED}-{case.id}", marks=marks) for case, marks in zip(_ROWS, _MARKS, strict=True)]
)
def test_fault(tmp_path: Path, case: Case) -> None:
    report = harness.run(serve, case.world_size, tmp_path, case, stop_until="met" if case.late else "")
    problems = [*_of_processes(case, report), *(_of_results if case.harmless else _of_errors)(case, report)]
    assert not problems, "\n".join([*problems, *report.stderr])


def _of_processes(case: Case, report: harness.Report) -> list[str]:
    """What is wrong with how the processes ended, and with what they left."""
    found = [f"left behind: {what}" for what in report.left]
    for rank, (code, notes) in enumerate(zip(report.exit_codes, report.notes, strict=True)):
        expected = _EXIT_CODES.get(case.kind.name, 0) if rank == case.victim else 0
        if code != expected:
            found.append(f"rank {rank} ended with {code}, not {expected}")
        if rank == case.victim and "strike" not in notes:
            found.append(f"rank {rank}: the fault did not happen")
        before, after = notes.get("files") or (0, 0)
        if after > before:
            found.append(f"rank {rank}: {before} open files before the fault, {after} in the end")
    return found


def _of_results(case: Case, report: harness.Report) -> list[str]:
    met = [notes.get("met") for notes in report.notes]
    return [f"rank {rank}: {one}" for rank, one in enumerate(met) if one != {"right": [True] * 3}]


def _of_errors(case: Case, report: harness.Report) -> list[str]:
    """What is wrong with the errors, and with how the ranks went on."""
    tellers = [rank for rank in range(case.world_size) if not (rank == case.victim and case.kind.ends)]
    living = [rank for rank in tellers if not (rank == case.victim and not case.late)]
    found, causes = [], set()
    for rank in tellers:
        notes = report.notes[rank]
        missing = {"met", "again", "files"} - notes.keys()
        if missing:
            found.append(f"rank {rank} has not noted {missing}")
            continue
        if not all(notes["met"]["right"]) or len(notes["met"]["right"]) > 1:
            found.append(f"rank {rank}: results {notes['met']['right']}")
        for told in (notes["met"], notes["again"])[rank not in living :]:
            found += [f"rank {rank}: {text}" for text in _of_error(case, told, report.pids[case.victim])]
            causes.add(_cause(told.get("text", "")))
        if not case.place.first and notes.get("after") != {"alive": tellers, "right": [True, True]}:
            found.append(f"rank {rank} went on with {notes.get('after')}")
    if len(causes) > 1 and not case.place.first:
        found.append(f"{len(causes)} causes: {causes}")
    return found


def _of_error(case: Case, told: dict[str, Any], pid: int) -> list[str]:
    text = told.get("text", "")
    if told.get("error") != "ExchangeError":
        return [f"not an ExchangeError: {told}"]
    if case.place.first:  # the ranks have not met, so nobody knows the others' processes
        return [] if re.search(r"(exchange with )?rank \d+ .*; awaited for \d", text) else [f"names no rank: {text}"]
    cause = _CAUSES[0 if case.kind.ends else 1 if case.late else 2]
    says = ["group '", f"rank {case.victim}", f"(pid {pid})" if cause != _CAUSES[2] else "", cause]
    found = [f"{part!r} is not in: {text}" for part in says if part not in text]
    return found if text.startswith(tuple(OPERATORS)) else [*found, f"names no operator: {text}"]


def _cause(text: str) -> str:
    """What an error says without who found it and who reads it."""
    told, given_up, cause = text.partition("the group has been given up")
    return (
        (cause.partition("): ")[2] if cause.startswith(" (found by") else cause.removeprefix(": "))[:400]
        if given_up
        else told[:400]
    )


# --- the harness sees what it should -----------------------------------------------------------------------------------------------


def hang(rank: int, folder: Path) -> None:
    join(rank, 2, folder)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    never_ends()


def never_ends() -> None:
    signal.pause()


def test_a_hang_fails_with_every_ranks_stack(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"ranks \[0, 1\] were not done in time") as caught:
        harness.run(hang, 2, tmp_path, stop_until="never", limit=3)
    assert "in never_ends" in str(caught.value)
    assert str(caught.value).count("in hang") == 2


# --- the table is whole ------------------------------------------------------------------------------------------------------------


def test_the_table_has_every_kind_for_every_family() -> None:
    assert set(PLACES) == set(ROUNDS)
    assert {(case.family, case.kind.name) for case in CASES} == {(family, kind) for family in ROUNDS for kind in KINDS}
    assert len({case.id for case in CASES}) == len(CASES) >= 200


def test_a_choice_has_every_family_kind_and_size() -> None:
    for seed in range(5):
        rows = chosen(seed, _SHORT)
        assert chosen(seed, 2 * _SHORT)[:_SHORT] == rows
        assert {case.family for case in rows} == set(ROUNDS)
        assert {case.kind.name for case in rows} == set(KINDS)
        assert {case.place.name for case in rows} >= {"before-publish", "between-ids-and-rows", "inside-pull"}
        assert {case.world_size for case in rows} == {2, 4, 8}
