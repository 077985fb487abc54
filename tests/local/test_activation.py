from __future__ import annotations

import math

import pytest
import torch

from commfuse import local
from commfuse.errors import ArgumentError


def _swiglu(a: float, b: float) -> float:
    return a / (1 + math.exp(-a)) * b


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [-1, 0, 1])
def test_formula(dtype: torch.dtype, dim: int) -> None:
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(1)).to(dtype)
    out = local.npu_swiglu(x, dim)
    half = x.size(dim) // 2
    a, b = x.narrow(dim, 0, half), x.narrow(dim, half, half)
    wanted = [[_swiglu(p, q) for p, q in zip(r, s, strict=True)] for r, s in zip(a.tolist(), b.tolist(), strict=True)]
    torch.testing.assert_close(out, torch.tensor(wanted).to(dtype), rtol=1e-6 if dtype == torch.float32 else 0, atol=0)


def test_default_is_the_last_dimension_and_views_are_taken() -> None:
    x = torch.randn(3, 5, 8).transpose(0, 1)
    torch.testing.assert_close(local.npu_swiglu(x), local.npu_swiglu(x.contiguous(), dim=2), rtol=0, atol=0)
    assert local.npu_swiglu(x).shape == (5, 3, 4)


def test_rows_do_not_touch_each_other() -> None:
    x = torch.ones(3, 4)
    x[1] = torch.nan
    assert torch.isfinite(local.npu_swiglu(x)[[0, 2]]).all()


def test_differentiable() -> None:
    x = torch.randn(2, 4, requires_grad=True)
    local.npu_swiglu(x).sum().backward()
    a, b = x.detach().chunk(2, -1)
    s = torch.sigmoid(a)
    torch.testing.assert_close(x.grad, torch.cat((b * s * (1 + a * (1 - s)), a * s), -1))


@pytest.mark.parametrize(
    ("x", "dim", "words"),
    [
        (torch.zeros(2, 5), -1, ("input.size(dim) = 5", "even")),
        (torch.zeros(2, 4), 2, ("dim = 2", "-2..1")),
        (torch.zeros(2, 4, dtype=torch.int32), -1, ("input.dtype = int32", "float16 or bfloat16 or float32")),
        ([1.0, 2.0], -1, ("input = [1.0, 2.0]", "a tensor")),
    ],
)
def test_refused(x: torch.Tensor, dim: int, words: tuple[str, ...]) -> None:
    with pytest.raises(ArgumentError) as caught:
        local.npu_swiglu(x, dim)
    for word in ("npu_swiglu: 1 broken rule", *words):
        assert word in str(caught.value)
