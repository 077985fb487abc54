"""Whole MoE layers in the idiom of torch_npu's callers, against a loop over tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from commfuse import local

from .test_quant import quantised_rows

NUM_TOKENS, HIDDEN, INNER, EXPERTS, K = 11, 16, 12, 6, 2


@dataclass(frozen=True, kw_only=True)
class Layer:
    x: Tensor
    logits: Tensor
    w13: Tensor
    w2: Tensor


def _layer(dtype: torch.dtype, seed: int) -> Layer:
    generator = torch.Generator().manual_seed(seed)

    def values(*shape: int, factor: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * factor).to(dtype)

    return Layer(
        x=values(NUM_TOKENS, HIDDEN),
        logits=values(NUM_TOKENS, EXPERTS),
        w13=values(EXPERTS, HIDDEN, 2 * INNER, factor=0.3),
        w2=values(EXPERTS, INNER, HIDDEN, factor=0.3),
    )


def _expert(layer: Layer, row: Tensor, expert: int) -> Tensor:
    gate, up = (row.double() @ layer.w13[expert].double()).chunk(2)
    return (gate * torch.sigmoid(gate) * up) @ layer.w2[expert].double()


def _naive(layer: Layer, first: int = 0, end: int = EXPERTS) -> Tensor:
    """Token by token: softmax, the K best, their experts, the weighted sum. In float64."""
    out = torch.zeros(NUM_TOKENS, HIDDEN, dtype=torch.float64)
    for t in range(NUM_TOKENS):
        weights = torch.softmax(layer.logits[t].double(), 0)
        for expert in sorted(range(EXPERTS), key=lambda e: -float(weights[e]))[:K]:
            if first <= expert < end:
                out[t] += weights[expert] * _expert(layer, layer.x[t], expert)
    return out


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
@pytest.mark.parametrize("back", ["finalize", "unpermute"])
@pytest.mark.parametrize("count_type", [0, 1, 2])
@pytest.mark.parametrize("active", [[0, EXPERTS], [2, 4]])
def test_float_layer(dtype: torch.dtype, tolerance: float, back: str, count_type: int, active: list[int]) -> None:
    """gating, init_routing, grouped matmul, swiglu, grouped matmul, finalize_routing or token_unpermute."""
    layer = _layer(dtype, seed=count_type)
    if active[0] > 0 and count_type == 2:
        active = [0, 4]  # pairs name experts by their global id, which is a weight's place only from 0 on
    topk_weights, topk_ids, _ = local.npu_moe_gating_top_k(layer.logits, K)
    rows, row_idx, counts, _ = local.npu_moe_init_routing_v2(
        layer.x,
        topk_ids,
        active_num=NUM_TOKENS * K,
        expert_num=EXPERTS,
        expert_tokens_num_type=count_type,
        expert_tokens_num_flag=True,
        active_expert_range=active,
        quant_mode=-1,
    )
    call: dict[str, Any] = {"split_item": 2, "group_type": 0, "group_list_type": count_type}
    mine = slice(active[0], active[1])
    (rows,) = local.npu_grouped_matmul([rows], [layer.w13[mine]], group_list=counts, **call)
    rows = local.npu_swiglu(rows)
    (rows,) = local.npu_grouped_matmul([rows], [layer.w2[mine]], group_list=counts, **call)
    if back == "finalize":
        out = local.npu_moe_finalize_routing(rows, None, None, None, topk_weights, row_idx, None, drop_pad_mode=2)
    else:
        here = (topk_ids >= active[0]) & (topk_ids < active[1])
        out = local.npu_moe_token_unpermute(rows, row_idx.abs(), topk_weights * here)
    torch.testing.assert_close(out.double(), _naive(layer, *active), rtol=tolerance, atol=tolerance)


def test_layer_by_permute_and_expert_counts() -> None:
    """The all-to-all idiom on one rank: permute, products over a list of weights, unpermute; then its gradient."""
    layer = _layer(torch.float32, seed=5)
    y, ids, _ = local.npu_moe_gating_top_k_softmax(layer.logits, None, K)
    rows, where = local.npu_moe_token_permute(layer.x, ids)
    counts = torch.bincount(ids.flatten(), minlength=EXPERTS)
    parts = list(rows.split(counts.tolist()))
    hidden = local.npu_grouped_matmul(parts, list(layer.w13.unbind(0)), group_type=-1)
    hidden = [local.npu_swiglu(h) for h in hidden]
    (rows,) = local.npu_grouped_matmul(hidden, list(layer.w2.unbind(0)), group_type=0, split_item=2)
    out = local.npu_moe_token_unpermute(rows, where, y)
    torch.testing.assert_close(out.double(), _naive(layer), rtol=1e-5, atol=1e-5)


def _quantised_weights(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 weights and a float32 scale per expert and output channel."""
    scale = weight.abs().amax(1) / 127
    return (weight / scale.unsqueeze(1)).round().to(torch.int8), scale


