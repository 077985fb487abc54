"""The operators of this family as callers write them, on real ranks: the worked examples, names of the first argument, the barrier."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

import commfuse
from tests.conftest import RunRanks

X2 = [[[1, 0, 1], [0, 1, 1]], [[2, 0, 0], [0, 2, 1]]]


def _group() -> str:
    return str(dist.group.WORLD.group_name)


def _all_gather(rank: int) -> list[Any]:
    rows = torch.tensor([[1, 2], [3, 4]]) + 4 * rank
    output, gathered = commfuse.npu_all_gather_base_mm(rows.half(), torch.tensor(X2[rank]).half(), _group(), 2)
    return [gathered.int().tolist(), output.int().tolist()]


def test_all_gather_example(run_ranks: RunRanks) -> None:
    rows = [[1, 2], [3, 4], [5, 6], [7, 8]]
    assert run_ranks(2, _all_gather) == [
        [rows, [[1, 2, 3], [3, 4, 7], [5, 6, 11], [7, 8, 15]]],
        [rows, [[2, 4, 2], [6, 8, 4], [10, 12, 6], [14, 16, 8]]],
    ]


def _reduce(rank: int) -> list[Any]:
    rows, weight = (rank + 1) * torch.arange(8.0).view(4, 2), torch.tensor(X2[rank]).float()
    scattered = commfuse.npu_mm_reduce_scatter_base(rows, weight, _group(), 2)
    everywhere = commfuse.npu_mm_all_reduce_base(rows.view(2, 2, 2), weight, _group())
    return [scattered.int().tolist(), everywhere.int().tolist()]


def test_reduce_example(run_ranks: RunRanks) -> None:
    total = [[0, 5, 3], [10, 15, 11], [20, 25, 19], [30, 35, 27]]
    in_3d = [total[:2], total[2:]]
    assert run_ranks(2, _reduce) == [[total[:2], in_3d], [total[2:], in_3d]]


def _bias_counts_on_every_rank(rank: int) -> list[Any]:
    rows, weight, bias = torch.zeros(2, 2), torch.zeros(2, 3), torch.tensor([1.0, 2.0, 3.0])
    scattered = commfuse.npu_mm_reduce_scatter_base(rows, weight, _group(), 2, bias=bias)
    everywhere = commfuse.npu_mm_all_reduce_base(rows, weight, _group(), bias=bias, x3=torch.ones(2, 3))
    gathered, _ = commfuse.npu_all_gather_base_mm(rows, weight, _group(), 2, bias=bias)
    return [scattered.tolist(), everywhere.tolist(), gathered.tolist()]


def test_bias_is_added_by_every_rank(run_ranks: RunRanks) -> None:
    for found in run_ranks(2, _bias_counts_on_every_rank):
        assert found == [[[2, 4, 6]], [[4, 6, 8]] * 2, [[1, 2, 3]] * 4]


# --- the name of the first argument ----------------------------------------------------------------------------------------

FUNCTIONS = [commfuse.npu_all_gather_base_mm, commfuse.npu_mm_reduce_scatter_base]


def _alone() -> str:
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return _group()


def _first(outputs: Any) -> torch.Tensor:
    found: torch.Tensor = outputs[0] if isinstance(outputs, tuple) else outputs
    return found


@pytest.mark.parametrize("name", ["input", "self", "x1"])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_first_argument_by_name(function: Any, name: str) -> None:
    rows, weight = torch.randn(2, 3), torch.randn(3, 4)
    expected = _first(function(rows, weight, _alone(), 1))
    assert torch.equal(_first(function(x2=weight, hcom=_alone(), world_size=1, **{name: rows})), expected)
    torch.testing.assert_close(expected, rows @ weight)


@pytest.mark.parametrize(
    ("args", "names", "says"),
    [
        ((), ("self", "x1"), "self= and x1= mean the same argument"),
        ((), ("input", "self"), "input= and self= mean the same argument"),
        ((torch.ones(2, 3),), ("x1",), "the first positional argument and x1= mean the same argument"),
    ],
)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_first_argument_twice(function: Any, args: tuple[Any, ...], names: tuple[str, ...], says: str) -> None:
    more = dict.fromkeys(names, torch.ones(2, 3))
    with pytest.raises(commfuse.ArgumentError, match=says):
        function(*args, x2=torch.ones(3, 4), hcom=_alone(), world_size=1, **more)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_no_first_argument(function: Any) -> None:
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'input'"):
        function(x2=torch.ones(3, 4), hcom=_alone(), world_size=1)


# --- the barrier -----------------------------------------------------------------------------------------------------------


def _late(rank: int, late: int) -> float:
    """The wall-clock second at which this rank is through; rank ``late`` arrives half a second after the others."""
    time.sleep(0.5 * (rank == late))
    arrived = time.time()
    x = torch.arange(rank + 1)  # every rank another shape
    result = commfuse._npu_distribute_barrier(x, _group(), 3)
    assert torch.equal(result, x)
    assert result.data_ptr() != x.data_ptr()
    return time.time() if rank != late else arrived


@pytest.mark.parametrize("late", range(3))
def test_barrier_waits_for_the_last(run_ranks: RunRanks, late: int) -> None:
    seconds = run_ranks(3, _late, late)
    assert min(seconds) == seconds[late]


def _survivors(rank: int) -> list[int] | None:
    """Rank 1 is gone: the two others have ids 0 and 1."""
    if rank == 1:
        return None
    table = torch.tensor([1, 2, 0, 4, 0, -1, 1, 0, 2, -1], dtype=torch.int32)
    found: list[int] = commfuse._npu_distribute_barrier(torch.tensor([rank]), _group(), 3, elastic_info=table).tolist()
    return found


def test_barrier_of_the_ranks_that_are_left(run_ranks: RunRanks) -> None:
    assert run_ranks(3, _survivors) == [[0], None, [2]]
