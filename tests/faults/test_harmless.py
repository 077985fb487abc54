"""Calls that would harm a process that trusted them: altered tensors, no memory, two threads, forked children."""

from __future__ import annotations

import gc
import os
import resource
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import commfuse
from commfuse import config
from tests.backends.cpu import layer, matmul

from .bodies import error_of, run, world
from .rank import Notes
from .work import ROUNDS, v2


def barrier() -> None:
    commfuse._npu_distribute_barrier(torch.ones(1), world(), dist.get_world_size())


both = pytest.mark.parametrize("backend", ["cpu", "portable"])


def altered(rank: int, world_size: int, notes: Notes) -> None:
    """What combine gets is altered on rank 1, each time in another way; a right round trip follows each."""
    found = {}
    for name, change in ALTERED.items():
        out = list(layer.dispatch(rank, 2))
        if rank == 1:
            change(out)
        error = error_of(lambda out=out: layer.combine(rank, 2, out, out[0]))  # type: ignore[misc]
        found[name] = {"error": error, "right": v2(rank, 2, 3)}
    notes.write("found", found)


def _far_row(out: list[Any]) -> None:
    out[2][2] = 2**31 - 1


def _other_rank(out: list[Any]) -> None:
    out[2][0] = 1 - out[2][0]


def _negative(out: list[Any]) -> None:
    out[2][:3] = -(2**31)


def _truncated(out: list[Any]) -> None:
    out[2] = out[2][:5]


def _of_another_call(out: list[Any]) -> None:
    out[2] = out[2].roll(3)


def _counts_too_large(out: list[Any]) -> None:
    out[4][:] = 2**31 - 1


def _counts_falling(out: list[Any]) -> None:
    out[4][0] = out[4][-1] + 1


def _counts_negative(out: list[Any]) -> None:
    out[4][0] = -1


def _counts_truncated(out: list[Any]) -> None:
    out[4] = out[4][:1]


ALTERED: dict[str, Callable[[list[Any]], None]] = {
    function.__name__.strip("_"): function
    for function in (
        _far_row,
        _other_rank,
        _negative,
        _truncated,
        _of_another_call,
        _counts_too_large,
        _counts_falling,
        _counts_negative,
        _counts_truncated,
    )
}


@both
def test_altered_opaque_tensors_are_errors_and_the_group_stays_usable(tmp_path: Path, backend: str) -> None:
    notes = run(tmp_path, 2, altered, backend=backend)
    for name in ALTERED:
        for one in notes:
            assert one["found"][name]["error"].get("error") == "ArgumentError", (name, one["found"][name])
            assert one["found"][name]["right"]


def from_another_backend(rank: int, world_size: int, notes: Notes) -> None:
    """Dispatch on one backend and combine on the other: what lies between is the same everywhere."""
    out = layer.dispatch(rank, 2, 5)
    with config.override(backend="portable" if config.get("backend") == "cpu" else "cpu"):
        x = layer.combine(rank, 2, out, out[0] * 2, 5)
    notes.write("right", torch.equal(x, layer.expected(rank, seed=5)) and v2(rank, 2, 6))


@both
def test_what_one_backend_dispatched_another_can_combine(tmp_path: Path, backend: str) -> None:
    assert [one["right"] for one in run(tmp_path, 2, from_another_backend, backend=backend)] == [True, True]


def beyond_the_window(rank: int, world_size: int, notes: Notes) -> None:
    """Rank 1 alone may not take more memory than a little (the setting is read when a process makes its window)."""
    with config.override(window_max="1M" if rank == 1 else "0"):
        assert v2(rank, 2, 0)
    big = matmul.everyones_args("npu_all_gather_base_mm", 2, 0)[rank]
    big["self"] = torch.ones(200_000, 64).bfloat16()
    error = error_of(lambda: matmul.call("npu_all_gather_base_mm", big))
    notes.write("found", {"error": error, "right": v2(rank, 2, 3)})


def test_what_does_not_fit_the_window_is_refused_on_all_ranks(tmp_path: Path) -> None:
    found = [notes["found"] for notes in run(tmp_path, 2, beyond_the_window)]
    assert found[0]["error"]["text"] == found[1]["error"]["text"]
    for one in found:
        assert one["error"]["error"] == "ArgumentError"
        assert "refused on rank 1 of 2" in one["error"]["text"]
        assert one["right"]


def out_of_memory(rank: int, world_size: int, notes: Notes) -> None:
    """Files of rank 1, which windows are, may not grow any more."""
    assert v2(rank, 2, 0)
    big = matmul.everyones_args("npu_all_gather_base_mm", 2, 0)[rank]
    big["self"] = torch.ones(200_000, 64).bfloat16()
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, most))
    error = error_of(lambda: matmul.call("npu_all_gather_base_mm", big))
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    notes.write("found", {"error": error, "right": v2(rank, 2, 3)})


def test_short_of_memory_is_an_error_on_all_ranks_and_no_signal(tmp_path: Path) -> None:
    found = [notes["found"] for notes in run(tmp_path, 2, out_of_memory)]
    assert found[0]["error"]["text"] == found[1]["error"]["text"]
    for one in found:
        assert one["error"]["error"] == "ArgumentError"
        assert "refused on rank 1 of 2" in one["error"]["text"]
        assert one["right"]


def two_threads(rank: int, world_size: int, notes: Notes) -> None:
    """While one thread of rank 0 waits for rank 1 in a call, another one calls."""
    assert v2(rank, 2, 0)
    if rank == 1:
        notes.await_all("refused", [0])
        barrier()
    else:
        waiter = threading.Thread(target=barrier)
        waiter.start()
        error: dict[str, Any] = {}
        while not error:  # until the other thread is in its call
            if waiter_is_in_call():
                error = error_of(barrier)
        notes.write("refused", error)
        waiter.join()
    notes.write("right", v2(rank, 2, 3))


def waiter_is_in_call() -> bool:
    from commfuse import groups
    from commfuse.backends.cpu import domain

    return bool(domain.of(groups.resolve(world())).turns.is_shut)


def test_a_second_thread_is_refused_by_name(tmp_path: Path) -> None:
    notes = run(tmp_path, 2, two_threads)
    assert notes[0]["refused"]["error"] == "GroupError"
    assert "another thread is in a call of group '0'; one at a time" in notes[0]["refused"]["text"]
    assert [one["right"] for one in notes] == [True, True]


def forked_child(rank: int, world_size: int, notes: Notes) -> None:
    """A child of rank 0 uses the group that it has inherited, drops all it has and ends; the parent goes on."""
    out = layer.dispatch(rank, 2)
    if rank == 0:
        child = os.fork()
        if child == 0:
            notes.write(
                "child", [error_of(barrier), error_of(lambda: layer.dispatch(rank, 2)), error_of(lambda: commfuse.reset(world()))]
            )
            del out
            gc.collect()
            os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    notes.write("right", [ROUNDS[family](rank, 2, 3) for family in ROUNDS])


def test_a_forked_child_is_refused_and_harms_nothing(tmp_path: Path) -> None:
    notes = run(tmp_path, 2, forked_child)
    for error in notes[0]["child"]:
        assert error["error"] == "GroupError"
        assert "was joined before this process was forked; make a new one" in error["text"]
    assert all(all(one["right"]) for one in notes)
