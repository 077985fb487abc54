"""The cpu backend against the golden: every case and random ones, bit for bit in the valid region."""

from __future__ import annotations

from typing import Any

import pytest

from commfuse.checking import FAMILIES, Family
from commfuse.checking.companions import COMPANIONS
from commfuse.operators.moe_distribute.cases import RoundTrip
from tests.backends.test_parity import check_all
from tests.conftest import RunRanks

from . import core  # noqa: F401 - skips where the core is not built

FAMILY = FAMILIES["moe_distribute"]
SIZES = sorted({FAMILY.world_size(case) for case in FAMILY.named_cases()})
OTHERS = [family for family in FAMILIES.values() if family is not FAMILY]


@pytest.mark.parametrize("size", SIZES)
def test_named_round_trips(run_ranks: RunRanks, size: int) -> None:
    cases = [case for case in FAMILY.named_cases() if FAMILY.world_size(case) == size]
    check_all(run_ranks, FAMILY, cases, "cpu")


@pytest.mark.parametrize("first", range(5000, 5100, 25))
def test_random_round_trips(run_ranks: RunRanks, first: int) -> None:
    check_all(run_ranks, FAMILY, [FAMILY.random_case(seed) for seed in range(first, first + 25)], "cpu")


def test_what_a_soak_has_found(run_ranks: RunRanks) -> None:
    """Rows so small that a block's scale is a denormal: the quotient goes beyond 127, and down to -128."""
    check_all(run_ranks, FAMILY, [FAMILY.random_case(266664662)], "cpu")


def test_sixteen_ranks(run_ranks: RunRanks) -> None:
    common: dict[str, Any] = {"world_size": 16, "num_tokens": (6,) * 16, "moe_expert_num": 32, "top_k": 8}
    cases = [RoundTrip(id="sixteen", **common), RoundTrip(id="sixteen-int8", quant_mode=2, smooth=True, seed=1, **common)]
    check_all(run_ranks, FAMILY, cases, "cpu")


@pytest.mark.parametrize("family", OTHERS, ids=lambda family: family.name)
def test_random_cases_of_other_families(run_ranks: RunRanks, family: Family) -> None:
    check_all(run_ranks, family, [family.random_case(seed) for seed in range(40)], "cpu")


@pytest.mark.parametrize("family", COMPANIONS, ids=lambda family: family.name)
def test_named_cases_of_companions(run_ranks: RunRanks, family: Family) -> None:
    cases = family.named_cases()
    assert len(cases) >= 25
    check_all(run_ranks, family, cases, "cpu")
