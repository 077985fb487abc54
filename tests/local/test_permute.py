from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from commfuse import local
from commfuse.errors import ArgumentError


def _tokens(num_tokens: int, hidden: int, seed: int = 0) -> Tensor:
    return torch.randn(num_tokens, hidden, generator=torch.Generator().manual_seed(seed))


def test_published_example() -> None:
    """The rows of the npu_moe_token_permute page, and the index that brings them back."""
    tokens = torch.tensor([[1, 1, 1], [2, 2, 2], [3, 3, 3], [0, 0, 0]]).bfloat16()
    indices = torch.tensor([[0, 4], [4, 3], [4, 2], [1, 1]])
    rows, where = local.npu_moe_token_permute(tokens, indices, indices.numel())
    assert rows[:, 0].tolist() == [1, 0, 0, 3, 2, 1, 2, 3]
    assert where.dtype == torch.int32
    assert where.tolist() == [0, 5, 6, 4, 7, 3, 1, 2]
    back = local.npu_moe_token_unpermute(rows, where, probs=torch.full((4, 2), 0.5).bfloat16())
    assert torch.equal(back, tokens)


@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
@pytest.mark.parametrize("limit", [None, 0, 5, 100, -3])
def test_permute(kind: torch.dtype, limit: int | None) -> None:
    tokens = _tokens(6, 3)
    indices = torch.randint(0, 4, (6, 2), generator=torch.Generator().manual_seed(1)).to(kind)
    rows, where = local.npu_moe_token_permute(tokens, indices, num_out_tokens=limit)
    pairs = sorted(range(12), key=lambda p: (indices.view(-1)[p].item(), p))
    kept = pairs[: {None: 12, 0: 12, 5: 5, 100: 12, -3: 9}[limit]]
    assert torch.equal(rows, torch.stack([tokens[p // 2] for p in kept]))
    assert where.tolist() == [pairs.index(p) for p in range(12)]


def test_permute_of_one_expert_per_token() -> None:
    rows, where = local.npu_moe_token_permute(torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([2, 0, 1]))
    assert rows.flatten().tolist() == [2, 3, 1]
    assert where.tolist() == [2, 0, 1]
    assert torch.equal(local.npu_moe_token_unpermute(rows, where), torch.tensor([[1.0], [2.0], [3.0]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("probs_dtype", [torch.float32, torch.bfloat16])
def test_unpermute(dtype: torch.dtype, probs_dtype: torch.dtype) -> None:
    rows, probs = _tokens(12, 5, seed=2).to(dtype), _tokens(4, 3, seed=3).to(probs_dtype)
    where = torch.randperm(12, generator=torch.Generator().manual_seed(4)).to(torch.int32)
    out = local.npu_moe_token_unpermute(rows, where, probs)
    for token in range(4):
        total = torch.zeros(5)
        for k in range(3):
            total = total + probs[token, k].float() * rows[where[token * 3 + k]].float()
        assert torch.equal(out[token], total.to(dtype))


def test_unpermute_skips_dropped_rows() -> None:
    """What lies beyond the kept rows, or stands in for them, is not looked at."""
    tokens = torch.tensor([[1.0], [2.0]])
    rows, where = local.npu_moe_token_permute(tokens, torch.tensor([[0, 1], [1, 0]]), num_out_tokens=2)
    back = local.npu_moe_token_unpermute(rows, where, torch.ones(2, 2))
    assert back.flatten().tolist() == [1.0, 2.0]
    back = local.npu_moe_token_unpermute(torch.tensor([[torch.nan], [7.0]]), torch.tensor([1, -1]), torch.ones(1, 2))
    assert back.item() == 7.0
    assert local.npu_moe_token_unpermute(torch.zeros(0, 1), torch.tensor([1, 0])).flatten().tolist() == [0, 0]


def test_unpermute_takes_strided_indices() -> None:
    rows, probs = _tokens(6, 2), torch.rand(3, 2)
    strided = torch.stack((torch.arange(6), torch.zeros(6, dtype=torch.int64)), 1)[:, 0]
    wanted = local.npu_moe_token_unpermute(rows, torch.arange(6), probs)
    assert torch.equal(local.npu_moe_token_unpermute(rows, strided, probs), wanted)


def test_restore_shape_is_ignored() -> None:
    rows = _tokens(4, 2)
    out = local.npu_moe_token_unpermute(rows, torch.arange(4), restore_shape=torch.Size([9, 9]))
    assert torch.equal(out, rows)


def test_gradients_run_the_other_way() -> None:
    tokens = _tokens(4, 3).requires_grad_()
    probs = torch.rand(4, 2, requires_grad=True)
    rows, where = local.npu_moe_token_permute(tokens, torch.tensor([[0, 1], [1, 2], [0, 2], [2, 1]]))
    local.npu_moe_token_unpermute(rows, where, probs).sum().backward()
    torch.testing.assert_close(tokens.grad, probs.detach().sum(1, keepdim=True).expand(4, 3))
    torch.testing.assert_close(probs.grad, tokens.detach().sum(1, keepdim=True).expand(4, 2))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"padded_mode": True}, ("padded_mode = True", "must be False")),
        ({"indices": torch.zeros(3, 2, dtype=torch.int64)}, ("indices.size(0) = 3", "must be 4")),
        ({"indices": torch.zeros(4, 2)}, ("indices.dtype = float32", "int32 or int64")),
        ({"tokens": torch.zeros(4, 2, 2)}, ("tokens.dim() = 3", "must be 2")),
    ],
)
def test_permute_refused(arguments: dict[str, Any], words: tuple[str, ...]) -> None:
    call = {"tokens": torch.zeros(4, 2), "indices": torch.zeros(4, 2, dtype=torch.int64)}
    with pytest.raises(ArgumentError) as caught:
        local.npu_moe_token_permute(**{**call, **arguments})
    for word in ("npu_moe_token_permute: 1 broken rule", *words):
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"padded_mode": True}, ("padded_mode = True", "must be False")),
        ({"probs": torch.zeros(3, 2)}, ("probs.numel() = 6", "must be 4")),
        ({"sorted_indices": torch.zeros(4)}, ("sorted_indices.dtype = float32", "int32 or int64")),
        ({"permuted_tokens": torch.zeros(4, 2, dtype=torch.int8)}, ("permuted_tokens.dtype = int8",)),
    ],
)
def test_unpermute_refused(arguments: dict[str, Any], words: tuple[str, ...]) -> None:
    call = {"permuted_tokens": torch.zeros(4, 2), "sorted_indices": torch.arange(4)}
    with pytest.raises(ArgumentError) as caught:
        local.npu_moe_token_unpermute(**{**call, **arguments})
    for word in ("npu_moe_token_unpermute: 1 broken rule", *words):
        assert word in str(caught.value)
