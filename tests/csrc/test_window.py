"""The arena as Python sees it: tensors over it, errors by type, children that must keep out."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch

from .core import MIB, _core, in_child, status_of


def test_tensors_lie_in_the_arena_and_keep_it_mapped() -> None:
    arena = _core.Arena(64 * MIB, MIB)
    arena.grow(8 * MIB)
    rows = torch.frombuffer(arena, dtype=torch.bfloat16, offset=2 * MIB, count=4096).view(2, 2048)
    assert rows.data_ptr() == arena.at(2 * MIB, rows.nbytes)
    rows.fill_(3)
    del arena
    gc.collect()
    assert (rows == 3).all()


def test_growth_moves_nothing_and_ends_at_the_reservation() -> None:
    arena = _core.Arena(64 * MIB, MIB)
    before = arena.address
    arena.grow(32 * MIB + 1)
    assert (arena.address, arena.size) == (before, 32 * MIB + _core.PAGE_BYTES)
    with pytest.raises(_core.CoreMemoryError, match=r"ends at 64\.0 MiB"):
        arena.grow(65 * MIB)
    with pytest.raises(_core.CoreError, match="do not lie in the window"):
        arena.at(60 * MIB, 1)


def test_a_limit_refuses_before_pages_are_touched() -> None:
    arena = _core.Arena(64 * MIB, MIB)
    arena.grow(64 * MIB)
    arena.limit_bytes = 4 * MIB
    with pytest.raises(_core.CoreMemoryError, match=r"limit is 4\.0 MiB"):
        arena.populate(MIB, 5 * MIB)
    assert arena.allocated_bytes() == 0
    arena.populate(MIB, 3 * MIB)
    assert arena.allocated_bytes() == 3 * MIB


def test_more_than_the_machine_has_is_an_error() -> None:
    too_much = (_core.available_memory() // MIB + 1024) * MIB
    arena = _core.Arena(too_much + 64 * MIB, MIB)
    arena.grow(arena.max_bytes)
    with pytest.raises(_core.CoreMemoryError, match="the machine"):
        arena.populate(MIB, too_much)
    assert arena.allocated_bytes() == 0


def test_a_read_of_the_whole_slab_is_paid_back_by_punching() -> None:
    arena = _core.Arena(64 * MIB, MIB)
    arena.grow(32 * MIB)
    slab = torch.frombuffer(arena, dtype=torch.uint8, offset=MIB, count=16 * MIB)
    slab[:MIB] = 1
    assert arena.allocated_bytes(2 * MIB, 15 * MIB) == 0
    assert slab.sum() == MIB  # reads every page: holes become pages
    assert arena.allocated_bytes(2 * MIB, 15 * MIB) == 15 * MIB
    arena.punch(2 * MIB, 15 * MIB)
    assert arena.allocated_bytes() == MIB
    assert slab.sum() == MIB


def test_a_forked_child_gets_an_error_and_leaves_the_arena_alone() -> None:
    arena = _core.Arena(64 * MIB, MIB)
    arena.grow(8 * MIB)
    channel = _core.Channel(arena, [None], [arena.make_control(1, 256, 4)], 0, 1)

    def child() -> None:
        uses: list[Callable[[], Any]] = [
            lambda: arena.address,
            lambda: arena.at(MIB, 1),
            lambda: channel.poisoned,
            lambda: channel.wait(0, 1),
        ]
        for use in uses:
            with pytest.raises(_core.CoreError, match="forked child"):
                use()
        with pytest.raises(BufferError, match="forked child"):
            memoryview(arena)

    pid = in_child(child)
    assert status_of(pid) == 0
    memoryview(arena)[MIB] = 1
