"""The split path, the first version and combine with RMS norm against their goldens, bit for bit in every valid region."""

from __future__ import annotations

import pickle
from collections import defaultdict
from typing import Any

import pytest

from commfuse.compare import difference
from commfuse.operators.moe_distribute.cases import NAMED, RoundTrip, random_case
from tests.conftest import RunRanks
from tests.operators.moe_distribute import companions


def processes(case: RoundTrip) -> int:
    return case.world_size * max(case.tp_world_size, 1)


@pytest.fixture(autouse=True, scope="module")
def fresh_ranks(_pool: Any) -> None:
    """Ranks whose groups have not been on another backend: what is compared here is `portable` and `reference` alone."""
    _pool.close()


def check(run_ranks: RunRanks, flow: str, cases: list[RoundTrip], **settings: object) -> None:
    by_size: dict[int, list[RoundTrip]] = defaultdict(list)
    for case in cases:
        by_size[processes(case)].append(case)
    wrong = []
    for size, group in by_size.items():
        results = [pickle.loads(r) for r in run_ranks(size, companions.on_ranks, flow, group, settings, deadline=120)]
        for i, case in enumerate(group):
            for (tp, ep), expected in companions.golden(flow, case).items():
                got = results[ep * max(case.tp_world_size, 1) + tp][i]
                for n, ((tensor, valid), actual) in enumerate(zip(expected, got, strict=True)):
                    wrong.append(difference(f"{case.id}, ep rank {ep}, tp rank {tp}, output {n}", tensor, actual, valid))
    wrong = [text for text in wrong if text]
    assert not wrong, "\n".join(wrong[:20])


def fitting(flow: str, cases: list[RoundTrip]) -> list[RoundTrip]:
    return [case for case in cases if companions.fits(flow, case)]


@pytest.mark.parametrize("backend", ["portable", "reference"])
@pytest.mark.parametrize("flow", ["split", "v1", "norm"])
def test_named_cases(run_ranks: RunRanks, flow: str, backend: str) -> None:
    cases = fitting(flow, NAMED)
    assert len(cases) >= 25
    check(run_ranks, flow, cases, backend=backend, poison=True)


@pytest.mark.parametrize("flow", ["split", "v1", "norm"])
def test_random_cases(run_ranks: RunRanks, flow: str, request: pytest.FixtureRequest) -> None:
    number = 200 if request.config.getoption("--long") else 80
    cases = fitting(flow, [companions.adapted(flow, random_case(seed)) for seed in range(1000, 1000 + number)])
    assert len(cases) == number
    check(run_ranks, flow, cases, backend="portable", poison=True)
