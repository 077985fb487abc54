"""``commfuse check --soak``: random cases of every family on the same ranks; wrong results and growing memory are told."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest

from commfuse.checking import FAMILIES
from commfuse.cli import soak
from commfuse.cli.soak import Memory, Sample, growth
from commfuse.operators.all_gather_mm import reference

from .commands import here

MIB = 1 << 20


def test_twenty_seconds_of_everything(capsys: pytest.CaptureFixture[str]) -> None:
    outcome = here(capsys, "check", "--soak", "20", "--seed", "11", "--json")
    found = json.loads(outcome.out)
    assert outcome.code == 0, outcome
    assert (found["passed"], found["problems"], found["grown"], found["seed"]) == (True, [], [], 11)
    assert (found["backends"], found["ranks"]) == (["cpu"], 4)
    operators = [operator for family in FAMILIES.values() for operator in family.operators]
    assert [row["operator"] for row in found["operators"]] == operators
    assert all(row["cases"] >= 5 and row["outputs"] for row in found["operators"])
    assert all(rank["window"] > 0 for sample in found["memory"][1:] for rank in sample)
    assert found["seconds"] >= 20


def test_a_wrong_result_fails(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    right = reference.distribute_barrier

    def off(*args: Any, **options: Any) -> Any:
        results = right(*args, **options)
        results[0][0][0].add_(1)
        return results

    monkeypatch.setattr(reference, "distribute_barrier", off)
    outcome = here(capsys, "check", "--soak", "1", "--ranks", "2", "--operator", "_npu_distribute_barrier", "--seed", "3")
    assert outcome.code == 1
    assert "2 processes, seed 3" in outcome.out
    assert "values differ; the first at" in " ".join(outcome.out.split())


def sample(warm: bool, *ranks: tuple[int, int]) -> Sample:
    """Resident and window MiB of each rank."""
    return Sample(warm=warm, ranks=tuple(Memory(resident=a * MIB, window=b * MIB) for a, b in ranks))


@pytest.mark.parametrize(
    ("samples", "found"),
    [
        ([sample(False, (200, 4), (200, 4)), sample(True, (210, 5), (200, 3))], []),
        ([sample(False, (200, 4), (200, 9)), sample(False, (150, 1), (190, 1)), sample(True, (200, 4), (200, 9))], []),
        (
            [sample(False, (200, 4), (200, 4)), sample(True, (200, 4), (200, 4)), sample(True, (200, 4), (260, 4))],
            ["rank 1: the process grew from 200.0 MiB to 260.0 MiB after the warm-up"],
        ),
        (
            [sample(False, (200, 4)), sample(True, (200, 8))],
            ["rank 0: the window grew from 4.0 MiB to 8.0 MiB after the warm-up"],
        ),
        ([sample(True, (200, 4))], ["the time was too short to see whether the memory stays flat"]),
        ([], ["the time was too short to see whether the memory stays flat"]),
    ],
)
def test_growth_is_what_is_above_the_warm_up(samples: Sequence[Sample], found: list[str]) -> None:
    assert growth(samples) == found


def test_the_memory_of_a_process_is_what_it_holds() -> None:
    before = soak.memory(0)
    block = bytearray(64 * MIB)
    block[::4096] = b"x" * len(block[::4096])
    assert soak.memory(0).resident - before.resident >= 60 * MIB
    assert len(block) == 64 * MIB


@pytest.mark.parametrize("options", [["--case", "one-rank"], ["--random", "3"], ["--list"], ["--ranks", "2", "4"]])
def test_what_does_not_go_with_it(capsys: pytest.CaptureFixture[str], options: list[str]) -> None:
    outcome = here(capsys, "check", "--soak", "1", *options)
    assert outcome.code == 2
    assert outcome.err.startswith("commfuse check: --soak takes random cases of its own, on one number of processes")
