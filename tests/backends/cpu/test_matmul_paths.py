"""The matmul operators through windows: against the goldens, without the process group, and what is refused alike on every rank."""

from __future__ import annotations

import ctypes
import pickle
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import numpy as np
import pytest
import torch

import commfuse
from commfuse import checking, config
from commfuse.checking.matmul import Matmul
from commfuse.groups import Group
from commfuse.ranks import Ranks
from tests.backends.test_parity import check_all
from tests.conftest import RunRanks

from . import core  # noqa: F401 - skips where the core is not built
from .matmul import CASES, MATMUL, call, everyones_args, is_right

SIZES = [(family, size) for family in MATMUL.values() for size in sorted({case.world_size for case in family.named_cases()})]


@pytest.mark.parametrize(("family", "size"), SIZES, ids=[f"{family.name}-{size}" for family, size in SIZES])
def test_named_cases(run_ranks: RunRanks, family: Matmul, size: int) -> None:
    check_all(run_ranks, family, [case for case in family.named_cases() if case.world_size == size], "cpu")


@pytest.mark.parametrize("first", [7000, pytest.param(7100, marks=pytest.mark.long)])
@pytest.mark.parametrize("family", MATMUL.values(), ids=MATMUL)
def test_random_cases(run_ranks: RunRanks, family: Matmul, first: int) -> None:
    check_all(run_ranks, family, [family.random_case(seed) for seed in range(first, first + 100)], "cpu")


def alone(rank: int, world_size: int) -> list[str]:
    """The operators that give a wrong result, or talk over the process group once the windows are there."""
    wrong = []
    with config.override(backend="cpu", poison=True):
        assert is_right("_npu_distribute_barrier", rank, world_size)
        unused = mock.Mock(side_effect=AssertionError("the process group was used"))
        with mock.patch.multiple(Group, exchange=unused, post=unused, receive=unused):
            for seed, operator in enumerate(CASES):
                if not is_right(operator, rank, world_size, seed):
                    wrong.append(operator)
    return wrong


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_rows_move_through_windows_alone(run_ranks: RunRanks, world_size: int) -> None:
    assert run_ranks(world_size, alone, world_size) == [[]] * world_size


def multiplied_in_place(rank: int, cases: list[Any]) -> tuple[bytes, int]:
    from commfuse.backends.cpu import all_gather_mm

    counted = mock.Mock(side_effect=all_gather_mm._multiply_in_place)
    with mock.patch.multiple(all_gather_mm, IN_PLACE_ROWS=1, _multiply_in_place=counted):
        settings = {**checking.SETTINGS, "backend": "cpu"}
        return checking.on_rank(rank, "npu_all_gather_base_mm", cases, settings), counted.call_count


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_products_that_read_the_peers_windows(run_ranks: RunRanks, world_size: int) -> None:
    family = MATMUL["npu_all_gather_base_mm"]
    plain: dict[str, Any] = {"world_size": world_size, "gather_output": False, "bias": False, "x2_scale": None, "x1_scale": False}
    plain["output_dtype"] = None
    dtypes = (torch.bfloat16, torch.float32)
    cases = [replace(family.random_case(seed), **plain, dtype=dtypes[seed % 2]) for seed in range(20)]
    replies = run_ranks(world_size, multiplied_in_place, cases)
    assert {count for _, count in replies} == {sum(case.m > 0 for case in cases)}
    by_rank = [pickle.loads(data) for data, _ in replies]
    outcomes = [checking.judge(family, case, [found[i] for found in by_rank]) for i, case in enumerate(cases)]
    assert [text for outcome in outcomes for text in outcome.problems] == []


def many_rows(rank: int, gather_output: bool) -> bool:
    """More rows than from where on products read the windows."""
    rows = [torch.arange(300.0 * 8).view(300, 8).remainder(7 + r) for r in range(2)]
    weight = torch.arange(8.0 * 3).view(8, 3) - 12
    args = {"input": rows[rank], "x2": weight, "world_size": 2, "gather_output": gather_output}
    with config.override(backend="cpu", poison=True):
        output, gathered = call("npu_all_gather_base_mm", args)
    whole = torch.cat(rows)
    return torch.equal(output, whole @ weight) and torch.equal(gathered, whole if gather_output else torch.empty(0))


@pytest.mark.parametrize("gather_output", [False, True])
def test_many_rows(run_ranks: RunRanks, gather_output: bool) -> None:
    assert run_ranks(2, many_rows, gather_output) == [True, True]


# --- the barrier -------------------------------------------------------------------------------------------------------------


