"""The windows' protocol in every order of its steps, and rules left out, whose absence must be found."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from model.explore import explore
from model.scenarios import SCENARIOS

PAGE = Path(__file__).parents[2] / "docs" / "protocol.md"
LONG = ("two deaths, 4 ranks",)
ALL = [pytest.param(name, marks=pytest.mark.long if name in LONG else ()) for name in SCENARIOS]


@pytest.mark.parametrize("name", ALL)
def test_it_holds(name: str) -> None:
    found = SCENARIOS[name].search()
    assert not found.violation, "\n".join([found.violation, *found.trace])
    row = re.search(rf"\| {re.escape(name)} \|.*\| ([\d,]+) \|", PAGE.read_text())
    assert row, f"docs/protocol.md lacks {name}"
    assert int(row[1].replace(",", "")) == found.num_states, f"docs/protocol.md: {name} has {found.num_states:,} states"


@pytest.mark.parametrize(
    ("name", "rule", "words"),
    [
        ("setups, 2 ranks", "reclaim without CONSUMED", "writes to what rank 1 may still read"),
        ("one-way senders, 3 ranks", "reclaim without CONSUMED", "writes to what rank"),
        ("lent tensor, 2 ranks", "reclaim without CONSUMED", "writes to what rank 1 may still read"),
        ("exchanges, 2 ranks", "no CONSUMED wait", "finds the header of call 2"),
        ("one-way sender, 2 ranks", "no CONSUMED wait", "finds the header of call 3"),
        ("one-way senders, 3 ranks", "no CONSUMED wait", "finds the header of call 3"),
        ("lent tensor, 2 ranks", "changed loans pass", "was read, and nobody was told"),
        ("lent tensor, 3 ranks", "loans end with the call", "writes to what rank"),
        ("going on, 3 ranks", "the epoch stays", "has not found together"),
        ("going on, 3 ranks", "calls go on from one's own", "would go back"),
        ("two deaths, 3 ranks", "nobody is waited for", "would go back"),
        pytest.param("two deaths, 4 ranks", "deaths are seen last", "has not found together", marks=pytest.mark.long),
    ],
)
def test_a_rule_that_is_left_out_is_missed(name: str, rule: str, words: str) -> None:
    found = SCENARIOS[name].search(rule)
    assert words in found.violation
    assert found.trace


def test_setups_need_a_header_more_than_are_in_flight() -> None:
    """After a restart the first publication waits for nobody: the places of those in flight must not be all there are."""
    found = replace(SCENARIOS["going on from setups, 3 ranks"], depth=2).search()
    assert "its header's place is not free" in found.violation


def test_the_search_itself() -> None:
    """On a machine small enough to count: two counters up to 3, of which the first may not pass the second by two."""

    def steps(state: tuple[int, int]) -> list[tuple[str, tuple[int, int]]]:
        first, second = state
        return [("first", (first + 1, second))] * (first < 3) + [("second", (first, second + 1))] * (second < 3)

    found = explore((0, 0), steps, lambda state: "")
    assert (found.num_states, found.num_ends, found.violation) == (16, 1, "")
    stuck = explore((0, 0), steps, lambda state: f"stuck at {state}")
    assert stuck.violation == "stuck at (3, 3)"
    assert sorted(stuck.trace) == ["first"] * 3 + ["second"] * 3
