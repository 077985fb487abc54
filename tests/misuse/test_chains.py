"""What is wrong with operators that stand in a chain is read where it can be, and the chain goes on from there."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from commfuse.operators import OPERATORS
from commfuse.spec.model import Tensor

from . import companions, split
from .case import Misuse, Outcome
from .chains import COMBINE, DISPATCH, NORM, SPLIT
from .test_misuse import UNREACHABLE, is_of

Outcomes = dict[str, list[Outcome]]
CATALOGUE = [*((operator, "split") for operator in SPLIT), *((operator, "companions") for operator in (DISPATCH, COMBINE, NORM))]


def check(case: Misuse, found: list[Outcome]) -> None:
    """Assert that every process raised the same kind of error with the right text, and that the chain went on.

    A teardown speaks for its own rank; elsewhere the texts are one and the same.
    """
    text = found[0].text
    assert [one.error for one in found] == [case.error.__name__] * len(found), text
    if not case.operator.endswith("teardown"):
        domains = {one.domain if case.own_domain else "" for one in found}
        assert len({(one.domain if case.own_domain else "", one.text) for one in found}) == len(domains)
    for rank, one in enumerate(found):
        missing = [fragment for fragment in (case.operator, *case.says) if fragment not in one.text]
        assert not missing, f"{missing} not in:\n{one.text}"
        assert not case.operator.endswith("teardown") or f"on rank {rank} of " in one.text or len(found) == 1
    assert [one.afterwards for one in found] == [""] * len(found)


@pytest.mark.parametrize("case", split.CASES, ids=lambda case: case.id)
def test_split(outcomes: Callable[[str], Outcomes], case: Misuse) -> None:
    check(case, outcomes("split")[case.id])


@pytest.mark.parametrize("case", companions.CASES, ids=lambda case: case.id)
def test_companions(outcomes: Callable[[str], Outcomes], case: Misuse) -> None:
    check(case, outcomes("companions")[case.id])


def lines_of(outcomes: Outcomes, operator: str) -> list[str]:
    texts = [one.text for found in outcomes.values() for one in found if one.text.startswith(f"{operator}:")]
    return [line.strip() for text in texts for line in text.splitlines()]


@pytest.mark.parametrize(("operator", "module"), CATALOGUE)
def test_every_rule_has_a_case(outcomes: Callable[[str], Outcomes], operator: str, module: str) -> None:
    lines = lines_of(outcomes(module), operator)
    rules = [rule for rule in OPERATORS[operator].rules if (rule.subject, rule.must) not in UNREACHABLE]
    missing = [(rule.subject, rule.must, rule.when) for rule in rules if not any(is_of(rule, line) for line in lines)]
    assert not missing


@pytest.mark.parametrize(("operator", "module"), CATALOGUE)
def test_every_argument_has_cases(outcomes: Callable[[str], Outcomes], operator: str, module: str) -> None:
    lines = lines_of(outcomes(module), operator)
    wanted: list[str] = []
    for row in OPERATORS[operator].args:
        if row.name != OPERATORS[operator].group:
            wanted += patterns(row)
    assert not [pattern for pattern in wanted if not any(re.match(pattern, line) for line in lines)]


def patterns(row: Any) -> list[str]:
    if not isinstance(row, Tensor):
        return [rf"{row.name} = .*: must be .*, got "]
    found = [rf"{row.name} = .*: must be a tensor( or None)?, got "]
    if row.when == "False":
        return found  # no tensor is accepted, whatever its shape
    found += [rf"{row.name}\.dtype = .*: must be ", rf"{row.name}\.shape = .*: must be .*[123]-D"]
    return found if row.optional else [*found, rf"{row.name} = None: must be a tensor"]


def test_ids_are_unique_and_many() -> None:
    for module in (split, companions):
        names = [case.id for case in module.CASES]
        assert len(names) == len(set(names)) >= 50