def wait_for_the_last(rank: int, late: int, file: str) -> bool:
    with config.override(backend="cpu"):
        assert is_right("_npu_distribute_barrier", rank, 3)
        if rank == late:
            time.sleep(0.2)
            Path(file).touch()
        call("_npu_distribute_barrier", {"x_ref": torch.ones(1), "world_size": 3})
        return Path(file).exists()


@pytest.mark.parametrize("late", range(3))
def test_barrier_waits_for_the_last(run_ranks: RunRanks, tmp_path: Path, late: int) -> None:
    assert run_ranks(3, wait_for_the_last, late, str(tmp_path / "came")) == [True] * 3


def without_rank_1(rank: int) -> list[int]:
    table = torch.tensor([1, 2, 0, 4, 0, -1, 1, 0, 2, -1], dtype=torch.int32)
    args = {"x_ref": torch.tensor([rank]), "world_size": 3, "elastic_info": table}
    with config.override(backend="cpu"):
        return [] if rank == 1 else [tensor.item() for tensor in call("_npu_distribute_barrier", args)]


def test_barrier_of_the_ranks_that_are_left() -> None:
    with Ranks(3) as ranks:
        assert ranks.run(without_rank_1) == [[0], [], [2]]


# --- what is refused ---------------------------------------------------------------------------------------------------------


def told(function: Callable[[], Any]) -> tuple[str, str]:
    try:
        function()
    except commfuse.CommfuseError as error:
        return type(error).__name__, str(error)
    return "", ""


def other_counts(rank: int, operator: str) -> list[tuple[str, str]]:
    """On both backends: rank 2 expects one row more than rank 1 sends; then a right call."""
    found = []
    for backend in ("cpu", "portable"):
        with config.override(backend=backend, poison=True):
            assert is_right(operator, rank, 3)
            args = everyones_args(operator, 3, 0)[rank]
            if rank == 2:
                args["recv_counts"][3] += 1
            found.append(told(partial(call, operator, args)))
            assert is_right(operator, rank, 3, seed=1)
    return found


@pytest.mark.parametrize("operator", ["npu_gmm_alltoallv", "npu_alltoallv_gmm"])
def test_counts_that_do_not_match_read_alike_on_every_rank_and_backend(run_ranks: RunRanks, operator: str) -> None:
    replies = [reply for replies in run_ranks(3, other_counts, operator) for reply in replies]
    assert len(set(replies)) == 1
    kind, text = replies[0]
    sent = everyones_args(operator, 3, 0)[1]["send_counts"][5]
    assert kind == "ArgumentError"
    assert "refused on rank 1 of 3" in text
    assert f"send_counts[5] = {sent} on rank 1: must equal recv_counts[3] = {sent + 1} on rank 2" in text


def short_of_memory(rank: int, operator: str) -> tuple[str, str]:
    from commfuse import _core
    from commfuse.backends.cpu.slabs import Slabs

    with config.override(backend="cpu", poison=True):
        assert is_right(operator, rank, 3)
        lack = mock.Mock(side_effect=_core.CoreMemoryError("no memory for a test"))
        with mock.patch.object(Slabs, "staging", lack if rank == 1 else Slabs.staging):
            found = told(lambda: is_right(operator, rank, 3))
        assert is_right(operator, rank, 3, seed=1)
    return found


@pytest.mark.parametrize("operator", [name for name in CASES if "barrier" not in name])
def test_a_rank_short_of_memory_is_named_on_every_rank(run_ranks: RunRanks, operator: str) -> None:
    for kind, text in run_ranks(3, short_of_memory, operator):
        assert kind == "ArgumentError"
        assert f"{operator}: refused on rank 1 of 3:\n  no memory for a test" in text


Args = dict[str, Any]
CHANGES: dict[str, tuple[str, Callable[[Args], Args]]] = {  # what must be equal on all ranks, and arguments where it is another
    "npu_gmm_alltoallv": ("N1", lambda args: {"gmm_weight": torch.cat([args["gmm_weight"]] * 2, -1)}),
    "npu_alltoallv_gmm": ("gmm_x.dtype", lambda args: {name: args[name].half() for name in ("gmm_x", "gmm_weight")}),
    "npu_all_gather_base_mm": ("m", lambda args: {"self": args["self"][:2]}),
    "npu_mm_reduce_scatter_base": ("n", lambda args: {"x2": args["x2"][:, :5], "bias": args["bias"][:5]}),
    "npu_mm_all_reduce_base": ("result_dtype", lambda args: {name: args[name].half() for name in ("x1", "x2", "bias", "x3")}),
}


