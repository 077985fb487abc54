"""Altered opaque tensors give an ArgumentError or the right result; nothing crashes, hangs or is silently wrong."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.conftest import RunRanks

from .altered import TENSORS, Change, attempt

SEEDED = settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=40,
    phases=[Phase.explicit, Phase.generate],  # a case that fails takes seconds: as it was drawn will do
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)

INT32 = st.integers(-3, 9) | st.sampled_from([-(2**31), 2**31 - 1, 1 << 16]) | st.integers(-(2**31), 2**31 - 1)
NUMBERS = st.lists(st.tuples(st.integers(0, 40), st.booleans(), INT32), min_size=1, max_size=3).map(tuple)
LONGER = st.sampled_from([0, 0, 0, 1, -1, -5])
CALLS = [(half, name) for half, names in TENSORS.items() for name in names]


def hold(run_ranks: RunRanks, half: str, size: int, change: Change) -> None:
    for rank, answer in enumerate(run_ranks(size, attempt, half, size, change, deadline=40)):
        assert answer.error in ("", "ArgumentError"), f"rank {rank}: {answer.text}"
        assert answer.error or answer.right, f"rank {rank}: a wrong result"
        assert answer.right_afterwards, f"rank {rank}: the right call failed then"


@pytest.mark.parametrize(("half", "name"), CALLS)
@pytest.mark.parametrize("size", [1, 2])
def test_altered_numbers(run_ranks: RunRanks, half: str, name: str, size: int) -> None:
    @SEEDED
    @given(NUMBERS, LONGER, st.sampled_from([(0,), (size - 1,), tuple(range(size))]))
    def altered(numbers: tuple[tuple[int, bool, int], ...], longer: int, who: tuple[int, ...]) -> None:
        hold(run_ranks, half, size, Change(name=name, who=who, numbers=numbers, longer=longer))

    altered()


@pytest.mark.parametrize(("half", "name"), CALLS)
def test_the_alterations_are_noticed_at_all(run_ranks: RunRanks, half: str, name: str) -> None:
    """The first number is used by every call: one more is refused on the rank that was given it, in words about that tensor."""
    answers = run_ranks(2, attempt, half, 2, Change(name=name, who=(1,), numbers=((0, True, 1),)))
    assert answers[1].error == "ArgumentError"
    assert name in answers[1].text


@pytest.mark.parametrize(("half", "name"), CALLS)
def test_a_change_that_changes_nothing_is_right(run_ranks: RunRanks, half: str, name: str) -> None:
    for answer in run_ranks(2, attempt, half, 2, Change(name=name, who=(0, 1), numbers=((0, True, 0),))):
        assert (answer.error, answer.right, answer.right_afterwards) == ("", True, True)
