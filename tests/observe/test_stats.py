"""Figures of a group: every call is counted, and the rank that was waited for is the straggler."""

from __future__ import annotations

import dataclasses
import time

import pytest
import torch

import commfuse
from commfuse import config
from commfuse.call import bind
from commfuse.groups import Group
from commfuse.observe.calls import ended
from commfuse.observe.statistics import record_of
from commfuse.operators import OPERATORS
from tests.conftest import RunRanks

from .calls import BARRIER, LATE_S, barriers_with_a_late_rank, right_and_wrong

DISPATCH, COMBINE = "npu_moe_distribute_dispatch_v2", "npu_moe_distribute_combine_v2"
BACKENDS = pytest.mark.parametrize("backend", ["cpu", "portable", "reference"])


@BACKENDS
@pytest.mark.parametrize("late", [0, 2])
def test_the_late_rank_is_the_straggler_of_all_others(run_ranks: RunRanks, backend: str, late: int) -> None:
    found = run_ranks(3, barriers_with_a_late_rank, backend, late)
    for rank, stats in enumerate(found):
        assert (stats.rank, stats.size, stats.backend, len(stats.waited_us)) == (rank, 3, backend, 3)
        assert stats.waited_us[rank] == 0
        if rank == late:
            continue
        assert stats.straggler == late
        assert stats.waited_us[late] > 0.5e6 * LATE_S
        assert stats.operators[BARRIER].time_us > 0.5e6 * LATE_S


@BACKENDS
def test_calls_are_counted_and_refused_ones_too(run_ranks: RunRanks, backend: str) -> None:
    for stats in run_ranks(2, right_and_wrong, backend):
        assert {name: (row.calls, row.errors) for name, row in stats.operators.items()} == {DISPATCH: (3, 1), COMBINE: (2, 0)}
        assert all(row.time_us > 0 for row in stats.operators.values())


def unknown(rank: int) -> str:
    try:
        commfuse.stats("nowhere")
    except commfuse.GroupError as error:
        return str(error)
    return ""


def test_a_group_that_is_not_there(run_ranks: RunRanks) -> None:
    assert "no group named 'nowhere'" in run_ranks(1, unknown)[0]


def example(**changes: object) -> commfuse.Stats:
    row = commfuse.OperatorStats(calls=4, errors=1, time_us=2000.0)
    stats = commfuse.Stats(group="0", rank=1, size=3, backend="cpu", operators={DISPATCH: row}, waited_us=(12.0, 0.0, 3456.7))
    return dataclasses.replace(stats, **changes)


def test_the_table_names_operators_and_the_straggler() -> None:
    lines = [line.split() for line in str(example()).splitlines()]
    assert lines[0] == ["group", "'0'", "on", "cpu,", "rank", "1", "of", "3"]
    assert [DISPATCH, "4", "1", "2,000.0", "500.0"] in lines
    assert lines[-3:] == [["0", "12.0"], ["1", "0.0", "this", "process"], ["2", "3,456.7", "longest"]]


def test_nobody_is_a_straggler_before_anybody_was_waited_for() -> None:
    assert example(waited_us=(0.0, 0.0, 0.0)).straggler is None
    assert "longest" not in str(example(waited_us=(0.0,), size=1, rank=0))


def test_figures_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        example().calls = 3  # type: ignore[attr-defined]


def test_noting_a_call_makes_no_work_while_the_log_is_off() -> None:
    """A bound of 10 us, of which it needs well under one, so that a busy machine does not matter."""
    group = Group(name="cheap", size=2, rank=0, members=(0, 1), process_group=lambda: None)  # type: ignore[arg-type]
    args = {row.name: getattr(row, "default", None) for row in OPERATORS[BARRIER].args}
    call = bind(OPERATORS[BARRIER], {**args, "x_ref": torch.zeros(1), "group": "0", "world_size": 2}, group, lambda _: group)
    with config.override(log="off"):
        begin = time.perf_counter_ns()
        for _ in range(1000):
            ended(call, begin)
        each_us = (time.perf_counter_ns() - begin) / 1e6
    assert record_of(group).tallies[BARRIER].calls == 1000
    assert each_us < 10
