"""Calls of the matmul operators whose results are known to the last bit: small whole numbers, so that no sum is rounded."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from commfuse import ops
from commfuse.checking.matmul import ALL_GATHER_MM, GMM_ALLTOALLV, Matmul
from commfuse.operators import OPERATORS
from commfuse.operators.all_gather_mm.cases import AllReduceCase, BarrierCase, GatherScatterCase
from commfuse.operators.gmm_alltoallv.cases import GmmCase

MATMUL: dict[str, Matmul] = {family.name: family for family in (*GMM_ALLTOALLV, *ALL_GATHER_MM)}
CASES: dict[str, Any] = {
    "npu_gmm_alltoallv": GmmCase(id="", largest=9, H1=64, N1=48, BS=3),
    "npu_alltoallv_gmm": GmmCase(id="", operator="alltoallv_gmm", largest=9, H1=64, N1=48, BS=3, permute_out_flag=True),
    "npu_all_gather_base_mm": GatherScatterCase(id="", m=9, k=64, n=33, bias=True),
    "npu_mm_reduce_scatter_base": GatherScatterCase(id="", operator="mm_reduce_scatter_base", m=9, k=64, n=33, bias=True),
    "npu_mm_all_reduce_base": AllReduceCase(id="", rows=(3, 7), k=64, n=33, bias=True, x3=True),
    "_npu_distribute_barrier": BarrierCase(id=""),
}


def everyones_args(operator: str, world_size: int, seed: int) -> list[dict[str, Any]]:
    """Every rank's arguments, without the group's name."""
    case = type(CASES[operator])(**{**vars(CASES[operator]), "world_size": world_size, "seed": seed})
    return [_whole(case.args(rank)) for rank in range(world_size)]


def call(operator: str, args: dict[str, Any]) -> list[Any]:
    """Call ``operator`` on the group of all ranks; the outputs."""
    group = {OPERATORS[operator].group: dist.group.WORLD.group_name}
    found = getattr(ops, operator)(**args, **group)
    return list(found) if isinstance(found, tuple) else [found]


def expected(operator: str, ranks: list[dict[str, Any]], rank: int) -> list[Any]:
    """What ``operator`` should return on ``rank``."""
    golden = getattr(MATMUL[operator].goldens, operator.removeprefix("_").removeprefix("npu_"))
    return [tensor for tensor, _ in golden(ranks)[rank]]


def is_right(operator: str, rank: int, world_size: int, seed: int = 0) -> bool:
    """Whether one call returns what it should, bit for bit."""
    ranks = everyones_args(operator, world_size, seed)
    return same(call(operator, ranks[rank]), expected(operator, ranks, rank))


def same(found: list[Any], wanted: list[Any]) -> bool:
    return all((a is None and b is None) or torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def _whole(args: dict[str, Any]) -> dict[str, Any]:
    return {
        name: (4 * value).round() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in args.items()
    }
