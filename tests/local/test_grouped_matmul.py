from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from commfuse import local
from commfuse.errors import ArgumentError
from commfuse.local.grouped_product import int8_matmul

COUNTS = [2, 0, 3, 1]
TAIL = 2
TOLERANCE = {torch.float32: (1e-6, 1e-6), torch.bfloat16: (2**-7, 1e-2), torch.float16: (2**-10, 1e-3)}


def _random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.int8:
        return torch.randint(-128, 128, shape, generator=generator).to(dtype)
    return torch.randn(*shape, generator=generator).to(dtype)


def _group_list(kind: int) -> Tensor:
    if kind == 0:
        return torch.tensor(COUNTS).cumsum(0)
    return torch.tensor(COUNTS) if kind == 1 else torch.tensor([[0, 2], [2, 3], [3, 1], [0, 0]])


def _group_of_row() -> list[int]:
    return [group for group, count in enumerate(COUNTS) for _ in range(count)]


def _dot(x: Tensor, weight: Tensor) -> Tensor:
    """One row times a weight, in float64, term by term."""
    total = torch.zeros(weight.size(1), dtype=torch.float64)
    for value, row in zip(x.double(), weight.double(), strict=True):
        total += value * row
    return total


def _rows(dtype: torch.dtype, hidden: int = 5) -> Tensor:
    x = _random(sum(COUNTS) + TAIL, hidden, dtype=dtype)
    if dtype != torch.int8:
        x[-TAIL:] = torch.nan
    return x


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("kind", [0, 1, 2])
@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("biased", [False, True])
def test_rows_by_group(dtype: torch.dtype, kind: int, stacked: bool, biased: bool) -> None:
    x, weight, bias = _rows(dtype), _random(4, 5, 3, dtype=dtype, seed=1), _random(4, 3, seed=2)
    weights = [weight] if stacked else list(weight.unbind(0))
    biases = ([bias] if stacked else list(bias.unbind(0))) if biased else None
    results = local.npu_grouped_matmul(
        [x], weights, bias=biases, group_list=_group_list(kind), split_item=2, group_type=0, group_list_type=kind
    )
    assert len(results) == 1
    assert results[0].dtype == dtype
    rtol, atol = TOLERANCE[dtype]
    for row, group in enumerate(_group_of_row()):
        wanted = _dot(x[row], weight[group]) + (bias[group].double() if biased else 0)
        torch.testing.assert_close(results[0][row], wanted.to(dtype), rtol=rtol, atol=atol)
    assert torch.equal(results[0][-TAIL:], torch.zeros(TAIL, 3, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_are_float32_and_rounded_once(dtype: torch.dtype) -> None:
    """1 + 4096 * 2**-12 is 2 in float32; a 16-bit sum would stay at 1."""
    x = torch.cat((torch.ones(1, 1), torch.full((1, 4096), 2.0**-12)), 1).to(dtype)
    out = local.npu_grouped_matmul([x], [torch.ones(1, 4097, 1).to(dtype)], group_list=[1], split_item=3)
    assert out[0].item() == 2.0
    bias = torch.tensor([[-2.0 + 2**-20]])
    out = local.npu_grouped_matmul([x], [torch.ones(1, 4097, 1).to(dtype)], bias=[bias], group_list=[1], split_item=3)
    assert out[0].item() == 2**-20


def test_output_type_may_be_wider() -> None:
    x, weight = _random(2, 8).bfloat16(), _random(1, 8, 3, seed=1).bfloat16()
    for wanted in (torch.float32, 6):
        (out,) = local.npu_grouped_matmul([x], [weight], group_list=[2], split_item=2, output_dtype=wanted)
        assert torch.equal(out, x.float() @ weight[0].float())


def test_transposed_weight_views() -> None:
    x, stored = _rows(torch.float32), _random(4, 3, 5, seed=1)
    call: dict[str, Any] = {"group_list": _group_list(1), "split_item": 2, "group_type": 0, "group_list_type": 1}
    (view,) = local.npu_grouped_matmul([x], [stored.transpose(1, 2)], **call)
    (copy,) = local.npu_grouped_matmul([x], [stored.transpose(1, 2).contiguous()], **call)
    torch.testing.assert_close(view, copy)


@pytest.mark.parametrize("size", [5, 1024, 1025, 3000])
def test_int8_sums_are_exact(size: int) -> None:
    x, weight = _random(3, size, dtype=torch.int8), _random(size, 4, dtype=torch.int8, seed=1)
    assert torch.equal(int8_matmul(x, weight), (x.long() @ weight.long()).int())
    for extreme in (-128, 127):
        rows = torch.full((1, size), extreme, dtype=torch.int8)
        assert int8_matmul(rows, rows.t()).item() == extreme * extreme * size


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize("out", [torch.bfloat16, torch.float16, torch.float32])
def test_int8_with_scales(stacked: bool, per_token: bool, out: torch.dtype) -> None:
    x, weight = _rows(torch.int8), _random(4, 5, 3, dtype=torch.int8, seed=1)
    bias = torch.randint(-99, 99, (4, 3), dtype=torch.int32, generator=torch.Generator().manual_seed(2))
    scale, token_scale = torch.rand(4, 3).bfloat16() * 0.01, torch.rand(sum(COUNTS) + TAIL)
    token_scale[-TAIL:] = torch.nan

    def given(tensor: Tensor) -> list[Tensor]:
        return [tensor] if stacked else list(tensor.unbind(0))

    (result,) = local.npu_grouped_matmul(
        [x],
        given(weight),
        bias=given(bias),
        scale=given(scale),
        per_token_scale=[token_scale] if per_token else None,
        group_list=_group_list(0),
        split_item=3,
        group_type=0,
        output_dtype=out,
    )
    for row, group in enumerate(_group_of_row()):
        total = (_dot(x[row], weight[group]) + bias[group]).float() * scale[group].float()
        wanted = total * token_scale[row] if per_token else total
        assert torch.equal(result[row], wanted.to(out))
    assert torch.equal(result[-TAIL:], torch.zeros(TAIL, 3, dtype=out))


def test_int8_plain_sums() -> None:
    x, weight = _rows(torch.int8), _random(4, 5, 3, dtype=torch.int8, seed=1)
    (out,) = local.npu_grouped_matmul(
        [x], [weight], group_list=_group_list(1), split_item=3, group_type=0, group_list_type=1, output_dtype=torch.int32
    )
    for row, group in enumerate(_group_of_row()):
        assert torch.equal(out[row], _dot(x[row], weight[group]).int())
    assert not out[-TAIL:].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("offset", [True, False])
def test_int8_weights_with_a_float_x(dtype: torch.dtype, offset: bool) -> None:
    x, weight = _rows(dtype), _random(4, 5, 3, dtype=torch.int8, seed=1)
    scale, shift = _random(4, 3, dtype=dtype, seed=2) * 0.01, _random(4, 3, dtype=dtype, seed=3)
    (out,) = local.npu_grouped_matmul(
        [x],
        [weight],
        antiquant_scale=[scale],
        antiquant_offset=[shift] if offset else None,
        group_list=_group_list(1),
        split_item=2,
        group_type=0,
        group_list_type=1,
    )
    for row, group in enumerate(_group_of_row()):
        real = (weight[group].double() + (shift[group].double() if offset else 0)) * scale[group].double()
        torch.testing.assert_close(out[row], _dot(x[row], real).to(dtype), rtol=2**-7, atol=1e-3)


def test_one_x_per_weight() -> None:
    xs = [_random(2, 4), _random(3, 2, 5), _random(0, 3)]
    weights = [_random(4, 3, seed=1), _random(5, 2, seed=2), _random(3, 7, seed=3)]
    biases = [_random(w.size(1), seed=4) for w in weights]
    for group_type in (-1, None):
        results = local.npu_grouped_matmul(xs, weights, bias=biases, group_type=group_type)
        assert [tuple(r.shape) for r in results] == [(2, 3), (3, 2, 2), (0, 7)]
        for x, weight, bias, result in zip(xs, weights, biases, results, strict=True):
            for row, out in zip(x.reshape(-1, x.size(-1)), result.reshape(-1, weight.size(1)), strict=True):
                torch.testing.assert_close(out, (_dot(row, weight) + bias).float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("group_list", [None, torch.tensor([2, 2, 5]), [2, 2, 5]])
def test_several_x_in_one_result(group_list: Any) -> None:
    xs, weights = [_random(2, 4), _random(0, 4), _random(3, 4, seed=5)], list(_random(3, 4, 6, seed=1).unbind(0))
    (out,) = local.npu_grouped_matmul(xs, weights, group_list=group_list, split_item=2, group_type=0)
    wanted = torch.stack([_dot(row, w) for x, w in zip(xs, weights, strict=True) for row in x])
    torch.testing.assert_close(out, wanted.float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_gradient_of_the_weights(kind: int, dtype: torch.dtype) -> None:
    x, grad = _rows(dtype), _rows(dtype, hidden=3)
    (out,) = local.npu_grouped_matmul(
        [x.t()], [grad], group_list=_group_list(kind), split_item=3, group_type=2, group_list_type=kind
    )
    wanted = torch.zeros(4, 5, 3, dtype=torch.float64)
    for row, group in enumerate(_group_of_row()):
        wanted[group] += x[row].double().unsqueeze(1) * grad[row].double()
    rtol, atol = TOLERANCE[dtype]
    torch.testing.assert_close(out, wanted.to(dtype), rtol=rtol, atol=atol)
    assert not out[1].any()


def test_pairs_stop_at_the_first_zero_and_name_any_order() -> None:
    x, weight = _random(3, 4), _random(4, 4, 2, seed=1)
    pairs = torch.tensor([[3, 2], [1, 1], [0, 0], [777, 777]])
    (out,) = local.npu_grouped_matmul([x], [weight], group_list=pairs, split_item=2, group_type=0, group_list_type=2)
    for row, group in enumerate([3, 3, 1]):
        torch.testing.assert_close(out[row], _dot(x[row], weight[group]).float(), rtol=1e-6, atol=1e-6)


def test_no_rows_at_all() -> None:
    (out,) = local.npu_grouped_matmul(
        [torch.zeros(0, 4)], [torch.ones(3, 4, 2)], group_list=torch.zeros(3, dtype=torch.int64), split_item=2, group_type=0
    )
    assert out.shape == (0, 2)


def _call() -> dict[str, Any]:
    return {
        "x": [torch.ones(4, 3)],
        "weight": [torch.ones(2, 3, 5)],
        "group_list": torch.tensor([2, 3]),
        "split_item": 2,
        "group_type": 0,
    }


def _int8() -> dict[str, Any]:
    return {"x": [torch.ones(4, 3, dtype=torch.int8)], "weight": [torch.ones(2, 3, 5, dtype=torch.int8)]}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"x": torch.ones(4, 3)}, ("x = (4, 3) float32", "a list of tensors", "x=[tensor]")),
        ({"weight": []}, ("weight = []", "a list of tensors")),
        ({"split_item": 0}, ("split_item = 0", "2 or 3")),
        ({"group_type": 1}, ("group_type = 1", "-1 or 0 or 2")),
        ({"group_type": None}, ("group_type = None", "-1 or 0 or 2")),
        ({"group_list_type": 3}, ("group_list_type = 3", "0 or 1 or 2")),
        ({"act_type": 5}, ("act_type = 5", "None or 0", "npu_swiglu")),
        ({"offset": [torch.ones(1)]}, ("offset = [(1,) float32] (1 tensors)", "None", "reserved")),
        ({"activation_input": [torch.ones(1)]}, ("activation_input", "reserved")),
        ({"activation_quant_scale": [torch.ones(1)]}, ("activation_quant_scale", "reserved")),
        ({"activation_quant_offset": [torch.ones(1)]}, ("activation_quant_offset", "reserved")),
        ({"x_dtype": 290}, ("x_dtype = 290", "None")),
        ({"weight_dtype": 290}, ("weight_dtype = 290", "None")),
        ({"scale_dtype": 290}, ("scale_dtype = 290", "None")),
        ({"per_token_scale_dtype": 290}, ("per_token_scale_dtype = 290", "None")),
        ({"output_dtype": torch.int32}, ("output_dtype = int32", "None or float16")),
        ({"output_dtype": 99}, ("output_dtype = 99",)),
        ({"x": [torch.ones(4, 2)]}, ("weight[0].size(-2) = 3", "must be 2, K of x", "transposed view")),
        ({"x": [torch.ones(4, 3).bfloat16()]}, ("types of x and weight = ('bfloat16', 'float32')", "same float type")),
        ({"x": [torch.ones(3)]}, ("x[0].dim() = 1",)),
        ({"x": [torch.ones(4, 3, dtype=torch.int32)]}, ("x[0].dtype = int32",)),
        ({"bias": [torch.ones(5)]}, ("bias[0].dim() = 1", "must be 2")),
        ({"bias": [torch.ones(2, 4)]}, ("bias[0].shape = (2, 4)", "(E, N) = (2, 5)")),
        ({"bias": torch.ones(2, 5)}, ("bias = (2, 5) float32", "bias=[tensor]")),
        ({"bias": [torch.ones(2, 5)] * 2}, ("len(bias) = 2", "must be 1")),
        ({"scale": [torch.ones(2, 5)]}, ("scale", "must be None", "int8 x")),
        ({"per_token_scale": [torch.ones(4)]}, ("per_token_scale", "must be None", "int8 x")),
        ({"antiquant_scale": [torch.ones(2, 5)]}, ("antiquant_scale", "must be None", "int8 weights")),
        ({"weight": [torch.ones(2, 3, 5, dtype=torch.int8)]}, ("antiquant_scale = None", "a list per weight")),
        ({"group_list": None}, ("group_list = None", "a tensor")),
        ({"group_list": torch.tensor([2, 3, 4])}, ("len(group_list) = 3", "must be 2")),
        ({"group_list": torch.tensor([2.0, 3.0])}, ("group_list.dtype = float32", "int32 or int64")),
        ({"group_list": torch.tensor([3, 2])}, ("group_list = [3, 2]", "not decreasing")),
        ({"group_list": torch.tensor([3, 5])}, ("group_list = [3, 5]", "at most 4 rows")),
        ({"group_list": torch.tensor([-1, 2])}, ("group_list = [-1, 2]",)),
        ({"group_list": torch.tensor([3, 2]), "group_list_type": 1}, ("group_list = [3, 2]", "at most 4 rows")),
        ({"group_list": torch.tensor([[2, 1]]), "group_list_type": 2}, ("group_list[:, 0] = [2]", "in 0..1")),
        ({"group_list": torch.tensor([[0, 1, 0]]), "group_list_type": 2}, ("group_list.size(1) = 3", "must be 2")),
        (_int8(), ("output_dtype = None", "int32 or float16")),
        ({**_int8(), "output_dtype": torch.bfloat16}, ("scale = None", "a list per weight")),
        ({**_int8(), "output_dtype": torch.int32, "scale": [torch.ones(2, 5)]}, ("scale", "None with output_dtype int32")),
        (
            {**_int8(), "output_dtype": torch.bfloat16, "scale": [torch.ones(2, 5, dtype=torch.int64)]},
            ("scale[0].dtype = int64", "float32 or bfloat16"),
        ),
        (
            {**_int8(), "output_dtype": torch.bfloat16, "scale": [torch.ones(2, 5)], "per_token_scale": [torch.ones(3)]},
            ("per_token_scale[0].shape = (3,)", "(4,)"),
        ),
        ({**_int8(), "output_dtype": torch.int32, "bias": [torch.ones(2, 5)]}, ("bias[0].dtype = float32", "int32")),
        ({"group_type": -1, "split_item": 0, "weight": [torch.ones(3, 5)]}, ("group_list", "None with group_type -1")),
        (
            {"group_type": -1, "split_item": 0, "weight": [torch.ones(3, 5)] * 2, "group_list": None},
            ("len(x), len(weight) = (1, 2)", "equal"),
        ),
        ({"group_type": 2, "weight": [torch.ones(4, 5)]}, ("weight[0].size(0) = 4", "must be 3, T of x")),
        (
            {"group_type": 2, "weight": [torch.ones(3, 5)], "bias": [torch.ones(5)]},
            ("bias", "None with group_type 2"),
        ),
        ({"x": [torch.ones(2, 3)] * 2, "weight": [torch.ones(3, 5)] * 2}, ("rows per group in group_list = [2, 1]", "[2, 2]")),
    ],
)
def test_refused(arguments: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(ArgumentError) as caught:
        local.npu_grouped_matmul(**{**_call(), **arguments})
    for word in ("npu_grouped_matmul: 1 broken rule", *words):
        assert word in str(caught.value)


def test_every_broken_rule_is_in_one_message() -> None:
    with pytest.raises(ArgumentError) as caught:
        local.npu_grouped_matmul(**{**_call(), "split_item": 1, "act_type": 1, "x": [torch.ones(4, 2)], "x_dtype": 3})
    text = str(caught.value)
    assert "4 broken rules" in text
    for word in ("x            [(4, 2) float32]", "group_list   (2,) int64", "split_item = 1", "act_type = 1", "x_dtype = 3"):
        assert word in text


def test_no_gradient_is_pretended() -> None:
    weight = torch.ones(2, 3, 5, requires_grad=True)
    (out,) = local.npu_grouped_matmul(**{**_call(), "weight": [weight]})
    with pytest.raises(RuntimeError, match="local_grouped_matmul"):
        out.sum().backward()
