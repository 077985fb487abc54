"""Ranks that change, from call to call, who takes part and on which backend, some wrongly: all go on together, with right results."""

from __future__ import annotations

import faulthandler

import pytest

from commfuse import config
from tests.conftest import RunRanks

from . import switching
from .cpu import core  # noqa: F401 - skips where the core is not built

STEPS, LIMIT = 60, 60.0


def walk(rank: int, seed: int) -> None:
    """Take the steps of one sequence; the first that is not as it must be raises, which ends these ranks."""
    with config.override(timeout=10.0, first_timeout=10.0):
        for number, step in enumerate(switching.sequence(seed, STEPS)):
            found = switching.take(rank, step, number)
            assert not found, f"sequence {seed}, step {number}, {step}: {found}"


def watched(rank: int, seed: int) -> None:
    faulthandler.dump_traceback_later(LIMIT - 10)
    try:
        walk(rank, seed)
    finally:
        faulthandler.cancel_dump_traceback_later()


@pytest.mark.parametrize("seed", range(4))
def test_sequences(run_ranks: RunRanks, seed: int) -> None:
    run_ranks(switching.WORLD, watched, seed, deadline=LIMIT)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(100, 140))
def test_more_sequences(run_ranks: RunRanks, seed: int) -> None:
    run_ranks(switching.WORLD, watched, seed, deadline=LIMIT)


def wish_of_one(rank: int) -> list[tuple[str, str]]:
    """One rank wants another backend: in a first call of these ranks, in an order of theirs that is new, and where all are at home."""
    found = []
    with config.override(backend="cpu", timeout=10.0, first_timeout=10.0):
        assert switching.one_round(rank, (0, 1, 2, 3), 0)
        for ranks in ((0, 1, 3), (3, 1, 0), (0, 1, 2, 3)):
            if rank in ranks:
                with config.override(backend="portable" if rank == 1 else "cpu"):
                    found.append(switching.told(lambda ranks=ranks: switching.one_round(rank, ranks, 1)))
                assert switching.one_round(rank, ranks, 2)
    return found


@pytest.mark.usefixtures("no_ranks")  # fresh ones: what earlier tests have chosen for some of them would count
def test_a_rank_that_wants_another_backend_is_named_whoever_takes_part(run_ranks: RunRanks) -> None:
    for rank, found in enumerate(run_ranks(switching.WORLD, wish_of_one)):
        assert len(found) == (1 if rank == 2 else 3)
        for kind, text in found:
            assert kind == "MismatchError"
            assert "'choice of a backend for 'portable'' on rank 1 of 4" in text.replace('"', "'")


def orders_and_a_change(rank: int) -> list[tuple[str, str]]:
    """The ranks do not agree on their order in the first call of one backend; the next call goes back to the one before."""
    found = []
    with config.override(timeout=10.0, first_timeout=10.0):
        for backend in ("portable", "cpu", "portable", "reference", "cpu"):
            with config.override(backend=backend):
                found.append(switching.told(lambda: switching.one_round(rank, (0, 1, 2) if rank else (1, 0, 2), 1)))
        with config.override(backend="cpu"):
            assert switching.one_round(rank, (0, 1, 2), 2)
    return found


def test_ranks_that_disagree_on_their_order_change_backends_together(run_ranks: RunRanks) -> None:
    first, *others = run_ranks(3, orders_and_a_change)
    assert [kind for kind, _ in first] == ["MismatchError"] * 5
    assert all(other == first for other in others)
    assert all("ranks alive" in text for _, text in first)
