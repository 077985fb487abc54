from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from commfuse import local
from commfuse.errors import ArgumentError


def _norm(logits: list[float], norm_type: int) -> list[float]:
    if norm_type == 1:
        return [1 / (1 + math.exp(-v)) for v in logits]
    total = sum(math.exp(v) for v in logits)
    return [math.exp(v) / total for v in logits]


def _choose(rank: list[float], k: int, k_group: int, group_count: int, mode: int) -> list[int]:
    size = len(rank) // group_count
    groups = [rank[g * size : (g + 1) * size] for g in range(group_count)]
    scores = [max(g) if mode == 0 else sum(sorted(g)[-2:]) for g in groups]
    stay = sorted(range(group_count), key=lambda g: (-scores[g], g))[:k_group]
    allowed = [e for e in range(len(rank)) if e // size in stay]
    return sorted(allowed, key=lambda e: (-rank[e], e))[:k]


@pytest.mark.parametrize("norm_type", [0, 1])
@pytest.mark.parametrize(("k_group", "group_count", "mode"), [(1, 1, 0), (2, 4, 0), (2, 4, 1), (3, 3, 1)])
@pytest.mark.parametrize("biased", [False, True])
def test_top_k(norm_type: int, k_group: int, group_count: int, mode: int, biased: bool) -> None:
    generator = torch.Generator().manual_seed(group_count)
    x = torch.randn(9, 12, generator=generator)
    bias = torch.randn(12, generator=generator) if biased else None
    y, expert_idx, norm = local.npu_moe_gating_top_k(
        x,
        3,
        bias=bias,
        k_group=k_group,
        group_count=group_count,
        group_select_mode=mode,
        norm_type=norm_type,
        routed_scaling_factor=2.5,
        out_flag=True,
    )
    assert (y.dtype, expert_idx.dtype, norm.dtype) == (torch.float32, torch.int32, torch.float32)
    for token in range(9):
        wanted_norm = _norm(x[token].tolist(), norm_type)
        rank = [v + (bias[e].item() if bias is not None else 0.0) for e, v in enumerate(wanted_norm)]
        chosen = _choose(rank, 3, k_group, group_count, mode)
        total = sum(wanted_norm[e] for e in chosen) + 1e-20 if norm_type == 1 else 1.0
        assert expert_idx[token].tolist() == chosen
        torch.testing.assert_close(y[token], torch.tensor([wanted_norm[e] / total * 2.5 for e in chosen]))
        torch.testing.assert_close(norm[token], torch.tensor(wanted_norm))


def test_top_k_lower_id_first_among_equals() -> None:
    x = torch.zeros(2, 64)
    x[1, 40:] = 1.0
    _, expert_idx, _ = local.npu_moe_gating_top_k(x, 4)
    assert expert_idx.tolist() == [[0, 1, 2, 3], [40, 41, 42, 43]]
    _, grouped, _ = local.npu_moe_gating_top_k(x, 4, k_group=2, group_count=8, group_select_mode=1)
    assert grouped.tolist() == [[0, 1, 2, 3], [40, 41, 42, 43]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_top_k_keeps_the_type_and_computes_in_float32(dtype: torch.dtype) -> None:
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    y, expert_idx, norm = local.npu_moe_gating_top_k(x, 2, norm_type=1)
    wide, wide_idx, _ = local.npu_moe_gating_top_k(x.float(), 2, norm_type=1)
    assert norm.dtype == torch.float32
    assert torch.equal(y, wide.to(dtype))
    assert torch.equal(expert_idx, wide_idx)


def test_top_k_of_a_view() -> None:
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(2)).t()
    call: dict[str, Any] = {"k": 2, "k_group": 2, "group_count": 4, "norm_type": 1}
    for view, copy in zip(local.npu_moe_gating_top_k(x, **call), local.npu_moe_gating_top_k(x.contiguous(), **call), strict=True):
        assert torch.equal(view, copy)


def test_top_k_is_differentiable() -> None:
    x = torch.randn(3, 6, requires_grad=True)
    local.npu_moe_gating_top_k(x, 2, norm_type=1)[0][:, 0].sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"renorm": 1}, ("renorm = 1", "must be 0", "after the call")),
        ({"norm_type": 2}, ("norm_type = 2", "0 or 1")),
        ({"group_select_mode": 2}, ("group_select_mode = 2", "0 or 1")),
        ({"group_count": 5}, ("group_count = 5", "a divisor of E = 8")),
        ({"group_count": 2, "k_group": 3}, ("k_group = 3", "1..2")),
        ({"group_count": 4, "k": 3}, ("k = 3", "1..2", "the 1 groups that stay hold 2 experts each")),
        ({"group_count": 8, "group_select_mode": 1, "k": 1}, ("E / group_count = 1", "at least 2")),
        ({"k": 0}, ("k = 0", "1..8")),
        ({"k": 9}, ("k = 9", "1..8")),
        ({"bias": torch.zeros(7)}, ("bias.shape = (7,)", "(8,)")),
        ({"input_ids": torch.zeros(2)}, ("input_ids = (2,) float32", "None", "hash")),
        ({"tid2eid": torch.zeros(2, 2)}, ("tid2eid = (2, 2) float32", "None", "hash")),
        ({"x": torch.zeros(8)}, ("x.dim() = 1", "must be 2")),
    ],
)
def test_top_k_refused(arguments: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(ArgumentError) as caught:
        local.npu_moe_gating_top_k(**{"x": torch.zeros(2, 8), "k": 2, **arguments})
    for word in ("npu_moe_gating_top_k: 1 broken rule", *words):
        assert word in str(caught.value)


@pytest.mark.parametrize("shape", [(7, 6), (2, 3, 6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_softmax(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(8)).to(dtype)
    y, expert_idx, row_idx = local.npu_moe_gating_top_k_softmax(x, k=2)
    assert y.shape == expert_idx.shape == row_idx.shape == (*shape[:-1], 2)
    num_tokens = x.numel() // 6
    for token, logits in enumerate(x.view(-1, 6).tolist()):
        wanted = _norm(logits, 0)
        chosen = sorted(range(6), key=lambda e: (-logits[e], e))[:2]
        assert expert_idx.view(-1, 2)[token].tolist() == chosen
        torch.testing.assert_close(y.view(-1, 2)[token], torch.tensor([wanted[e] for e in chosen]).to(dtype))
        assert row_idx.view(-1, 2)[token].tolist() == [token, num_tokens + token]


def test_softmax_finished_tokens_go_to_no_expert() -> None:
    x = torch.tensor([[0.0, 3.0, 1.0], [5.0, 0.0, 0.0]])
    finished: Tensor = torch.tensor([False, True])
    _, expert_idx, _ = local.npu_moe_gating_top_k_softmax(x, finished, 2)
    assert expert_idx.tolist() == [[1, 2], [3, 3]]
    assert expert_idx.dtype == torch.int32


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"k": 4}, ("k = 4", "1..3")),
        ({"k": 0}, ("k = 0", "1..3")),
        ({"finished": torch.zeros(3, dtype=torch.bool)}, ("finished.shape = (3,)", "(2,)")),
        ({"finished": torch.zeros(2)}, ("finished.dtype = float32", "bool")),
        ({"x": torch.zeros(3)}, ("x.dim() = 1", "2 or 3")),
    ],
)
def test_softmax_refused(arguments: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(ArgumentError) as caught:
        local.npu_moe_gating_top_k_softmax(**{"x": torch.zeros(2, 3), **arguments})
    for word in ("npu_moe_gating_top_k_softmax: 1 broken rule", *words):
        assert word in str(caught.value)
