"""The calling patterns of two real callers: what they pass, what they leave uninitialised, in which order they call."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

import commfuse as torch_npu
from tests.conftest import RunRanks

WORLD_SIZE, EXPERTS, HIDDEN, TOP_K = 4, 8, 32, 4


def _tokens(rank: int, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rank * 100 + num_tokens)
    x = torch.randn(num_tokens, HIDDEN, generator=generator).bfloat16()
    ids = torch.stack([torch.randperm(EXPERTS, generator=generator)[:TOP_K] for _ in range(num_tokens)]).int()
    return x, ids.view(num_tokens, TOP_K), torch.rand(num_tokens, TOP_K, generator=generator)


def _identity_sum(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """What combine gives when every expert returns its input: float32, k ascending."""
    total = torch.zeros(x.shape)
    for k in range(weights.shape[1]):
        total += x.float() * weights[:, k : k + 1]
    return total.to(x.dtype)


def _serving_engine(rank: int, quantised: bool, uneven: bool) -> bool:
    """Keywords only; tp_world_size=1 with group_tp == group_ep; a mask with global_bs 0, or uneven batches without one."""
    group = str(dist.group.WORLD.group_name)
    n = (rank + 1) * 2 if uneven else 5
    x, ids, weights = _tokens(rank, n)
    active = n if uneven else 3
    common = {
        "expert_shard_type": 0,
        "shared_expert_rank_num": 0,
        "moe_expert_num": EXPERTS,
        "global_bs": 2 * WORLD_SIZE * WORLD_SIZE if uneven else 0,
        "group_ep": group,
        "ep_world_size": WORLD_SIZE,
        "ep_rank_id": rank,
        "group_tp": group,
        "tp_world_size": 1,
        "tp_rank_id": 0,
    }
    if not uneven:
        common["x_active_mask"] = torch.arange(n) < active
        ids[active:] = 2**30  # padded to a common size with whatever the memory held
        weights[active:] = float("nan")
    out = torch_npu.npu_moe_distribute_dispatch_v2(
        x=x, expert_ids=ids, scales=None, quant_mode=2 if quantised else 0, expert_token_nums_type=0, **common
    )
    expand_x, dynamic_scales, assist, group_list, ep_recv_counts, tp_recv_counts, expand_scales = out
    total = int(group_list[-1])
    rows = expand_x.float() * dynamic_scales[:, None] if quantised else expand_x
    y = torch.full((expand_x.shape[0], HIDDEN), float("nan"), dtype=x.dtype)
    y[:total] = rows[:total].to(x.dtype)
    back = torch_npu.npu_moe_distribute_combine_v2(
        expand_x=y,
        expert_ids=ids,
        expert_scales=weights.to(torch.float32),
        assist_info_for_combine=assist,
        ep_send_counts=ep_recv_counts,
        expand_scales=expand_scales,
        tp_send_counts=torch.empty(1, dtype=torch.int32) if quantised else tp_recv_counts,
        comm_quant_mode=0,
        **common,
    )
    expected = _identity_sum(x, weights)[:active]
    bound = 0.05 if quantised else 0.0
    largest = (back[:active].float() - expected.float()).abs().max()
    return bool(largest <= bound * expected.float().abs().max() and not back[active:].any())


def test_serving_engine_pattern(run_ranks: RunRanks) -> None:
    for quantised in (False, True):
        for uneven in (False, True):
            assert run_ranks(WORLD_SIZE, _serving_engine, quantised, uneven) == [True] * WORLD_SIZE


def _padding_library(rank: int) -> list[Any]:
    """Everything padded with uninitialised rows, ids and weights; 1-D mask; expert_scales on every call; result sliced."""
    group = str(dist.group.WORLD.group_name)
    padded, n = 6, rank + 1
    x, ids, weights = _tokens(rank, n)
    wide_x = torch.empty(padded, HIDDEN, dtype=x.dtype).fill_(float("nan"))
    wide_ids = torch.empty(padded, TOP_K, dtype=torch.int32).fill_(-7)
    wide_weights = torch.empty(padded, TOP_K).fill_(float("inf"))
    wide_x[:n], wide_ids[:n], wide_weights[:n] = x, ids, weights
    mask = torch.arange(padded) < n
    found = []
    for _ in range(2):  # layer after layer on one group
        out = torch_npu.npu_moe_distribute_dispatch_v2(
            x=wide_x,
            expert_ids=wide_ids,
            group_ep=group,
            ep_world_size=WORLD_SIZE,
            ep_rank_id=rank,
            moe_expert_num=EXPERTS,
            expert_scales=wide_weights,
            x_active_mask=mask,
            performance_info=None,
            shared_expert_num=0,
            shared_expert_rank_num=0,
            quant_mode=0,
            global_bs=padded * WORLD_SIZE,
            comm_alg="fullmesh_v1",
        )
        back = torch_npu.npu_moe_distribute_combine_v2(
            out[0],
            wide_ids,
            out[2],
            out[4],
            wide_weights,
            group,
            WORLD_SIZE,
            rank,
            EXPERTS,
            tp_send_counts=None,
            x_active_mask=mask,
            expand_scales=out[6],
            shared_expert_num=0,
            global_bs=padded * WORLD_SIZE,
            comm_alg="fullmesh_v1",
        )[:n]
        total = int(out[3].sum())
        found.append(torch.equal(back, _identity_sum(x, weights)) and bool(torch.isfinite(out[6][:total]).all()))
    return found


def test_padding_library_pattern(run_ranks: RunRanks) -> None:
    assert run_ranks(WORLD_SIZE, _padding_library) == [[True, True]] * WORLD_SIZE


def _warm_up(rank: int) -> bool:
    """A warm-up dispatch without its combine, then other sizes on the same group."""
    group = str(dist.group.WORLD.group_name)
    where = (group, WORLD_SIZE, rank, EXPERTS)
    x, ids, weights = _tokens(rank, 1)
    torch_npu.npu_moe_distribute_dispatch_v2(x, ids, *where, quant_mode=2, global_bs=WORLD_SIZE, shared_expert_num=0)
    x, ids, weights = _tokens(rank, 7)
    out = torch_npu.npu_moe_distribute_dispatch_v2(x, ids, *where, global_bs=7 * WORLD_SIZE, zero_expert_num=1)
    back = torch_npu.npu_moe_distribute_combine_v2(
        out[0], ids, out[2], out[4], weights, *where, global_bs=7 * WORLD_SIZE, zero_expert_num=1
    )
    return torch.equal(back, _identity_sum(x, weights))


def test_warm_up_without_combine(run_ranks: RunRanks) -> None:
    assert run_ranks(WORLD_SIZE, _warm_up) == [True] * WORLD_SIZE
