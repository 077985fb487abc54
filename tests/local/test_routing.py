from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from commfuse import local
from commfuse.errors import ArgumentError

from .test_quant import quantised_rows


def _ids(num_tokens: int, k: int, num_experts: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(num_experts, generator=generator)[:k] for _ in range(num_tokens)]).int()


def _sorted_pairs(ids: Tensor, first: int, end: int) -> list[int]:
    """Pairs of the active experts, by expert and then by pair."""
    flat = ids.flatten().tolist()
    return sorted((p for p in range(len(flat)) if first <= flat[p] < end), key=lambda p: (flat[p], p))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8])
@pytest.mark.parametrize("active", [[], [2, 5], [7, 8]])
@pytest.mark.parametrize("active_num", [-1, 0, 4, 1000])
def test_init_routing(dtype: torch.dtype, active: list[int], active_num: int) -> None:
    x = (torch.randn(6, 5, generator=torch.Generator().manual_seed(1)) * 50).to(dtype)
    scale = torch.rand(6)
    ids = _ids(6, 3, 8)
    first, end = active or (0, 8)
    rows, row_idx, counts, row_scale = local.npu_moe_init_routing_v2(
        x,
        ids,
        scale=scale,
        active_num=active_num,
        expert_num=8,
        expert_tokens_num_type=1,
        expert_tokens_num_flag=True,
        active_expert_range=active,
    )
    pairs = _sorted_pairs(ids, first, end)
    size = min(active_num, 18) if active_num > 0 else 18
    assert rows.shape == (size, 5)
    assert rows.dtype == dtype
    assert row_scale.shape == (size,)
    for r in range(size):
        if r < len(pairs):
            assert torch.equal(rows[r], x[pairs[r] // 3])
            assert row_scale[r] == scale[pairs[r] // 3]
        else:
            assert not rows[r].any()
            assert row_scale[r] == 0
    assert row_idx.dtype == torch.int32
    assert row_idx.tolist() == [pairs.index(p) if p in pairs else -1 for p in range(18)]
    assert counts.dtype == torch.int64
    assert counts.tolist() == [int((ids == e).sum()) for e in range(first, end)]


def test_init_routing_pair_of_row() -> None:
    ids = _ids(5, 2, 6, seed=3)
    x = torch.randn(5, 3)
    rows, pair_of_row, _, _ = local.npu_moe_init_routing_v2(x, ids, expert_num=6, row_idx_type=1, active_expert_range=[1, 4])
    pairs = _sorted_pairs(ids, 1, 4)
    assert pair_of_row[: len(pairs)].tolist() == pairs
    assert torch.equal(rows[: len(pairs)], x[torch.tensor(pairs) // 2])


def test_init_routing_token_counts() -> None:
    ids = torch.tensor([[1, 4], [4, 6], [1, 4]], dtype=torch.int32)

    def counts(kind: int, active: list[int]) -> list[Any]:
        out: list[Any] = local.npu_moe_init_routing_v2(
            torch.zeros(3, 2),
            ids,
            expert_num=7,
            expert_tokens_num_type=kind,
            expert_tokens_num_flag=True,
            active_expert_range=active,
        )[2].tolist()
        return out

    assert counts(0, []) == [0, 2, 2, 2, 5, 5, 6]
    assert counts(1, []) == [0, 2, 0, 0, 3, 0, 1]
    assert counts(2, []) == [[1, 2], [4, 3], [6, 1], [0, 0], [0, 0], [0, 0], [0, 0]]
    assert counts(0, [1, 5]) == [2, 2, 2, 5]
    assert counts(2, [3, 5]) == [[4, 3], [0, 0], [0, 0], [0, 0], [0, 0], [0, 0], [0, 0]]
    without = local.npu_moe_init_routing_v2(torch.zeros(3, 2), ids, expert_num=7)
    assert without[2].shape == ()


@pytest.mark.parametrize("smooth", [None, "one", "each"])
def test_init_routing_quantises(smooth: str | None) -> None:
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(2)).bfloat16()
    ids = _ids(5, 2, 6, seed=9)
    scale = None if smooth is None else torch.rand(1 if smooth == "one" else 3, 6) + 0.5
    rows, _, _, row_scale = local.npu_moe_init_routing_v2(
        x, ids, scale=scale, expert_num=6, quant_mode=1, active_expert_range=[1, 4]
    )
    pairs = _sorted_pairs(ids, 1, 4)
    assert 0 < len(pairs) < 10
    for r, pair in enumerate(pairs):
        expert = int(ids.flatten()[pair]) - 1
        factor = torch.ones(6) if scale is None else scale[0 if smooth == "one" else expert]
        ints, wanted_scale = quantised_rows((x[pair // 2].float() * factor).unsqueeze(0))
        assert torch.equal(rows[r], ints[0])
        assert row_scale[r] == wanted_scale[0]
    assert rows.dtype == torch.int8
    assert not rows[len(pairs) :].any()
    assert not row_scale[len(pairs) :].any()


def test_init_routing_reads_no_inactive_token() -> None:
    """Padded tokens carry ids outside the experts, and anything in their rows."""
    x = torch.tensor([[1.0], [torch.nan], [3.0]])
    ids = torch.tensor([[0], [2147483647], [-5]], dtype=torch.int32)
    for quant_mode in (-1, 1):
        rows, row_idx, counts, _ = local.npu_moe_init_routing_v2(
            x, ids, expert_num=4, expert_tokens_num_type=1, expert_tokens_num_flag=True, quant_mode=quant_mode
        )
        assert rows.flatten().tolist() == ([1.0, 0.0, 0.0] if quant_mode < 0 else [127, 0, 0])
        assert row_idx.tolist() == [0, -1, -1]
        assert counts.tolist() == [1, 0, 0, 0]


def test_init_routing_without_tokens() -> None:
    rows, row_idx, counts, scale = local.npu_moe_init_routing_v2(
        torch.zeros(0, 4),
        torch.zeros(0, 2, dtype=torch.int32),
        expert_num=3,
        expert_tokens_num_type=1,
        expert_tokens_num_flag=True,
    )
    assert (rows.shape, row_idx.shape, scale.shape) == ((0, 4), (0,), (0,))
    assert counts.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"expert_num": -1}, ("expert_num = -1", "above 0")),
        ({"drop_pad_mode": 1}, ("drop_pad_mode = 1", "must be 0", "capacity")),
        ({"quant_mode": 0}, ("quant_mode = 0", "-1 or 1")),
        ({"expert_tokens_num_type": 3}, ("expert_tokens_num_type = 3", "0 or 1 or 2")),
        ({"row_idx_type": 2}, ("row_idx_type = 2", "0 or 1")),
        ({"active_num": -2}, ("active_num = -2", "-1 or more")),
        ({"active_expert_range": [2, 7]}, ("active_expert_range = [2, 7]", "end <= 6")),
        ({"active_expert_range": [3, 3]}, ("active_expert_range = [3, 3]",)),
        ({"active_expert_range": [3]}, ("active_expert_range = [3]",)),
        ({"offset": torch.zeros(1)}, ("offset = (1,) float32",)),
        ({"x_dtype": 290}, ("x_dtype = 290",)),
        ({"scale": torch.zeros(2)}, ("scale.shape = (2,)", "(3,)")),
        ({"scale": torch.zeros(2, 4), "quant_mode": 1}, ("scale.shape = (2, 4)", "(6, 4) or (1, 4)")),
        ({"expert_idx": torch.zeros(2, 2, dtype=torch.int32)}, ("expert_idx.size(0) = 2", "must be 3")),
        ({"x": torch.zeros(3, 4, dtype=torch.int8), "quant_mode": 1}, ("x.dtype = int8",)),
    ],
)
def test_init_routing_refused(arguments: dict[str, Any], words: tuple[str, ...]) -> None:
    call = {"x": torch.zeros(3, 4), "expert_idx": torch.zeros(3, 2, dtype=torch.int32), "expert_num": 6}
    with pytest.raises(ArgumentError) as caught:
        local.npu_moe_init_routing_v2(**{**call, **arguments})
    for word in ("npu_moe_init_routing_v2: 1 broken rule", *words):
        assert word in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
@pytest.mark.parametrize("seed", range(4))
def test_re_routing(dtype: torch.dtype, kind: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, 3, (4, 3), generator=generator).to(kind)
    total = int(counts.sum())
    tokens = torch.randint(-100, 100, (total + 2, 5), generator=generator).to(dtype)
    scales = torch.rand(total + 2, generator=generator)
    moved, moved_scales, index, num = local.npu_moe_re_routing(tokens, counts, per_token_scales=scales)
    start = {(r, e): int(counts.flatten()[: r * 3 + e].sum()) for r in range(4) for e in range(3)}
    order = [start[r, e] + i for e in range(3) for r in range(4) for i in range(int(counts[r, e]))]
    assert torch.equal(moved[:total], tokens[order])
    assert torch.equal(moved_scales[:total], scales[order])
    assert index.tolist() == [*order, total, total + 1]
    assert index.dtype == torch.int32
    assert num.tolist() == counts.sum(0).tolist()
    assert num.dtype == kind
    assert not moved[total:].any()
    assert not moved_scales[total:].any()
    assert torch.equal(moved.index_select(0, index.float().argsort().int())[:total], tokens[:total])


def test_re_routing_tail_may_hold_anything() -> None:
    tokens = torch.tensor([[1.0], [2.0], [torch.nan]])
    moved, scales, _, _ = local.npu_moe_re_routing(
        tokens, torch.tensor([[0, 1], [1, 0]]), per_token_scales=torch.tensor([[1.0], [2.0], [torch.nan]])
    )
    assert moved.flatten().tolist() == [2.0, 1.0, 0.0]
    assert scales.flatten().tolist() == [2.0, 1.0, 0.0]
    assert local.npu_moe_re_routing(tokens, torch.tensor([[3]]))[1].tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"expert_token_num_type": 0}, ("expert_token_num_type = 0", "must be 1", "cumsum")),
        ({"idx_type": 1}, ("idx_type = 1", "must be 0", "argsort")),
        ({"tokens_dtype": 1}, ("tokens_dtype = 1", "None")),
        ({"per_token_scales": torch.ones(2)}, ("per_token_scales.size(0) = 2", "must be 4")),
        (
            {"expert_token_num_per_rank": torch.tensor([[3, 2]])},
            ("expert_token_num_per_rank = [3, 2]", "at most 4"),
        ),
        (
            {"expert_token_num_per_rank": torch.tensor([[-1, 2]])},
            ("expert_token_num_per_rank = [-1, 2]", "at least 0"),
        ),
        ({"expert_token_num_per_rank": torch.tensor([2, 2])}, ("expert_token_num_per_rank.dim() = 1",)),
    ],
)
def test_re_routing_refused(arguments: dict[str, Any], words: tuple[str, ...]) -> None:
    call = {"tokens": torch.ones(4, 2), "expert_token_num_per_rank": torch.tensor([[2, 2]])}
    with pytest.raises(ArgumentError) as caught:
        local.npu_moe_re_routing(**{**call, **arguments})
    for word in ("npu_moe_re_routing: 1 broken rule", *words):
        assert word in str(caught.value)
