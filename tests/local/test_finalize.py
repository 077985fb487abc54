from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from commfuse import local
from commfuse.errors import ArgumentError


@pytest.mark.parametrize("mode", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("parts", ["rows", "scales", "skips", "all"])
def test_finalize_routing(mode: int, dtype: torch.dtype, parts: str) -> None:
    tokens, k, hidden, experts = 5, 3, 4, 6
    generator = torch.Generator().manual_seed(mode)

    def values(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    rows = values(2, 8, hidden) if mode in (1, 3) else values(tokens * k, hidden)
    index = torch.randperm(tokens * k, generator=generator).int()
    if mode in (1, 3):
        index[::4] = -1
    scales = values(tokens, k) if parts in ("scales", "all") else None
    skip1 = values(tokens, hidden) if parts in ("skips", "all") else None
    skip2 = values(tokens, hidden) if parts == "all" else None
    bias = values(experts, hidden) if parts == "all" else None
    expert = torch.randint(0, experts, (tokens, k), dtype=torch.int32, generator=generator)
    out = local.npu_moe_finalize_routing(rows, skip1, skip2, bias, scales, index, expert, mode, k)
    flat = rows.reshape(-1, hidden).float()
    for t in range(tokens):
        total = torch.zeros(hidden)
        for skip in (skip1, skip2):
            total = total + (0 if skip is None else skip[t].float())
        for j in range(k):
            at = int(index[j * tokens + t] if mode < 2 else index[t * k + j])
            row = torch.zeros(hidden) if at == -1 else flat[at]
            row = row + (0 if bias is None else bias[expert[t, j]].float())
            total = total + row * (1 if scales is None else scales[t, j].float())
        assert torch.equal(out[t], total.to(dtype))


def test_finalize_routing_takes_fewer_rows_and_float32_scales() -> None:
    rows = torch.tensor([[1.0], [2.0]]).bfloat16()
    index = torch.tensor([0, -1, 1, -1], dtype=torch.int32)
    scales = torch.tensor([[0.5, 9.0], [0.25, 9.0]])
    out = local.npu_moe_finalize_routing(rows, None, None, None, scales, index, None, drop_pad_mode=2)
    assert out.flatten().tolist() == [0.5, 0.5]
    assert out.dtype == torch.bfloat16


def test_finalize_routing_takes_strided_arguments() -> None:
    rows, scales, index = torch.randn(8, 6), torch.rand(2, 4), torch.arange(8)
    plain = local.npu_moe_finalize_routing(rows[:, ::2], None, None, None, scales, index.flip(0), None, 2)
    strided = torch.stack((index.flip(0), index), 1)[:, 0]
    out = local.npu_moe_finalize_routing(rows[:, ::2].contiguous(), None, None, None, scales, strided, None, 2)
    assert torch.equal(out, plain)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"drop_pad_mode": 4}, ("drop_pad_mode = 4", "0 or 1 or 2 or 3")),
        ({"drop_pad_mode": 1}, ("expanded_permuted_rows.dim() = 2", "must be 3")),
        ({"scales": torch.ones(3, 3)}, ("expanded_src_to_dst_row.numel() = 4", "K = 3")),
        ({"scales": torch.ones(3, 2)}, ("scales.shape = (3, 2)", "(2, 2)")),
        ({"skip1": torch.ones(2, 2)}, ("skip1.shape = (2, 2)", "(2, 3)")),
        ({"skip2": torch.ones(2, 3).bfloat16()}, ("skip2.dtype = bfloat16", "float32")),
        ({"bias": torch.ones(6, 3)}, ("export_for_source_row = None",)),
        (
            {"bias": torch.ones(6, 3), "export_for_source_row": torch.full((2, 2), 6)},
            ("export_for_source_row", "6..6", "0..5"),
        ),
        (
            {"expanded_src_to_dst_row": torch.tensor([0, 1, 2, 4])},
            ("expanded_src_to_dst_row.max() = 4", "at most 3"),
        ),
        ({"expanded_src_to_dst_row": torch.tensor([0, 1, 2, -2])}, ("expanded_src_to_dst_row.min() = -2",)),
    ],
)
def test_finalize_routing_refused(arguments: dict[str, Any], words: tuple[str, ...]) -> None:
    call: dict[str, Any] = {
        "expanded_permuted_rows": torch.ones(4, 3),
        "skip1": None,
        "skip2": None,
        "bias": None,
        "scales": torch.ones(2, 2),
        "expanded_src_to_dst_row": torch.arange(4),
        "export_for_source_row": None,
    }
    with pytest.raises(ArgumentError) as caught:
        local.npu_moe_finalize_routing(**{**call, **arguments})
    for word in ("npu_moe_finalize_routing: 1 broken rule", *words):
        assert word in str(caught.value)
