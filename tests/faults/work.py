"""What the ranks do while a fault strikes: one round of calls of each family of operators, with results known to the last bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import commfuse
from tests.backends.cpu import layer, matmul

Round = Callable[[int, int, int], bool]  # rank, world size, seed -> whether every result is right


def user_code() -> None:
    """Stands for what a program does between two calls; a fault of that place is put around it."""


def v2(rank: int, world_size: int, seed: int) -> bool:
    user_code()
    out = layer.dispatch(rank, world_size, seed)
    user_code()
    return torch.equal(layer.combine(rank, world_size, out, out[0] * 2, seed), layer.expected(rank, seed=seed))


def v1(rank: int, world_size: int, seed: int) -> bool:
    user_code()
    x, ids, weights = layer.inputs(rank, seed=seed)
    common = layer.common(rank, world_size)
    out = commfuse.npu_moe_distribute_dispatch(x, ids, **common)
    user_code()
    rows = out[0] * 2
    y = commfuse.npu_moe_distribute_combine(rows, ids, out[2], out[4], weights, **common)
    return torch.equal(y, layer.expected(rank, seed=seed))


def norm(rank: int, world_size: int, seed: int) -> bool:
    """The residual is zero, so that the sum that comes out beside the norm is what combine gives."""
    user_code()
    x, ids, weights = layer.inputs(rank, seed=seed)
    out = layer.dispatch(rank, world_size, seed)
    user_code()
    residual, gamma = torch.zeros(len(x), 1, layer.HIDDEN).bfloat16(), torch.ones(layer.HIDDEN).bfloat16()
    given = {"tp_send_counts": out[5], "expand_scales": out[6], "norm_eps": 1e-5}
    rows = out[0] * 2
    results = commfuse.npu_moe_distribute_combine_add_rms_norm(
        rows, ids, out[2], out[4], weights, residual, gamma, **given, **layer.common(rank, world_size)
    )
    return torch.equal(results[2].flatten(0, 1), layer.expected(rank, seed=seed))


def split(rank: int, world_size: int, seed: int) -> bool:
    user_code()
    x, ids, weights = layer.inputs(rank, seed=seed)
    common = layer.common(rank, world_size)
    y, index, command = commfuse.npu_moe_distribute_dispatch_setup(x, ids, **common)
    user_code()
    rows, _, assist, _ = commfuse.npu_moe_distribute_dispatch_teardown(x, y, ids, command, **common)
    rows = rows * 2
    placeholder, command = commfuse.npu_moe_distribute_combine_setup(rows, ids, assist, **common)
    user_code()
    total = commfuse.npu_moe_distribute_combine_teardown(rows, placeholder, ids, index, weights, command, **common)
    return torch.equal(total, layer.expected(rank, seed=seed))


def _matmul(*operators: str) -> Round:
    def one_round(rank: int, world_size: int, seed: int) -> bool:
        right = []
        for operator in operators:
            user_code()
            right.append(matmul.is_right(operator, rank, world_size, seed))
        return all(right)

    return one_round


ROUNDS: dict[str, Round] = {
    "v2": v2,
    "v1": v1,
    "norm": norm,
    "split": split,
    "gmm": _matmul("npu_gmm_alltoallv", "npu_alltoallv_gmm"),
    "gather": _matmul("npu_all_gather_base_mm"),
    "reduce": _matmul("npu_mm_reduce_scatter_base", "npu_mm_all_reduce_base"),
    "barrier": _matmul("_npu_distribute_barrier"),
}


def round_without(rank: int, world_size: int, living: tuple[int, ...], seed: int) -> bool:
    """Dispatch, combine and a barrier of the ``living`` ranks alone; whether the results are right."""
    table = commfuse.elastic_info(layer.common(rank, world_size)["group_ep"], living, moe_expert_num=layer.EXPERTS)
    left: dict[str, Any] = {"elastic_info": table, "expert_ids": ids_below(int(table[3]), rank, seed)}
    out = layer.dispatch(rank, world_size, seed, **left)
    x = layer.combine(rank, world_size, out, out[0].mul_(2), seed, **left)
    mark = torch.tensor([rank])
    back = commfuse._npu_distribute_barrier(mark, layer.common(rank, world_size)["group_ep"], world_size, elastic_info=table)
    return torch.equal(x, layer.expected(rank, seed=seed)) and torch.equal(back, mark)


def ids_below(experts: int, rank: int, seed: int) -> torch.Tensor:
    """As `layer.inputs` draws them, but for the experts that are left: at least two."""
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    return torch.rand(4, experts, generator=generator).argsort(1)[:, : layer.TOP_K].int().contiguous()
