from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from commfuse import local
from commfuse.errors import ArgumentError


def quantised_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Row by row from the formula: scale = max / 127, ints = rint(row / scale)."""
    ints = torch.zeros(rows.shape, dtype=torch.int8)
    scales = torch.zeros(rows.size(0))
    for r, row in enumerate(rows.float()):
        scales[r] = float(np.float32(max(abs(v) for v in row.tolist())) / np.float32(127))
        for c, value in enumerate(row):
            ints[r, c] = round(float(np.float32(value.item()) / np.float32(scales[r].item()))) if scales[r] > 0 else 0
    return ints, scales


def _rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dynamic_quant(dtype: torch.dtype) -> None:
    x = _rows(7, 12).to(dtype)
    x[3] = 0
    ints, scale = local.npu_dynamic_quant(x)
    wanted_ints, wanted_scale = quantised_rows(x)
    assert ints.dtype == torch.int8
    assert scale.dtype == torch.float32
    assert torch.equal(ints, wanted_ints)
    assert torch.equal(scale, wanted_scale)
    assert ints.abs().amax(-1).tolist() == [127, 127, 127, 0, 127, 127, 127]


def test_dynamic_quant_ties_go_to_even() -> None:
    ints, scale = local.npu_dynamic_quant(torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]]))
    assert scale.tolist() == [1.0]
    assert ints.tolist() == [[127, 0, 2, 2, 0, -2]]


def test_dynamic_quant_scale_multiplies() -> None:
    x = _rows(5, 33, seed=2)
    ints, scale = local.npu_dynamic_quant(x)
    assert ((ints.float() * scale.unsqueeze(1) - x).abs() <= scale.unsqueeze(1) * 0.5001).all()


def test_dynamic_quant_with_smooth_scales_and_more_dimensions() -> None:
    x, smooth = _rows(2, 3, 8).bfloat16(), _rows(8, seed=3).bfloat16()
    ints, scale = local.npu_dynamic_quant(x, smooth_scales=smooth, dst_type=torch.int8)
    wanted_ints, wanted_scale = quantised_rows(x.view(6, 8).float() * smooth.float())
    assert torch.equal(ints.view(6, 8), wanted_ints)
    assert torch.equal(scale.view(6), wanted_scale)


def test_dynamic_quant_with_groups_leaves_the_tail_alone() -> None:
    x, smooth = _rows(9, 4), _rows(3, 4, seed=5)
    ends = [2, 2, 6]
    x[6:] = torch.nan
    ints, scale = local.npu_dynamic_quant(x, smooth_scales=smooth, group_index=torch.tensor(ends, dtype=torch.int32))
    for row in range(6):
        group = next(g for g, end in enumerate(ends) if row < end)
        wanted_ints, wanted_scale = quantised_rows((x[row] * smooth[group]).unsqueeze(0))
        assert torch.equal(ints[row], wanted_ints[0])
        assert scale[row] == wanted_scale[0]
    assert not ints[6:].any()
    assert not scale[6:].any()


def test_dynamic_quant_nan_and_infinity_stay_in_their_row() -> None:
    x = _rows(4, 6)
    clean = local.npu_dynamic_quant(x)
    x[1, 2], x[2, 0] = torch.nan, torch.inf
    ints, scale = local.npu_dynamic_quant(x)
    assert scale[1].isnan()
    assert scale[2].isinf()
    assert torch.equal(ints[[0, 3]], clean[0][[0, 3]])
    assert torch.equal(scale[[0, 3]], clean[1][[0, 3]])


def test_dynamic_quant_of_a_row_too_small_for_a_scale() -> None:
    ints, scale = local.npu_dynamic_quant(torch.tensor([[1e-44, -1e-44, 0.0]]))
    assert scale.tolist() == [0.0]
    assert ints.tolist() == [[127, -127, 0]]


def test_dynamic_quant_without_rows() -> None:
    ints, scale = local.npu_dynamic_quant(torch.zeros(0, 8))
    assert ints.shape == (0, 8)
    assert scale.shape == (0,)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"dst_type": torch.quint4x2}, ("dst_type = quint4x2", "None or int8")),
        ({"dst_type": 16}, ("dst_type = quint4x2", "4-bit")),
        ({"quant_mode": "perchannel"}, ("quant_mode = 'perchannel'", "'pertoken'")),
        ({"dst_type_max": 15.0}, ("dst_type_max = 15.0",)),
        ({"smooth_scales": torch.ones(5)}, ("smooth_scales.shape = (5,)", "(H,) = (4,)")),
        ({"group_index": torch.tensor([3])}, ("group_index", "None without smooth_scales")),
        (
            {"smooth_scales": torch.ones(2, 4), "group_index": torch.tensor([2, 1])},
            ("group_index = [2, 1]", "not decreasing, at most 3"),
        ),
        ({"smooth_scales": torch.ones(2, 4), "group_index": torch.tensor([2, 4])}, ("at most 3 rows",)),
        ({"smooth_scales": torch.ones(4, 4), "group_index": torch.tensor([2, 3])}, ("smooth_scales.shape", "(2, 4)")),
        ({"input": torch.zeros(4)}, ("input.dim() = 1",)),
    ],
)
def test_dynamic_quant_refused(arguments: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(ArgumentError) as caught:
        local.npu_dynamic_quant(**{"input": torch.zeros(3, 4), **arguments})
    for word in ("npu_dynamic_quant: 1 broken rule", *words):
        assert word in str(caught.value)


def _dequantised(x: Tensor, weight_scale: Tensor, activation_scale: Tensor, left: bool, smooth: Tensor | None) -> Tensor:
    """Loop over one row at a time: dequantise, swiglu, smooth."""
    half = x.size(1) // 2
    out = torch.zeros(x.size(0), half)
    for r in range(x.size(0)):
        f = [(x[r, c].float() * weight_scale[r, c] * activation_scale[r]).item() for c in range(2 * half)]
        a, b = (f[:half], f[half:]) if left else (f[half:], f[:half])
        for c in range(half):
            out[r, c] = a[c] / (1 + math.exp(-a[c])) * b[c] * (1.0 if smooth is None else smooth[r, c].item())
    return out


def _close(got: tuple[Tensor, Tensor], wanted: Tensor) -> None:
    """The loop's float64 exponential may differ in the last bit, and so an int at a tie."""
    ints, scale = quantised_rows(wanted)
    assert (got[0].int() - ints.int()).abs().max() <= 1
    assert (got[0] != ints).sum() <= 1
    torch.testing.assert_close(got[1], scale, rtol=1e-6, atol=0)


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("smooth", [False, True])
def test_dequant_swiglu_quant_with_groups(left: bool, smooth: bool) -> None:
    counts, tail = [2, 0, 3], 2
    rows = sum(counts) + tail
    generator = torch.Generator().manual_seed(3)
    x = torch.randint(-3000, 3000, (rows, 8), dtype=torch.int32, generator=generator)
    weight_scale = torch.rand(3, 8, generator=generator) * 0.01
    activation_scale = torch.rand(rows, generator=generator) * 0.1
    activation_scale[-tail:] = torch.nan
    quant_scale = torch.rand(3, 4, generator=generator).bfloat16() if smooth else None
    ints, scale = local.npu_dequant_swiglu_quant(
        x,
        weight_scale=weight_scale,
        activation_scale=activation_scale.unsqueeze(1),
        quant_scale=quant_scale,
        group_index=torch.tensor(counts),
        activate_left=left,
        quant_mode=1,
    )
    group = [0, 0, 2, 2, 2]
    smooth_rows = None if quant_scale is None else quant_scale.float()[group]
    wanted = _dequantised(x[:5], weight_scale[group], activation_scale, left, smooth_rows)
    _close((ints[:5], scale[:5]), wanted)
    assert not ints[5:].any()
    assert not scale[5:].any()


