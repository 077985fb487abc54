"""The judge itself: whatever a rank returns that it should not is found."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from commfuse import checking
from commfuse.checking import Expected, Outcome, RankRun, check
from commfuse.ranks import RankFailedError


@dataclass(frozen=True)
class Case:
    id: str = "a-case"
    size: int = 2


EXACT = torch.tensor([1.0, 2.0, torch.nan])
CLOSE = torch.tensor([100.0, 200.0, torch.nan])


class Pretend:
    """Two operators: one exact, one within a tolerance, both in their first two entries; rank 1 has no part."""

    name = "pretend"
    operators = ("exact", "close")

    def named_cases(self) -> Sequence[Case]:
        return [Case()]

    def random_case(self, seed: int) -> Case:
        return Case(f"random-{seed}")

    def world_size(self, case: Case) -> int:
        return case.size

    def run_on_rank(self, rank: int, case: Case) -> RankRun | None:
        raise NotImplementedError

    def expected(self, case: Case) -> dict[int, list[Expected]]:
        return {
            0: [
                Expected(operator="exact", name="y", tensor=EXACT, valid=2),
                Expected(operator="close", name="y", tensor=CLOSE, valid=2, bounds=(1e-4, 0.0)),
            ]
        }


@pytest.fixture(autouse=True)
def family(monkeypatch: pytest.MonkeyPatch) -> Pretend:
    made = Pretend()
    monkeypatch.setitem(checking.FAMILIES, made.name, made)
    return made


def judged(family: Pretend, *outputs: torch.Tensor | None) -> Outcome:
    return checking.judge(family, Case(), [RankRun(outputs=list(outputs), backend="b"), None])


def test_right_results_pass(family: Pretend) -> None:
    outcome = judged(family, torch.tensor([1.0, 2.0, 5.0]), torch.tensor([100.005, 199.99, 7.0]))
    assert (outcome.passed, outcome.problems, outcome.backends) == (True, [], ("b",))
    assert outcome.compared == {"exact": 1, "close": 1}


@pytest.mark.parametrize(
    ("exact", "close", "operator"),
    [
        (torch.tensor([1.0, 2.0000002, 0]), CLOSE, "exact"),
        (torch.tensor([1.0, 2.0]), CLOSE, "exact"),
        (EXACT.double(), CLOSE, "exact"),
        (None, CLOSE, "exact"),
        (EXACT, CLOSE * (1 + 2e-4), "close"),
        (EXACT, CLOSE.double(), "close"),
        (EXACT, CLOSE[:2], "close"),
        (EXACT, None, "close"),
    ],
)
def test_wrong_results(family: Pretend, exact: torch.Tensor | None, close: torch.Tensor | None, operator: str) -> None:
    outcome = judged(family, exact, close)
    assert [name for name in family.operators if not outcome.passed_for(name)] == [operator]
    assert not outcome.passed
    assert outcome.problems[0].startswith("a-case, pretend rank 0, y: ")


@pytest.mark.parametrize(
    ("by_rank", "words"),
    [
        ([None, None], "ranks [0] have a part in the case, ranks [] returned something"),
        (["boom", "boom"], "ranks 0, 1: boom"),
        (["boom", None], "rank 0: boom"),
    ],
)
def test_missing_results(family: Pretend, by_rank: list[Any], words: str) -> None:
    outcome = checking.judge(family, Case(), by_rank)
    assert outcome.problems == [words]
    assert not any(outcome.passed_for(name) for name in family.operators)


def test_too_few_outputs_is_our_mistake(family: Pretend) -> None:
    with pytest.raises(ValueError, match="zip"):
        judged(family, EXACT)


def test_ranks_that_die_fail_their_cases(family: Pretend) -> None:
    def run(world_size: int, function: Callable[..., Any], *args: Any, deadline: float) -> list[Any]:
        raise RankFailedError("rank 1: the process ended")

    outcomes = list(check(run, family, [Case("one"), Case("two", 3)]))
    assert [(outcome.case, outcome.passed) for outcome in outcomes] == [("one", False), ("two", False)]
    assert all("the process ended" in outcome.problems[0] for outcome in outcomes)
