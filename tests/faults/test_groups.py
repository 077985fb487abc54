"""A group that does not fit on one rank: another one, one that is not there, or one of another size or rank."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import commfuse
from commfuse import config
from tests.backends.cpu import layer

from .bodies import LIMIT, error_of, run, world
from .rank import Notes
from .work import v2

BARRIER = "_npu_distribute_barrier"
both = pytest.mark.parametrize("backend", ["cpu", "portable"])


def barrier(group: str) -> None:
    commfuse._npu_distribute_barrier(torch.ones(1), group, 3)


def in_another_group(rank: int, world_size: int, notes: Notes) -> None:
    """Two groups of the same ranks: rank 1 calls in the other one, where rank 2, which comes late to the first, is awaited, too."""
    other = str(dist.new_group([0, 1, 2]).group_name)
    barrier(world())
    barrier(other)
    with config.override(timeout=1.5 if rank else 1.0):
        notes.write("found", {"other": other, **error_of(lambda: barrier(other if rank == 1 else world()))})


def test_where_else_a_rank_waits_is_told(tmp_path: Path) -> None:
    notes = [one["found"] for one in run(tmp_path, 3, in_another_group)]
    assert [one["error"] for one in notes] == ["ExchangeError"] * 3
    for rank in (0, 2):
        assert "rank 1 (pid " in notes[rank]["text"]
        assert f"; it has last been seen in group '{notes[0]['other']}', waiting for rank " in notes[rank]["text"]
        assert f" in {BARRIER}" in notes[rank]["text"]
    assert "; it has last been seen in group '0', waiting for rank 1 (pid " in notes[1]["text"]


def not_any_more(rank: int, world_size: int, notes: Notes) -> None:
    """Rank 1 waits in another group for a while, and then does not come to the first."""
    other = str(dist.new_group([0, 1]).group_name)
    error: dict[str, Any] = {}
    for group in (world(), other):
        commfuse._npu_distribute_barrier(torch.ones(1), group, 2)
    if rank == 0:
        end = time.perf_counter() + 0.3
        while time.perf_counter() < end:
            pass
    for _ in range(2):
        commfuse._npu_distribute_barrier(torch.ones(1), other, 2)
    if rank == 0:
        with config.override(timeout=0.5):
            error = error_of(lambda: commfuse._npu_distribute_barrier(torch.ones(1), world(), 2))
    notes.write("found", error)
    notes.await_all("found", [0])


def test_where_a_rank_waited_before_is_not_told(tmp_path: Path) -> None:
    text = run(tmp_path, 2, not_any_more)[0]["found"]["text"]
    assert "rank 1 (pid " in text
    assert "last been seen" not in text


def wrong_place(rank: int, world_size: int, notes: Notes) -> None:
    """Rank 1 believes the group to be larger, or itself to be another rank of it."""
    assert v2(rank, world_size, 0)
    found = []
    for wrong in ({"ep_world_size": 8}, {"ep_rank_id": 2}, {"ep_world_size": 2, "ep_rank_id": 0}):
        begin = time.monotonic()
        error = error_of(lambda wrong=wrong: layer.dispatch(rank, world_size, **(wrong if rank == 1 else {})))
        found.append({**error, "seconds": time.monotonic() - begin, "right": v2(rank, world_size, 1)})
    notes.write("found", found)


@both
def test_a_size_or_rank_that_does_not_fit_is_refused_on_all(tmp_path: Path, backend: str) -> None:
    notes = [one["found"] for one in run(tmp_path, 4, wrong_place, backend=backend)]
    for number, name in enumerate(("ep_world_size = 8", "ep_rank_id = 2", "ep_world_size = 2")):
        assert len({one[number]["text"] for one in notes}) == 1
        for one in notes:
            assert one[number]["error"] == "ArgumentError"
            assert "refused on rank 1 of 4" in one[number]["text"]
            assert name in one[number]["text"]
            assert one[number]["seconds"] < LIMIT / 4
            assert one[number]["right"]


def unknown(rank: int, world_size: int, notes: Notes) -> None:
    """Rank 1 names a group that is not there."""
    barrier(world())
    with config.override(timeout=1.0):
        notes.write("error", error_of(lambda: barrier("other" if rank == 1 else world())))
    notes.await_all("error", [0, 1, 2])


@both
def test_a_name_of_no_group_is_missed_at_the_deadline(tmp_path: Path, backend: str) -> None:
    errors = [one["error"] for one in run(tmp_path, 3, unknown, backend=backend)]
    assert errors[1]["error"] == "GroupError"
    assert "no group named 'other'" in errors[1]["text"]
    for error in (errors[0], errors[2]):
        assert error["error"] == "ExchangeError"
        assert "rank 1" in error["text"]