@pytest.mark.parametrize("fused", [True, False])
def test_int8_layer(fused: bool) -> None:
    """dynamic_quant, grouped matmul to int32, dequant_swiglu_quant, grouped matmul with both scales.

    Not fused: grouped matmul to bfloat16, swiglu, dynamic_quant. The buffer is longer than its valid rows.
    """
    layer, counts, tail = _layer(torch.float32, seed=7), [3, 0, 2, 4, 1, 1], 3
    w13, scale13 = _quantised_weights(layer.w13)
    w2, scale2 = _quantised_weights(layer.w2)
    x = torch.cat((layer.x.bfloat16(), torch.full((tail, HIDDEN), torch.nan).bfloat16()))
    group_list = torch.tensor(counts)
    call: dict[str, Any] = {"group_list": group_list, "split_item": 3, "group_type": 0, "group_list_type": 1}

    rows, token_scale = local.npu_dynamic_quant(x)
    if fused:
        (sums,) = local.npu_grouped_matmul([rows], [w13], output_dtype=torch.int32, **call)
        hidden, hidden_scale = local.npu_dequant_swiglu_quant(
            sums,
            weight_scale=scale13,
            activation_scale=token_scale,
            group_index=group_list,
            activate_left=True,
            quant_mode=1,
        )
    else:
        (gate_up,) = local.npu_grouped_matmul(
            [rows], [w13], scale=[scale13], per_token_scale=[token_scale], output_dtype=torch.bfloat16, **call
        )
        hidden, hidden_scale = local.npu_dynamic_quant(local.npu_swiglu(gate_up))
    (out,) = local.npu_grouped_matmul(
        [hidden], [w2], scale=[scale2], per_token_scale=[hidden_scale], output_dtype=torch.bfloat16, **call
    )

    experts = [e for e, count in enumerate(counts) for _ in range(count)]
    for row, expert in enumerate(experts):
        exact = _expert(layer, layer.x[row].bfloat16(), expert)
        wanted = _int8_expert(x[row], w13[expert], scale13[expert], w2[expert], scale2[expert])
        slack = 0.02 if fused else 0.05
        torch.testing.assert_close(out[row].float(), wanted, rtol=slack, atol=slack * float(wanted.abs().max()))
        assert (out[row].double() - exact).abs().max() < 0.1 * exact.abs().max()
    assert torch.equal(out[-tail:], torch.zeros(tail, HIDDEN).bfloat16())


def _int8_expert(row: Tensor, w13: Tensor, scale13: Tensor, w2: Tensor, scale2: Tensor) -> Tensor:
    """One row through the int8 chain, with integer sums."""
    ints, scale = quantised_rows(row.unsqueeze(0))
    gate, up = ((ints[0].long() @ w13.long()).float() * scale13 * scale).chunk(2)
    ints, scale = quantised_rows((gate / (1 + torch.exp(-gate)) * up).unsqueeze(0))
    return (ints[0].long() @ w2.long()).float() * scale2 * scale


def test_experts_of_several_ranks() -> None:
    """re_routing brings what came in by rank into the order of the experts, and its index takes it back."""
    layer = _layer(torch.float32, seed=9)
    per_rank = torch.tensor([[2, 0, 1, 1, 0, 1], [1, 1, 0, 1, 2, 1]])
    experts = [e for rank in per_rank.tolist() for e, count in enumerate(rank) for _ in range(count)]
    assert len(experts) == NUM_TOKENS
    rows, _, index, counts = local.npu_moe_re_routing(layer.x, per_rank)
    call: dict[str, Any] = {"group_list": counts, "split_item": 2, "group_type": 0, "group_list_type": 1}
    (hidden,) = local.npu_grouped_matmul([rows], [layer.w13], **call)
    (rows,) = local.npu_grouped_matmul([local.npu_swiglu(hidden)], [layer.w2], **call)
    back = rows.index_select(0, index.float().argsort().int())
    for row, expert in enumerate(experts):
        torch.testing.assert_close(back[row].double(), _expert(layer, layer.x[row], expert), rtol=1e-5, atol=1e-5)
