"""Every backend against the golden: FAMILIES x cases x BACKENDS, every output as promised in its valid region."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from commfuse.checking import FAMILIES, Family, check
from tests.conftest import RunRanks

SIZES = [
    (family, size) for family in FAMILIES.values() for size in sorted({family.world_size(case) for case in family.named_cases()})
]

AT_ONCE = 50
MORE = 1500  # with --long


def chunks() -> list[Any]:
    """Random cases of each family, some at once."""
    out = []
    for family in FAMILIES.values():
        for first in range(0, MORE, AT_ONCE):
            marks = pytest.mark.long if first else ()
            out.append(pytest.param(family, first, marks=marks, id=f"{family.name}-{first}"))
    return out


@pytest.fixture(autouse=True, scope="module")
def fresh_ranks(_pool: Any) -> None:
    """Ranks whose groups have not been on another backend: what is compared here is `portable` and `reference` alone."""
    _pool.close()


def check_all(run_ranks: RunRanks, family: Family, cases: Sequence[Any], backend: str) -> None:
    outcomes = list(check(run_ranks, family, cases, backend=backend))
    assert sorted(outcome.case for outcome in outcomes) == sorted(case.id for case in cases)
    wrong = [text for outcome in outcomes for text in outcome.problems]
    assert not wrong, "\n".join(wrong[:20])
    assert {outcome.backends for outcome in outcomes} == {(backend,)}


def named() -> list[Any]:
    """Backends, families and sizes; of the companions the random cases say most, and `cpu` is held against all named ones."""
    out = []
    for backend in ("portable", "reference"):
        for family, size in SIZES:
            seldom = family.name.startswith("moe_distribute_") and size > 2
            marks = pytest.mark.long if seldom else ()
            out.append(pytest.param(backend, family, size, marks=marks, id=f"{backend}-{family.name}-{size}"))
    return out


@pytest.mark.parametrize(("backend", "family", "size"), named())
def test_named_cases(run_ranks: RunRanks, backend: str, family: Family, size: int) -> None:
    cases = [case for case in family.named_cases() if family.world_size(case) == size]
    check_all(run_ranks, family, cases, backend)


@pytest.mark.parametrize(("family", "first"), chunks())
def test_random_cases(run_ranks: RunRanks, family: Family, first: int) -> None:
    check_all(run_ranks, family, [family.random_case(seed) for seed in range(first, first + AT_ONCE)], "portable")
