"""Large outputs in the window: the same results, memory that is used again and not too early, and torch's memory where there is no room."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch

import commfuse
from commfuse import config
from commfuse.ranks import Ranks
from tests.conftest import RunRanks

from . import core  # noqa: F401 - skips where the core is not built
from .matmul import CASES, call, everyones_args, expected, is_right, same

OPERATORS = [name for name in CASES if "barrier" not in name]


@contextmanager
def everything_is_large(**more: Any) -> Iterator[None]:
    from commfuse.backends.cpu import outputs

    with config.override(backend="cpu", poison=True), mock.patch.multiple(outputs, LARGE=1, **more):
        yield


def in_window(tensor: torch.Tensor) -> bool:
    from commfuse import _core
    from commfuse.backends.cpu import slabs

    try:
        return bool(slabs.own().arena.offset_of(tensor.data_ptr(), tensor.nbytes))
    except _core.CoreError:
        return False


def held_and_dropped(rank: int, operator: str) -> tuple[bool, bool, bool]:
    """Whether outputs lie in the window, are right as long as anything holds them, and leave their memory to a later call."""
    ranks = everyones_args(operator, 2, 3)
    wanted = expected(operator, ranks, rank)
    with everything_is_large():
        held = [call(operator, ranks[rank]) for _ in range(12)]
        given = [tensor for tensor in held[0] if tensor is not None and tensor.numel()]
        there = bool(given) and all(map(in_window, given))
        rows = [[None if tensor is None else tensor[:] for tensor in outputs] for outputs in held]
        first = {tensor.data_ptr() for tensor in given}
        del held, given
        later = {tensor.data_ptr() for tensor in call(operator, ranks[rank]) if tensor is not None}
        right = all(same(outputs, wanted) for outputs in rows) and not later & first
        del rows
        again = [call(operator, ranks[rank]) for _ in range(24)]
        taken = {tensor.data_ptr() for outputs in again for tensor in outputs if tensor is not None}
    return there, right, bool(taken & (first | later))


@pytest.mark.parametrize("operator", OPERATORS)
def test_memory_of_large_outputs_is_used_again_once_nothing_holds_them(run_ranks: RunRanks, operator: str) -> None:
    assert run_ranks(2, held_and_dropped, operator) == [(True, True, True)] * 2


def without_room(rank: int, operator: str, kept: int | None) -> tuple[bool, bool]:
    """Whether outputs are right, and whether any lies in the window, when it may not grow for them: to half its limit, or to ``kept``."""
    from commfuse.backends.cpu import slabs

    ranks = everyones_args(operator, 2, 3)
    wanted = expected(operator, ranks, rank)
    arena = slabs.own().arena
    with everything_is_large(**({} if kept is None else {"KEPT": kept})):
        assert is_right(operator, rank, 2)  # what is staged has its room
        limit = arena.limit_bytes
        try:
            if kept is None:
                arena.limit_bytes = 2 * arena.allocated_bytes()
            found = [call(operator, ranks[rank]) for _ in range(20)]
        finally:
            arena.limit_bytes = limit
    last = [tensor for tensor in found[-1] if tensor is not None and tensor.numel()]
    return all(same(outputs, wanted) for outputs in found), any(map(in_window, last))


@pytest.mark.parametrize("kept", [None, 0])
def test_outputs_are_torchs_where_the_window_may_not_grow(kept: int | None) -> None:
    with Ranks(2) as ranks:  # fresh ones: there is no memory from earlier calls that could serve
        for operator in OPERATORS:
            assert ranks.run(without_room, operator, kept) == [(True, False)] * 2


def room_for_others(rank: int) -> bool:
    """Whether memory of outputs that are gone serves for other sizes when the window may not hold more."""
    from commfuse.backends.cpu import slabs

    arena = slabs.own().arena
    with everything_is_large():
        for operator in OPERATORS:
            assert is_right(operator, rank, 2)
        large = call("npu_all_gather_base_mm", {"self": torch.ones(600, 600), "x2": torch.eye(600), "world_size": 2})
        del large
        limit = arena.limit_bytes
        try:
            arena.limit_bytes = arena.allocated_bytes()
            lent = commfuse.window_empty((1 << 20,), torch.uint8)
            again = [is_right(operator, rank, 2) for operator in OPERATORS]
        finally:
            arena.limit_bytes = limit
    return all(again) and lent.numel() == 1 << 20


def test_memory_of_large_outputs_makes_room_for_what_cannot_do_without() -> None:
    with Ranks(2) as ranks:
        assert ranks.run(room_for_others) == [True, True]


def read_in_a_child(rank: int) -> int:
    rows = torch.arange(6.0).view(2, 3) + rank
    with everything_is_large():
        output = call("npu_all_gather_base_mm", {"self": rows, "x2": torch.eye(3), "world_size": 2})[0]
    wanted = output.tolist()
    pid = os.fork()
    if pid == 0:
        os._exit(output.tolist() != wanted)
    return os.waitpid(pid, 0)[1]


def test_a_forked_child_can_read_a_large_output(run_ranks: RunRanks) -> None:
    assert run_ranks(2, read_in_a_child) == [0, 0]


def passed_on_and_changed(rank: int) -> list[bool]:
    """A large output as the next call's rows, changed at once: it is the user's, and is not read in place."""
    right = []
    with everything_is_large():
        for seed in range(4):
            whole = [torch.arange(6.0).view(2, 3) + 10 * r + seed for r in range(2)]
            args = {"x2": torch.eye(3), "world_size": 2}
            mine = call("npu_all_gather_base_mm", {**args, "self": whole[rank]})[0]
            again = call("npu_all_gather_base_mm", {**args, "self": mine})[0]
            mine.add_(1)
            right += [torch.equal(mine, torch.cat(whole) + 1), torch.equal(again, torch.cat([torch.cat(whole)] * 2))]
            assert is_right("npu_mm_reduce_scatter_base", rank, 2)
    return right


def test_a_large_output_may_change_after_it_was_passed_on(run_ranks: RunRanks) -> None:
    assert run_ranks(2, passed_on_and_changed) == [[True] * 8] * 2


def under_modes(rank: int) -> list[tuple[bool, bool, bool]]:
    """Whether outputs can be changed in place, and are tensors of their own, as torch's would be."""
    seen = []
    rows = torch.ones(2, 3)
    args = {"self": rows, "x2": torch.eye(3), "world_size": 2}
    with everything_is_large():
        for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
            with mode():
                output = call("npu_all_gather_base_mm", args)[0]
                plain = output._base is None and output.untyped_storage().nbytes() < output.nbytes + 4096
            if not output.is_inference():
                output.add_(torch.ones(3, requires_grad=True))
            seen.append((plain, output.is_inference(), output.requires_grad))
    return seen


def test_large_outputs_are_ordinary_tensors(run_ranks: RunRanks) -> None:
    wanted = [(True, False, True), (True, False, True), (True, True, False)]
    assert run_ranks(2, under_modes) == [wanted] * 2
