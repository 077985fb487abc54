"""Outputs in the window: rows published where they lie, loans that are broken, slabs that come back, and what a slow peer sees."""

from __future__ import annotations

import time
from typing import Any
from unittest import mock

import pytest
import torch

import commfuse
from commfuse import config
from commfuse.ranks import Ranks
from tests.conftest import RunRanks

from . import core, layer  # noqa: F401 - skips where the core is not built


def slabs() -> Any:
    from commfuse.backends.cpu import slabs as module

    return module.own()


def in_place(rank: int, rounds: int, slow_rank: int) -> tuple[int, list[bool], bool]:
    """Round trips whose experts write into expand_x; ``slow_rank`` sums late, while the others go on to the next calls."""
    from commfuse.backends.cpu import combine

    really = combine.add_up

    def late(*args: Any) -> None:
        time.sleep(0.02)
        really(*args)

    right, lay_in_window = [], True
    with config.override(backend="cpu"), mock.patch.object(combine, "add_up", late if rank == slow_rank else really):
        for seed in range(rounds):
            out = layer.dispatch(rank, 4, seed)
            lay_in_window &= slabs().holding(out[0]) is not None
            out[0].mul_(2)
            right.append(torch.equal(layer.combine(rank, 4, out, out[0], seed), layer.expected(rank, seed=seed)))
    size = slabs().arena.size
    return size, right, lay_in_window


def test_rows_are_published_in_place_and_slow_peers_see_them(run_ranks: RunRanks, no_ranks: None) -> None:
    for size, right, lay_in_window in run_ranks(4, in_place, 30, 2):
        assert right == [True] * 30
        assert lay_in_window
        assert size < 16 << 20  # slabs come back: 30 rounds take no more room than a few


def early_change(rank: int) -> str:
    from commfuse.backends.cpu import combine

    really = combine.add_up

    def late(*args: Any) -> None:
        time.sleep(0.3)
        really(*args)

    with config.override(backend="cpu"), mock.patch.object(combine, "add_up", late if rank == 1 else really):
        out = layer.dispatch(rank, 2)
        layer.combine(rank, 2, out, out[0])
        if rank == 0:
            out[0].zero_()
        try:
            layer.dispatch(rank, 2)
        except commfuse.ExchangeError as error:
            return str(error)
    return ""


def test_a_loan_that_is_changed_early_is_an_error_on_every_rank() -> None:
    with Ranks(2) as ranks:
        texts = ranks.run(early_change)
    assert all("rank 0 changed a tensor that call 2 of this group had published in place" in text for text in texts)


def memory_comes_back(rank: int) -> tuple[int, int]:
    """Return the bytes of the window at the end, and when every reserved row had been filled."""
    with config.override(backend="cpu"):
        out = layer.dispatch(rank, 2, num_tokens=256, global_bs=65536)
        out[0].fill_(1)
        filled = slabs().arena.allocated_bytes()
        del out
        for _ in range(3):
            layer.dispatch(rank, 2)
        return slabs().arena.allocated_bytes(), filled


def test_rows_that_the_user_has_filled_are_given_back() -> None:
    with Ranks(2) as ranks:
        for allocated, filled in ranks.run(memory_comes_back):
            assert filled > 4 << 20
            assert allocated < filled // 2


@pytest.mark.parametrize("inference", [False, True])
def test_outputs_count_their_changes(run_ranks: RunRanks, inference: bool) -> None:
    assert run_ranks(2, versions, inference) == [True, True]


def versions(rank: int, inference: bool) -> bool:
    with config.override(backend="cpu"), torch.inference_mode(inference):
        out = layer.dispatch(rank, 2)
        before = out[0].detach()._version
        out[0].mul_(2)
        return not out[0].is_inference() and out[0].detach()._version > before


def results_elsewhere(rank: int) -> bool:
    with config.override(backend="cpu"):
        out = layer.dispatch(rank, 2, quant_mode=2)
        total = int(out[4][-1])
        y = commfuse.window_empty(tuple(out[0].shape), torch.bfloat16)
        y[:total] = (out[0][:total].float() * out[1][:total, None]).to(y.dtype)
        copied = layer.combine(rank, 2, out, y.clone())
        return torch.equal(layer.combine(rank, 2, out, y), copied) and slabs().holding(y) is not None


def test_results_in_a_window_of_their_own(run_ranks: RunRanks) -> None:
    assert run_ranks(2, results_elsewhere) == [True, True]


def test_a_view_is_a_part_of_its_slab() -> None:
    from commfuse import _core

    mine = slabs()
    slab = mine.staging(4096)
    mine.ints(slab, 0, 9)[:] = range(9)
    view = mine.view(slab, 8, (2, 3), torch.int32)
    assert view.tolist() == [[2, 3, 4], [5, 6, 7]]
    view.fill_(9)
    assert mine.ints(slab, 0, 9).tolist() == [0, 1, *[9] * 6, 8]
    assert mine.view(slab, 0, (0, 3), torch.bfloat16).shape == (0, 3)
    with pytest.raises(_core.CoreError, match="do not lie in this process's window"):
        mine.view(slab, 1 << 40, (1,), torch.int32)
    mine.give(slab)


def test_a_view_that_is_gone_does_not_give_its_slab_back() -> None:
    mine = slabs()
    slab = mine.staging(4096)
    holder = mine.tensor(slab, (1024,), torch.int32)
    view = mine.view(slab, 0, (1024,), torch.int32)
    del view
    other = mine.staging(4096)
    assert other.address != slab.address
    mine.give(other)
    del holder
    again = [mine.staging(4096) for _ in range(2)]
    assert slab.address in [one.address for one in again]
    for one in again:
        mine.give(one)
