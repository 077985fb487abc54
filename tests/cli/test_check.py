"""``commfuse check``: right and wrong backends, what is chosen to run, what is printed."""

from __future__ import annotations

import json
from typing import Any

import pytest

from commfuse import config
from commfuse.checking import FAMILIES
from commfuse.checking.moe_distribute import COMBINE, DISPATCH
from commfuse.operators.moe_distribute import reference
from commfuse.operators.moe_distribute.cases import random_case

from .commands import here


def test_one_named_case(capsys: pytest.CaptureFixture[str]) -> None:
    outcome = here(capsys, "check", "--case", "two-ranks", "--backend", "portable", "--json")
    found = json.loads(outcome.out)
    assert outcome.code == 0, outcome
    assert (found["passed"], found["problems"], found["backends"]) == (True, [], ["portable"])
    assert found["operators"] == [
        {"operator": DISPATCH, "cases": 1, "outputs": 14, "failed": []},
        {"operator": COMBINE, "cases": 1, "outputs": 2, "failed": []},
    ]


def test_random_cases_on_wanted_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    family = FAMILIES["moe_distribute"]
    named = [case for case in family.named_cases() if family.world_size(case) == 1]
    outcome = here(
        capsys,
        "check",
        "--ranks",
        "1",
        "--random",
        "3",
        "--seed",
        "5",
        "--backend",
        "reference",
        "--operator",
        DISPATCH,
        "--json",
    )
    found = json.loads(outcome.out)
    assert outcome.code == 0, outcome
    assert found["backends"] == ["reference"]
    assert found["operators"] == [{"operator": DISPATCH, "cases": len(named) + 3, "outputs": 7 * (len(named) + 3), "failed": []}]


def test_a_random_case_again(capsys: pytest.CaptureFixture[str]) -> None:
    seed = next(seed for seed in range(100) if random_case(seed).world_size == 2 and random_case(seed).tp_world_size < 2)
    found = json.loads(here(capsys, "check", "--case", f"random-{seed}", "--json").out)
    assert [(row["operator"], row["cases"], row["failed"]) for row in found["operators"]] == [(DISPATCH, 1, []), (COMBINE, 1, [])]


def test_a_table_without_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    outcome = here(capsys, "check", "--case", "one-rank", "norm-one-rank")
    assert (outcome.code, outcome.err) == (0, "")
    assert f"{COMBINE.removesuffix('_v2')}_add_rms_norm  " in outcome.out  # the longest name as a whole
    assert "\x1b" not in outcome.out
    rows = {
        words[0]: words[1:] for words in map(str.split, outcome.out.splitlines()) if words and words[0] in (DISPATCH, COMBINE)
    }
    assert rows == {DISPATCH: ["1", "7", "0"], COMBINE: ["1", "1", "0"]}
    assert outcome.out.splitlines()[-1].startswith("passed after ")


@pytest.fixture
def wrong_golden(monkeypatch: pytest.MonkeyPatch) -> None:
    """The golden of combine is off by one in its first number."""
    right = reference.combine_v2

    def off(*args: Any, **options: Any) -> Any:
        results = right(*args, **options)
        x, _ = results[0][0]
        assert x is not None
        x[0, 0] += 1
        return results

    monkeypatch.setattr(reference, "combine_v2", off)


@pytest.mark.usefixtures("wrong_golden")
def test_a_difference_fails_its_operator_alone(capsys: pytest.CaptureFixture[str]) -> None:
    outcome = here(capsys, "check", "--case", "two-ranks", "one-rank")
    assert outcome.code == 1
    assert "FAILED after" in outcome.out
    assert "values differ; the first at (0, 0)" in " ".join(outcome.out.split())
    assert here(capsys, "check", "--case", "two-ranks", "--operator", DISPATCH).code == 0
    found = json.loads(here(capsys, "check", "--case", "two-ranks", "--json").out)
    assert [row["failed"] for row in found["operators"]] == [[], ["two-ranks"]]
    assert [problem["case"] for problem in found["problems"]] == ["two-ranks"]


def test_a_backend_that_does_not_exist_on_the_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    with config.override(backend="none-such"):
        outcome = here(capsys, "check", "--case", "two-ranks", "one-rank")
    assert outcome.code == 1
    assert "no backend against" in outcome.out
    words = " ".join(outcome.out.split())
    assert words.count("no backend can run its calls on all 2 ranks") == 1
    assert "rank 1, none-such: there is no such backend" in words
    assert "Traceback" not in outcome.out + outcome.err


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    outcome = here(capsys, "check", "--list", "--ranks", "1")
    assert outcome.code == 0
    assert "moe_distribute   1  one-rank" in outcome.out.splitlines()
    everything = json.loads(here(capsys, "check", "--list", "--json").out)["cases"]
    assert len(everything) == sum(len(family.named_cases()) for family in FAMILIES.values())


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--case", "no-such"], "no case is named no-such among those asked for; `commfuse check --list` names them"),
        (
            ["--case", "one-rank", "--ranks", "2"],
            "no case is named one-rank among those asked for; `commfuse check --list` names them",
        ),
        (["--ranks", "13", "--random", "1"], "no case is left to run"),
        (["--operator", "npu_nothing"], "argument --operator: invalid choice: 'npu_nothing'"),
    ],
)
def test_nothing_to_do(capsys: pytest.CaptureFixture[str], options: list[str], sentence: str) -> None:
    outcome = here(capsys, "check", *options)
    assert outcome.code == 2
    assert outcome.err.startswith(f"commfuse check: {sentence}")
    assert outcome.err.count("\n") == 1