def test_dequant_swiglu_quant_without_groups_adds_a_bias_first() -> None:
    generator = torch.Generator().manual_seed(4)
    x = torch.randint(-3000, 3000, (4, 6), dtype=torch.int32, generator=generator)
    bias = torch.randint(-500, 500, (6,), dtype=torch.int32, generator=generator)
    weight_scale, activation_scale = torch.rand(1, 6, generator=generator) * 0.01, torch.rand(4, generator=generator)
    got = local.npu_dequant_swiglu_quant(
        x, weight_scale=weight_scale, activation_scale=activation_scale, bias=bias, activate_left=True, quant_mode=1
    )
    _close(got, _dequantised(x + bias, weight_scale.expand(4, 6), activation_scale, True, None))


def test_dequant_swiglu_quant_of_floats_is_swiglu_and_quant() -> None:
    x = _rows(5, 8, seed=6).bfloat16()
    got = local.npu_dequant_swiglu_quant(x, activate_left=True, quant_mode=1, dst_type=1)
    _close(got, _dequantised(x, torch.ones(5, 8), torch.ones(5), True, None))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"quant_mode": 0}, ("quant_mode = 0", "must be 1", "static")),
        ({"swiglu_mode": 1}, ("swiglu_mode = 1", "must be 0")),
        ({"activate_dim": 0}, ("activate_dim = 0", "None or -1 or 1")),
        ({"round_mode": 2}, ("round_mode = 2", "half to even")),
        ({"dst_type": 16}, ("dst_type = quint4x2",)),
        ({"quant_offset": torch.zeros(1)}, ("quant_offset = (1,) float32", "None")),
        ({"weight_scale": None}, ("weight_scale = None", "a tensor")),
        ({"activation_scale": torch.ones(2)}, ("activation_scale.shape = (2,)", "(3,)")),
        ({"weight_scale": torch.ones(2, 8)}, ("weight_scale.shape = (2, 8)", "(8,) or (1, 8)")),
        ({"bias": torch.ones(8)}, ("bias.dtype = float32", "int32")),
        (
            {"group_index": torch.tensor([2, 2]), "weight_scale": torch.ones(2, 8)},
            ("group_index = [2, 2]", "at most 3"),
        ),
        ({"group_index": torch.tensor([-1, 2]), "weight_scale": torch.ones(2, 8)}, ("group_index = [-1, 2]",)),
        ({"x": torch.zeros(3, 7, dtype=torch.int32)}, ("x.size(1) = 7", "even")),
        ({"x": torch.zeros(3, 8)}, ("weight_scale", "a float x is not dequantised")),
    ],
)
def test_dequant_swiglu_quant_refused(arguments: dict[str, Any], words: tuple[str, ...]) -> None:
    call: dict[str, Any] = {
        "x": torch.zeros(3, 8, dtype=torch.int32),
        "weight_scale": torch.ones(8),
        "activation_scale": torch.ones(3),
        "quant_mode": 1,
    }
    with pytest.raises(ArgumentError) as caught:
        local.npu_dequant_swiglu_quant(**{**call, **arguments})
    for word in ("npu_dequant_swiglu_quant: ", *words):
        assert word in str(caught.value)


def test_every_broken_rule_is_in_one_message() -> None:
    with pytest.raises(ArgumentError) as caught:
        local.npu_dequant_swiglu_quant(torch.zeros(3, 8, dtype=torch.int32), swiglu_mode=2)
    text = str(caught.value)
    assert "4 broken rules" in text
    for word in (
        "x            (3, 8) int32",
        "quant_mode = 0",
        "swiglu_mode = 2",
        "weight_scale = None",
        "activation_scale = None",
    ):
        assert word in text
