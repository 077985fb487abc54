"""What a rank reads from its peers on portable may be spoilt: an error names the rank that sent it, soon and on both ranks."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

import commfuse
from commfuse import config, exchanges
from commfuse.groups import Group, Posted
from tests.backends.cpu import layer
from tests.conftest import RunRanks

SEEDED = settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=15,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
HUGE = 1 << 62
SIZES = st.integers(-(1 << 63), -1) | st.integers(1 << 50, (1 << 63) - 1)


def told(call: Callable[[], Any]) -> str:
    try:
        call()
    except Exception as error:  # whatever it is, it is what the user reads
        return f"{type(error).__name__}: {error}"
    return ""


def spoilt(rank: int, spoil: Any, call: Callable[[int, str], Any]) -> tuple[str, str]:
    """What both ranks read in a new group to which rank 1 sends something else, and in the next one."""
    errors = []
    for sound in (False, True):
        name = str(dist.new_group([0, 1]).group_name)
        with config.override(backend="portable", timeout=10.0, first_timeout=10.0):
            call(rank, name)
            with spoil if rank == 1 and not sound else mock.patch.dict({}):
                errors.append(told(lambda name=name: call(rank, name)))
    return errors[0], errors[1]


def check(run_ranks: RunRanks, on_rank: Callable[..., tuple[str, str]], *args: Any) -> None:
    for text, then in run_ranks(2, on_rank, *args, deadline=40):
        assert text.startswith("ExchangeError: "), text
        assert "rank 1 (pid " in text
        assert ", which cannot be. Now: make a new process group" in text
        assert then == ""


def barrier(rank: int, name: str) -> None:
    commfuse._npu_distribute_barrier(torch.ones(1), name, 2)


def mismatch(rank: int, name: str) -> None:
    """Two operators, so that objects are gathered; all is well if that is what both ranks read."""
    try:
        barrier(rank, name) if rank else layer.dispatch(rank, 2, group_ep=name)
    except commfuse.MismatchError:
        return


def split(rank: int, name: str) -> None:
    x, ids, _ = layer.inputs(rank)
    common = {**layer.common(rank, 2), "group_ep": name}
    y, _, command = commfuse.npu_moe_distribute_dispatch_setup(x, ids, **common)
    commfuse.npu_moe_distribute_dispatch_teardown(x, y, ids, command, **common)


def dispatch(rank: int, name: str) -> None:
    layer.dispatch(rank, 2, group_ep=name)


# --- the sizes of announced blocks -----------------------------------------------------------------------------------------------------


def with_size(rank: int, size: int) -> tuple[str, str]:
    return spoilt(rank, mock.patch.object(Group, "post", posting(size)), dispatch)


def posting(size: int) -> Callable[..., Posted]:
    original = Group.post

    def post(group: Group, send: list[torch.Tensor], *rest: Any) -> Posted:
        if send[0].dtype == torch.int64:  # headers
            send = [torch.tensor([*header[:2].tolist(), size]) for header in send]
        return original(group, send, *rest)

    return post


@SEEDED
@given(SIZES)
@example(-1)
@example(HUGE)
def test_a_forged_size_of_a_block(run_ranks: RunRanks, size: int) -> None:
    check(run_ranks, with_size, size)


# --- gathered objects ------------------------------------------------------------------------------------------------------------------


def with_pickle(rank: int, data: bytes) -> tuple[str, str]:
    return spoilt(rank, mock.patch.object(exchanges.pickle, "dumps", return_value=data), mismatch)


def with_object_size(rank: int, size: int) -> tuple[str, str]:
    return spoilt(rank, mock.patch.object(Group, "gather", gathering(size)), mismatch)


def gathering(value: int) -> Callable[..., torch.Tensor]:
    original = Group.gather

    def gather(group: Group, mine: torch.Tensor, *rest: Any, **more: Any) -> torch.Tensor:
        return original(group, torch.full_like(mine, value) if mine.dtype == torch.int64 else mine, *rest, **more)

    return gather


GOOD = pickle.dumps(((), {"operator": "none", "call number": 3, "product": "portable"}))


@SEEDED
@given(st.integers(1, len(GOOD) - 1).map(lambda end: GOOD[:end]) | st.binary(min_size=1, max_size=40))
@example(b"\x80\x05\x8e" + (HUGE).to_bytes(8, "little"))  # bytes of a length that no machine has
@example(pickle.dumps(1))
@example(pickle.dumps(((), {}, 3)))
def test_a_spoilt_pickle(run_ranks: RunRanks, data: bytes) -> None:
    check(run_ranks, with_pickle, data)


@SEEDED
@given(SIZES)
@example(-1)
@example(HUGE)
def test_a_forged_size_of_an_object(run_ranks: RunRanks, size: int) -> None:
    check(run_ranks, with_object_size, size)


# --- numbers of rows -------------------------------------------------------------------------------------------------------------------


def with_count(rank: int, value: int) -> tuple[str, str]:
    return spoilt(rank, mock.patch.object(Group, "gather", gathering(value)), dispatch)


@SEEDED
@given(st.integers(-(1 << 40), -1) | st.integers(1 << 44, 1 << 50))
@example(-1)
def test_a_forged_number_of_rows(run_ranks: RunRanks, value: int) -> None:
    check(run_ranks, with_count, value)


def with_block(rank: int, data: bytes) -> tuple[str, str]:
    return spoilt(rank, mock.patch.object(Group, "post", posting_blocks(data)), split)


def posting_blocks(data: bytes) -> Callable[..., Posted]:
    """Headers and blocks that agree with each other, but hold ``data``."""
    original = Group.post

    def post(group: Group, send: list[torch.Tensor], *rest: Any) -> Posted:
        if send[0].dtype == torch.int64:
            send = [torch.tensor([*header[:2].tolist(), len(data)]) for header in send]
        else:
            send = [torch.frombuffer(bytearray(data), dtype=torch.uint8)] * len(send)
        return original(group, send, *rest)

    return post


@SEEDED
@given(st.binary(min_size=1, max_size=80))
@example(b"\xff" * 64)
@example(bytes(8))
def test_a_spoilt_block_of_a_setup(run_ranks: RunRanks, data: bytes) -> None:
    (text, then), sender = run_ranks(2, with_block, data, deadline=40)
    assert text.startswith("ExchangeError: npu_moe_distribute_dispatch_teardown: ")
    assert "rank 1 (pid " in text
    assert f"has sent a message of {len(data)} bytes with rows " in text
    assert then == sender[1] == ""
