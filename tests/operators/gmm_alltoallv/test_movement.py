"""npu_gmm_alltoallv and npu_alltoallv_gmm on real ranks: the worked example, and that each undoes the movement of the other."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import commfuse
from commfuse.operators.gmm_alltoallv.cases import PATTERNS, count_lists, count_matrix
from tests.conftest import RunRanks

SEEDS = range(100)


def group_name() -> str:
    return str(dist.group.WORLD.group_name)


def world_size(seed: int) -> int:
    return 1 + seed % 8


def _there_and_back(rank: int, seeds: list[int]) -> list[tuple[int, bool, bool]]:
    return [(seed, *_both_ways(rank, seed)) for seed in seeds]


def _both_ways(rank: int, seed: int) -> tuple[bool, bool]:
    """Unit matrices as weights leave nothing but movement, so that going there and back changes no bit."""
    num_experts, size = 1 + seed % 5, world_size(seed)
    pattern = ("random", *PATTERNS)[seed % (1 + len(PATTERNS))]
    counts = count_lists(count_matrix(seed, world_size=size, num_experts=num_experts, pattern=pattern))
    send, recv = counts[rank]
    unit = torch.eye(3, dtype=torch.float16).expand(num_experts, 3, 3)
    rows = torch.randn(sum(send), 3, generator=torch.Generator().manual_seed(100 * seed + rank)).half()

    def move(operator: Any, rows: Tensor, send: list[int], recv: list[int]) -> Tensor:
        moved: Tensor = operator(rows, unit, group_name(), size, send, recv)[0]
        return moved

    first, second = commfuse.npu_gmm_alltoallv, commfuse.npu_alltoallv_gmm
    return (
        torch.equal(move(second, move(first, rows, send, recv), recv, send), rows),
        torch.equal(move(first, move(second, rows, send, recv), recv, send), rows),
    )


@pytest.mark.parametrize("size", range(1, 9))
def test_each_undoes_the_movement_of_the_other(run_ranks: RunRanks, size: int) -> None:
    seeds = [seed for seed in SEEDS if world_size(seed) == size]
    assert seeds
    for results in run_ranks(size, _there_and_back, seeds):
        assert [found for found in results if found[1:] != (True, True)] == []
        assert [seed for seed, *_ in results] == seeds


# --- the worked example: the weight of global expert j is j + 1 times the unit matrix -----------------------------------------

SEND = [[1, 2, 0, 1], [2, 0, 1, 1]]
RECV = [[1, 2, 2, 0], [0, 1, 1, 1]]
ROWS = [[10, 11, 12, 13], [20, 21, 22, 23]]


def _example(rank: int) -> dict[str, list[int]]:
    weight = torch.stack([torch.eye(2) * (2 * rank + expert + 1) for expert in range(2)])
    rows = torch.tensor(ROWS[rank], dtype=torch.float32)[:, None].expand(-1, 2)
    there = (group_name(), 2, SEND[rank], np.array(RECV[rank]))
    back = (group_name(), 2, tuple(RECV[rank]), torch.tensor(SEND[rank]))
    gmm_y, mm_y, permuted = commfuse.npu_alltoallv_gmm(rows, weight, *there, permute_out_flag=True)
    assert mm_y is None
    assert permuted is not None
    assert commfuse.npu_alltoallv_gmm(rows, weight, *there)[2] is None
    y, mm_y = commfuse.npu_gmm_alltoallv(permuted, weight, *back)
    assert mm_y is None
    return {name: tensor[:, 0].int().tolist() for name, tensor in (("permuted", permuted), ("gmm_y", gmm_y), ("y", y))}


def test_worked_example(run_ranks: RunRanks) -> None:
    assert run_ranks(2, _example) == [
        {"permuted": [10, 20, 21, 11, 12], "gmm_y": [10, 20, 21, 22, 24], "y": [10, 22, 24, 52]},
        {"permuted": [22, 13, 23], "gmm_y": [66, 52, 92], "y": [20, 21, 66, 92]},
    ]
