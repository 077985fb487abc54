"""Rows of the matmul operators while a peer has not read them yet: not moved, not handed out again, and not to be changed where lent."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import commfuse
from commfuse import config
from commfuse.ranks import Ranks
from tests.conftest import RunRanks

from . import core  # noqa: F401 - skips where the core is not built
from .matmul import CASES, call, everyones_args, expected, is_right, same

READERS = {  # what of `views` reads the rows that rank 0 has published
    "npu_gmm_alltoallv": "pull_blocks",
    "npu_alltoallv_gmm": "pull_blocks",
    "npu_all_gather_base_mm": "pull_all",
    "npu_mm_reduce_scatter_base": "tensors",
    "npu_mm_all_reduce_base": "pull",
}
LENT = {"npu_alltoallv_gmm": "gmm_x", "npu_all_gather_base_mm": "self"}  # arguments that are published where they lie


@contextmanager
def held_back(reader: str) -> Iterator[None]:
    """Let this rank read only after word from rank 0 (see `let_go`)."""
    from commfuse.backends.cpu import views

    really = getattr(views, reader)

    def late(*args: Any) -> Any:
        dist.recv(torch.empty(1), 0)
        return really(*args)

    with mock.patch.object(views, reader, late):
        yield


def let_go() -> None:
    dist.send(torch.ones(1), 1)


def in_window(tensor: torch.Tensor) -> torch.Tensor:
    from commfuse import window_empty

    return window_empty(tuple(tensor.shape), tensor.dtype).copy_(tensor)


def slabs() -> Any:
    from commfuse.backends.cpu import slabs as module

    return module.own()


# --- slabs that a slow peer reads --------------------------------------------------------------------------------------------


def beside_a_slow_reader(rank: int, operator: str, lend: bool) -> tuple[bool, bool, bool]:
    """Rank 0 is through with a call that rank 1 has yet to read, and fills whatever memory it gets; is rank 1's result right?

    Also: were rank 0's published slabs kept from it until then, and given to it after that?
    """
    ranks = everyones_args(operator, 2, 3)
    with config.override(backend="cpu", poison=True):
        assert is_right(operator, rank, 2)
        args = ranks[rank]
        if lend:
            args = {**args, LENT[operator]: in_window(args[LENT[operator]])}
        if rank == 1:
            with held_back(READERS[operator]):
                found = call(operator, args)
            assert is_right("_npu_distribute_barrier", rank, 2)
            return same(found, expected(operator, ranks, rank)), True, True
        published: list[Any] = []
        with published_slabs(published):
            found = call(operator, args)
        del args
        taken = [fill(slab.num_bytes) for slab in published for _ in range(20)]
        kept = not {slab.address for slab in taken} & {slab.address for slab in published}
        let_go()
        assert is_right("_npu_distribute_barrier", rank, 2)
        again = {slabs().core.take(slab.num_bytes).address for slab in published for _ in range(20)}
        given = {slab.address for slab in published} <= again
        return same(found, expected(operator, ranks, rank)), kept, given


@contextmanager
def published_slabs(found: list[Any]) -> Iterator[None]:
    """Collect the slabs that calls publish rows from."""
    from commfuse.backends.cpu.slabs import Slabs

    staging, holding = Slabs.staging, Slabs.holding

    def staged(self: Any, num_bytes: int) -> Any:
        found.append(staging(self, num_bytes))
        return found[-1]

    def held(self: Any, tensor: torch.Tensor) -> Any:
        slab = holding(self, tensor)
        if slab is not None and slab not in found:
            found.append(slab)
        return slab

    with mock.patch.multiple(Slabs, staging=staged, holding=held):
        yield


def fill(num_bytes: int) -> Any:
    slab = slabs().staging(num_bytes)
    slabs().view(slab, 0, (num_bytes,), torch.uint8).fill_(0x7F)
    return slab


@pytest.mark.parametrize(("operator", "lend"), [*((name, False) for name in READERS), *((name, True) for name in LENT)])
def test_no_slab_is_handed_out_while_a_slow_peer_reads_it(operator: str, lend: bool) -> None:
    with Ranks(2) as ranks:
        assert ranks.run(beside_a_slow_reader, operator, lend) == [(True, True, True)] * 2


# --- rows published where they lie -------------------------------------------------------------------------------------------


def changed_early(rank: int, operator: str, lend: bool) -> tuple[bool, str]:
    """Rank 0 clears its rows while rank 1 has not read them, and begins the next call."""
    ranks = everyones_args(operator, 2, 3)
    with config.override(backend="cpu"):
        assert is_right(operator, rank, 2)
        args = ranks[rank]
        rows = in_window(args[LENT[operator]]) if lend else args[LENT[operator]].clone()
        args = {**args, LENT[operator]: rows}
        wanted = expected(operator, ranks, rank)
        if rank == 1:
            with held_back(READERS[operator]):
                found = call(operator, args)
        else:
            found = call(operator, args)
            rows.zero_()
        try:
            if rank == 0 and not lend:
                let_go()
            is_right("_npu_distribute_barrier", rank, 2)
        except commfuse.ExchangeError as error:
            return same(found, wanted), str(error)
        finally:
            if rank == 0 and lend:
                let_go()
    return same(found, wanted), ""


@pytest.mark.parametrize("operator", LENT)
def test_a_lent_shard_that_is_changed_early_is_an_error_on_every_rank(operator: str) -> None:
    with Ranks(2) as ranks:
        (_, mine), (was_right, theirs) = ranks.run(changed_early, operator, True)
    assert "rank 0 changed a tensor that call 2 of this group had published in place" in mine
    assert "rank 0 changed a tensor that call 2 of this group had published in place" in theirs
    assert not was_right  # so the rows were read where they lay, and the error was due


@pytest.mark.parametrize("operator", LENT)
def test_rows_outside_a_window_may_change_at_once(operator: str) -> None:
    with Ranks(2) as ranks:
        assert ranks.run(changed_early, operator, False) == [(True, ""), (True, "")]


def changed_in_time(rank: int, operator: str, then: str) -> list[bool]:
    """Rows in the window for call after call, each time with other values, cleared after one call of ``then``."""
    right = []
    with config.override(backend="cpu"):
        for seed in range(12):
            ranks = everyones_args(operator, 3, seed)
            rows = in_window(ranks[rank][LENT[operator]])
            right.append(same(call(operator, {**ranks[rank], LENT[operator]: rows}), expected(operator, ranks, rank)))
            assert is_right(then, rank, 3)
            rows.zero_()
    return right


@pytest.mark.parametrize("then", ["_npu_distribute_barrier", "npu_mm_reduce_scatter_base"])
@pytest.mark.parametrize("operator", LENT)
def test_lent_rows_may_change_after_the_next_call(run_ranks: RunRanks, operator: str, then: str) -> None:
    assert run_ranks(3, changed_in_time, operator, then) == [[True] * 12] * 3


# --- many calls: as many slabs as there may be calls that a peer has not read, and the one under way --------------------------


def most_of_a_size(found: list[Any]) -> int:
    """How many different slabs of one size are among ``found``."""
    return max(Counter(num_bytes for _, num_bytes in {(slab.address, slab.num_bytes) for slab in found}).values())


def many_calls(rank: int, rounds: int) -> tuple[bool, list[tuple[str, int]]]:
    """All operators in turn; whether they took no more room than they may, and what was wrong."""
    from commfuse.backends.cpu.join import DEPTHS

    wrong, found = [], list[Any]()
    with config.override(backend="cpu", poison=True), published_slabs(found):
        for seed in range(rounds):
            wrong += [(operator, seed) for operator in CASES if not is_right(operator, rank, 4, seed)]
    return most_of_a_size(found) <= DEPTHS[0] + 1, wrong


def test_many_calls_take_no_more_room_than_a_few(run_ranks: RunRanks) -> None:
    assert run_ranks(4, many_calls, 40) == [(True, [])] * 4


def often_refused(rank: int, operator: str) -> bool:
    """Calls whose counts do not match; whether they took no more room than they may."""
    from commfuse.backends.cpu.join import DEPTHS

    found = list[Any]()
    with config.override(backend="cpu"), published_slabs(found):
        args = everyones_args(operator, 2, 0)[rank]
        args["recv_counts"][rank] += 1
        for _ in range(30):
            with pytest.raises(commfuse.ArgumentError, match="must equal"):
                call(operator, args)
    return most_of_a_size(found) <= DEPTHS[0] + 1


@pytest.mark.parametrize("operator", ["npu_gmm_alltoallv", "npu_alltoallv_gmm"])
def test_refused_calls_give_their_room_back(run_ranks: RunRanks, operator: str) -> None:
    assert run_ranks(2, often_refused, operator) == [True] * 2