def of_rank_0(rank: int, operator: str) -> list[tuple[str, str]]:
    """Rank 0's arguments do not fit the others', then break a rule; a right call after each."""
    found = []
    with config.override(backend="cpu", poison=True):
        args = everyones_args(operator, 2, 0)[rank]
        other = CHANGES[operator][1](args)
        wrong = {"comm_turn": 1} if "comm_turn" in args else {"comm_mode": "no such mode"}
        for change in (other, wrong):
            found.append(told(partial(call, operator, {**args, **change} if rank == 0 else args)))
            assert is_right(operator, rank, 2, seed=1)
    return found


@pytest.mark.parametrize("operator", CHANGES)
def test_ranks_that_differ_and_a_rank_that_refuses(run_ranks: RunRanks, operator: str) -> None:
    (differs, refuses), *others = run_ranks(2, of_rank_0, operator)
    assert others == [[differs, refuses]]
    assert differs[0] == "MismatchError"
    assert f"\n  {CHANGES[operator][0]}: " in differs[1]
    assert refuses[0] == "ArgumentError"
    assert "refused on rank 0 of 2" in refuses[1]


# --- the pieces --------------------------------------------------------------------------------------------------------------


def test_blocks_of_the_worked_example() -> None:
    from commfuse.backends.cpu import gmm_alltoallv

    sent = np.array([[[1, 2], [1, 1]], [[0, 1], [2, 0]]])
    assert gmm_alltoallv.by_source(sent, 1) == [[(1, 0, 1), (4, 1, 1)], [(0, 2, 2)]]
    assert gmm_alltoallv.by_expert(sent, 1) == [[(3, 0, 1), (4, 3, 1)], [(1, 1, 2)]]


def test_blocks_are_where_a_loop_over_all_rows_finds_them() -> None:
    from commfuse.backends.cpu import gmm_alltoallv

    random = np.random.default_rng(0)
    for members, experts in ((1, 3), (3, 2), (4, 5)):
        sent = random.integers(0, 3, (members, members, experts))
        for me in range(members):
            by_peer = [[(to, e) for to in range(members) for e in range(experts) for _ in range(rows[to, e])] for rows in sent]
            by_expert = [sorted(rows, key=lambda row: row[1]) for rows in by_peer]
            mine = sorted((e, source) for source in range(members) for to, e in by_peer[source] if to == me)
            for source in range(members):
                found = gmm_alltoallv.by_expert(sent, me)[source]
                assert all(
                    by_peer[source][i + there] == (me, mine[i + here][0]) for there, here, rows in found for i in range(rows)
                )
                assert [i for _, here, rows in found for i in range(here, here + rows)] == [
                    i for i, (_, came_from) in enumerate(mine) if came_from == source
                ]
            taken = [
                row
                for source, rows in enumerate(gmm_alltoallv.by_source(sent, me))
                for row in taken_rows(by_expert[source], rows)
            ]
            assert taken == [row for rows in by_expert for row in rows if row[0] == me]


def taken_rows(rows: list[Any], blocks: list[tuple[int, int, int]]) -> list[Any]:
    return [rows[there + i] for there, _, count in blocks for i in range(count)]


def test_views_show_the_memory_itself_and_only_of_the_right_size() -> None:
    from commfuse import _core
    from commfuse.backends.cpu import views

    memory = (ctypes.c_float * 6)(*range(6))
    sources = _core.Sources(1)
    sources.set(0, ctypes.addressof(memory), 24)
    session = cast(Any, SimpleNamespace(channel=SimpleNamespace(sources=lambda segment: sources), large_copy=0))
    seen = views.tensor(session, 0, 0, (2, 3), torch.float32)
    memory[5] = 50
    assert seen.tolist() == [[0, 1, 2], [3, 4, 50]]
    with pytest.raises(_core.CoreError, match="member 0 published 24 bytes as segment 0, expected 20"):
        views.tensor(session, 0, 0, (5,), torch.float32)
    with pytest.raises(_core.CoreError, match="expected 48"):
        views.pull(session, 0, [torch.empty(12)])


def test_rows_of_all_members_one_after_the_other() -> None:
    from commfuse import _core
    from commfuse.backends.cpu import views

    memory = [(ctypes.c_float * 2)(10 * member, 10 * member + 1) for member in range(3)]
    sources = _core.Sources(3)
    for member, floats in enumerate(memory):
        sources.set(member, ctypes.addressof(floats), 8)
    group = SimpleNamespace(members=range(3))
    session = cast(Any, SimpleNamespace(channel=SimpleNamespace(sources=lambda segment: sources), large_copy=0, members=group))
    assert views.pull_all(session, 0, torch.empty(3, 2)).tolist() == [[0, 1], [10, 11], [20, 21]]
    with pytest.raises(_core.CoreError, match="member 0 published 8 bytes as segment 0, expected 12"):
        views.pull_all(session, 0, torch.empty(9))
