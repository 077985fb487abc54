"""Every backend against the golden: OPERATORS x cases x BACKENDS, bit for bit in every valid region."""

from __future__ import annotations

import pickle
from collections import defaultdict
from typing import Any

import pytest

from commfuse.compare import difference
from commfuse.operators.moe_distribute.cases import NAMED, RoundTrip, random_case
from tests.conftest import RunRanks
from tests.operators.moe_distribute import round_trips

OUTPUTS = (
    "expand_x",
    "dynamic_scales",
    "assist_info_for_combine",
    "expert_token_nums",
    "ep_recv_counts",
    "tp_recv_counts",
    "expand_scales",
)


def processes(case: RoundTrip) -> int:
    return case.world_size * max(case.tp_world_size, 1)


def differences(case: RoundTrip, results: list[Any]) -> list[str]:
    """Every output of every rank that is not the golden's."""
    found = []
    for (tp, ep), expected in round_trips.golden(case).items():
        got = results[ep * max(case.tp_world_size, 1) + tp]
        pairs = [*zip(OUTPUTS, expected["dispatch"], got["dispatch"], strict=True)]
        pairs += [("combine x", expected["combine"][0], got["combine"])]
        for name, (tensor, valid), actual in pairs:
            found.append(difference(f"{case.id}, ep rank {ep}, tp rank {tp}, {name}", tensor, actual, valid))
    return [text for text in found if text]


def check(run_ranks: RunRanks, cases: list[RoundTrip], **settings: Any) -> None:
    by_size: dict[int, list[RoundTrip]] = defaultdict(list)
    for case in cases:
        by_size[processes(case)].append(case)
    wrong = []
    for size, group in by_size.items():
        results = [pickle.loads(r) for r in run_ranks(size, round_trips.on_ranks, group, settings, deadline=120)]
        for i, case in enumerate(group):
            wrong += differences(case, [result[i] for result in results])
    assert not wrong, "\n".join(wrong[:20])


@pytest.mark.parametrize("size", sorted({processes(case) for case in NAMED}))
@pytest.mark.parametrize("backend", ["portable", "reference"])
def test_named_cases(run_ranks: RunRanks, backend: str, size: int) -> None:
    cases = [case for case in NAMED if processes(case) == size]
    check(run_ranks, cases, backend=backend, poison=True)


@pytest.mark.parametrize("first", range(0, 300, 50))
def test_random_cases(run_ranks: RunRanks, first: int) -> None:
    check(run_ranks, [random_case(seed) for seed in range(first, first + 50)], backend="portable", poison=True)
