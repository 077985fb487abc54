"""A small MoE layer that every rank can call, with its own inputs from a seed; experts that double their rows."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

import commfuse

HIDDEN, TOP_K, EXPERTS = 64, 2, 8


def inputs(rank: int, num_tokens: int = 4, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    x = torch.randn(num_tokens, HIDDEN, generator=generator).bfloat16()
    keys = torch.rand(num_tokens, EXPERTS, generator=generator)
    return x, keys.argsort(1)[:, :TOP_K].int().contiguous(), torch.rand(num_tokens, TOP_K, generator=generator)


def common(rank: int, world_size: int, **changes: Any) -> dict[str, Any]:
    group = str(dist.group.WORLD.group_name)
    return {"group_ep": group, "ep_world_size": world_size, "ep_rank_id": rank, "moe_expert_num": EXPERTS, **changes}


def dispatch(rank: int, world_size: int, seed: int = 0, num_tokens: int = 4, **changes: Any) -> tuple[torch.Tensor, ...]:
    x, ids, _ = inputs(rank, num_tokens, seed)
    return commfuse.npu_moe_distribute_dispatch_v2(**{"x": x, "expert_ids": ids, **common(rank, world_size), **changes})


def combine(
    rank: int, world_size: int, out: tuple[torch.Tensor, ...], y: torch.Tensor, seed: int = 0, num_tokens: int = 4, **changes: Any
) -> torch.Tensor:
    _, ids, weights = inputs(rank, num_tokens, seed)
    args = {
        "expand_x": y,
        "expert_ids": ids,
        "assist_info_for_combine": out[2],
        "ep_send_counts": out[4],
        "expert_scales": weights,
    }
    return commfuse.npu_moe_distribute_combine_v2(**{**args, **common(rank, world_size), **changes})


def expected(rank: int, num_tokens: int = 4, seed: int = 0, factor: float = 2) -> torch.Tensor:
    x, _, weights = inputs(rank, num_tokens, seed)
    total = torch.zeros(x.shape)
    for k in range(TOP_K):
        total += (x * factor).float() * weights[:, k : k + 1]
    return total.to(x.dtype)
