"""Ranks that do not make the same calls: one more, one less, one of another group, and one that refuses its own."""

from __future__ import annotations

import time
from pathlib import Path

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


def barrier() -> None:
    commfuse._npu_distribute_barrier(torch.ones(1), world(), dist.get_world_size())


both = pytest.mark.parametrize("backend", ["cpu", "portable"])


def once_more(rank: int, world_size: int, notes: Notes) -> None:
    """Rank 1 makes a barrier more than the others, and all go on with a dispatch."""
    calls = [barrier, barrier] if rank == 1 else [barrier, lambda: layer.dispatch(rank, 2)]
    notes.write("errors", [error_of(call) for call in calls])
    notes.write("right", v2(rank, 2, 3))


@both
def test_a_call_more_before_another_is_named(tmp_path: Path, backend: str) -> None:
    for notes in run(tmp_path, 2, once_more, backend=backend):
        first, second = notes["errors"]
        assert first == {}
        assert second["error"] == "MismatchError"
        assert f"'npu_moe_distribute_dispatch_v2' on rank 0 of 2; '{BARRIER}' on rank 1 of 2" in second["text"]
        assert notes["right"]


def once_more_and_exit(rank: int, world_size: int, notes: Notes) -> None:
    """Rank 1 makes a call more, and rank 0 ends its program."""
    barrier()
    if rank == 1:
        notes.write("error", error_of(barrier))


@both
def test_a_call_more_before_the_others_exit_is_named(tmp_path: Path, backend: str) -> None:
    error = run(tmp_path, 2, once_more_and_exit, backend=backend)[1]["error"]
    assert error["error"] == "ExchangeError"
    assert error["text"].startswith(BARRIER)
    assert "rank 0 (pid " in error["text"]


def once_less(rank: int, world_size: int, notes: Notes) -> None:
    """Rank 1 makes a barrier less than the others, and all go on with a dispatch; in the end all have made as many calls."""
    calls = [barrier, barrier, lambda: layer.dispatch(rank, 4)]
    if rank == 1:
        calls = [barrier, calls[2], calls[2]]
    notes.write("errors", [error_of(call) for call in calls])
    notes.write("right", v2(rank, 4, 3))


@both
def test_a_call_less_before_another_is_named(tmp_path: Path, backend: str) -> None:
    for notes in run(tmp_path, 4, once_less, backend=backend):
        first, second, third = notes["errors"]
        assert (first, third) == ({}, {})
        assert second["error"] == "MismatchError"
        assert f"'{BARRIER}' on ranks 0, 2, 3 of 4; 'npu_moe_distribute_dispatch_v2' on rank 1 of 4" in second["text"]
        assert notes["right"]


def once_less_and_exit(rank: int, world_size: int, notes: Notes) -> None:
    """Rank 1 makes a call less, and ends its program."""
    barrier()
    if rank != 1:
        notes.write("error", error_of(barrier))
        notes.await_all("error", [0, 2, 3])


@both
def test_a_call_less_and_exit_is_named(tmp_path: Path, backend: str) -> None:
    notes = run(tmp_path, 4, once_less_and_exit, backend=backend)
    for rank in (0, 2, 3):
        assert notes[rank]["error"]["error"] == "ExchangeError"
        assert notes[rank]["error"]["text"].startswith(BARRIER)
        assert "rank 1" in notes[rank]["error"]["text"]


def a_refusal(rank: int, world_size: int, notes: Notes) -> None:
    """Rank 1 alone has an id that is out of range."""
    ids = layer.inputs(rank)[1]
    ids[1, 0] = 99 if rank == 1 else ids[1, 0]
    barrier()
    begin = time.monotonic()
    error = error_of(lambda: layer.dispatch(rank, 4, expert_ids=ids))
    notes.write("found", {"error": error, "seconds": time.monotonic() - begin, "right": v2(rank, 4, 3)})


@both
def test_a_refusing_rank_ends_the_calls_of_the_others_at_once(tmp_path: Path, backend: str) -> None:
    found = [notes["found"] for notes in run(tmp_path, 4, a_refusal, backend=backend)]
    assert len({one["error"]["text"] for one in found}) == 1
    for one in found:
        assert one["error"]["error"] == "ArgumentError"
        assert "refused on rank 1 of 4" in one["error"]["text"]
        assert "expert_ids[1, 0] = 99" in one["error"]["text"]
        assert one["seconds"] < LIMIT / 4
        assert one["right"]


def another_group(rank: int, world_size: int, notes: Notes) -> None:
    """Two groups of the same ranks: rank 1 calls in the other one. Nobody comes to either call."""
    other = dist.new_group([0, 1])
    name = str(other.group_name) if rank == 1 else world()
    again = str(other.group_name)
    commfuse._npu_distribute_barrier(torch.ones(1), again, 2)
    with config.override(timeout=1.0):
        notes.write("error", {**error_of(lambda: commfuse._npu_distribute_barrier(torch.ones(1), name, 2)), "name": name})


@both
def test_a_rank_in_another_group_is_missed_at_the_deadline(tmp_path: Path, backend: str) -> None:
    for rank, notes in enumerate(run(tmp_path, 2, another_group, backend=backend)):
        error = notes["error"]
        assert error["error"] == "ExchangeError"
        assert f"group '{error['name']}'" in error["text"]
        assert f"rank {1 - rank}" in error["text"]
