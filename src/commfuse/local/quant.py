"""Quantisation of rows to int8, alone and after dequantisation and swiglu."""

from __future__ import annotations

import torch
from torch import Tensor

from ._check import FLOATS, INDICES, Rules, as_dtype, readable
from ._rows import group_of_rows
from .activation import swiglu

_INT8 = (None, torch.int8)


def npu_dynamic_quant(
    input: Tensor,
    *,
    smooth_scales: Tensor | None = None,
    group_index: Tensor | None = None,
    dst_type: torch.dtype | int | None = None,
    quant_mode: str = "pertoken",
    dst_type_max: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Quantise every row to int8 with a scale of its own.

    In float32: ``f = input * smooth``, ``scale = max|f| / 127``, ``y = rint(f / scale)`` with ties to even,
    so that ``f`` is about ``y * scale``: the scale multiplies (dispatch divides by its quantisation factor
    instead, which may differ in the last bit). A row of zeros gives zeros and scale 0. A row that holds NaN
    or infinity gives that as its scale, ints that mean nothing, and changes no other row.

    Args:
        input: ``[..., H]``, at least 2 dimensions, float16, bfloat16 or float32. A row is the last dimension.
        smooth_scales: ``[H]``, or ``[E, H]`` with ``group_index``; float16, bfloat16 or float32.
        group_index: ``[E]`` int32 or int64, not decreasing: row r (of all dimensions but the last, flattened)
            uses the smooth row e with ``group_index[e-1] <= r < group_index[e]``. Rows from
            ``group_index[-1]`` on belong to no expert: their ints and scales are zeros, and what they hold
            does not matter.
        dst_type: None or ``torch.int8`` (or its code 1).
        quant_mode: ``"pertoken"``.
        dst_type_max: 0.

    Returns:
        ``y``, int8 of ``input``'s shape, and ``scale``, float32 of ``input``'s shape without the last
        dimension.

    Raises:
        ArgumentError: for other types, modes or shapes, and for a ``group_index`` that decreases or passes
            the rows.
    """
    rules = Rules("npu_dynamic_quant", input=input, smooth_scales=smooth_scales, group_index=group_index)
    rules.only("dst_type", as_dtype(dst_type), _INT8, "4-bit and 8-bit float results are not computed here")
    rules.only("quant_mode", quant_mode, ("pertoken",), "only one scale per row is computed here")
    rules.only("dst_type_max", dst_type_max, (0.0,), "it belongs to float results, which are not computed here")
    if rules.tensor(input, "input", range(2, 9), FLOATS):
        _check_smooth(rules, input, smooth_scales, group_index)
    rules.raise_broken()
    rows = input.float()
    if smooth_scales is None:
        return quantise(rows)
    if group_index is None:
        return quantise(rows * smooth_scales.float())
    group, inside = group_of_rows(group_index, rows.numel() // max(rows.size(-1), 1))
    group, inside = group.view(rows.shape[:-1]), inside.view(rows.shape[:-1])
    return quantise((rows * smooth_scales.float()[group]).masked_fill(~inside.unsqueeze(-1), 0))


def npu_dequant_swiglu_quant(
    x: Tensor,
    *,
    weight_scale: Tensor | None = None,
    activation_scale: Tensor | None = None,
    bias: Tensor | None = None,
    quant_scale: Tensor | None = None,
    quant_offset: Tensor | None = None,
    group_index: Tensor | None = None,
    activate_left: bool = False,
    quant_mode: int = 0,
    dst_type: torch.dtype | int | None = None,
    round_mode: int | None = None,
    activate_dim: int | None = None,
    swiglu_mode: int = 0,
    clamp_limit: float = 7.0,
    glu_alpha: float = 1.702,
    glu_bias: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Dequantise the int32 result of a product, apply swiglu, and quantise each row to int8 again.

    In float32: ``f = (x + bias) * weight_scale * activation_scale`` (``f = x`` for a float ``x``),
    ``g = silu(A) * B`` of the halves of ``f``, ``h = g * quant_scale``, ``scale = max|h| / 127``,
    ``y = rint(h / scale)``, ties to even. Shapes: T rows, H channels after swiglu, E groups.

    Args:
        x: ``[T, 2H]`` int32, or float16, bfloat16 or float32 that needs no dequantisation.
        weight_scale: float32, with an int32 ``x`` only: ``[E, 2H]`` with ``group_index``, else ``[2H]`` or
            ``[1, 2H]``.
        activation_scale: ``[T]`` or ``[T, 1]`` float32, with an int32 ``x`` only: the scale of each row.
        bias: ``[2H]`` or ``[1, 2H]`` int32, with an int32 ``x`` and without ``group_index``; added before the
            scales.
        quant_scale: smooth factors, float16, bfloat16 or float32: ``[E, H]`` with ``group_index``, else
            ``[H]`` or ``[1, H]``.
        quant_offset: None.
        group_index: ``[E]`` int32 or int64, rows per group. Rows past their sum give zeros and scale 0, and
            what they hold does not matter.
        activate_left: True takes A from the left half, False from the right half.
        quant_mode: 1, a scale per row. The published default 0 (static) is not computed here.
        dst_type: None or ``torch.int8`` (or its code 1).
        round_mode: None or 0, round half to even.
        activate_dim: None, -1 or 1: the last dimension.
        swiglu_mode: 0, plain swiglu.
        clamp_limit: ignored: it belongs to ``swiglu_mode`` 1.
        glu_alpha: ignored, likewise.
        glu_bias: ignored, likewise.

    Returns:
        ``y`` ``[T, H]`` int8 and ``scale`` ``[T]`` float32, the multiplier that gives ``h`` back.

    Raises:
        ArgumentError: for other forms, shapes or types, and for a ``group_index`` that is negative or passes
            T.
    """
    rules = Rules("npu_dequant_swiglu_quant", x=x, weight_scale=weight_scale, activation_scale=activation_scale)
    rules.only("quant_mode", quant_mode, (1,), "pass 1, a scale per row; static quantisation is not computed here")
    rules.only("quant_offset", quant_offset, (None,), "it belongs to static quantisation")
    rules.only("dst_type", as_dtype(dst_type), _INT8, "4-bit and 8-bit float results are not computed here")
    rules.only("round_mode", round_mode, (None, 0), "rounding half to even is the only mode computed here")
    rules.only("activate_dim", activate_dim, (None, -1, 1), "move the halves to the last dimension")
    rules.only("swiglu_mode", swiglu_mode, (0,), "the clamped variant is not computed here")
    _check_dequant(rules, x, weight_scale, activation_scale, bias, quant_scale, group_index)
    rules.raise_broken()
    group, inside = None, None
    if group_index is not None:
        group, inside = group_of_rows(group_index.cumsum(0), x.size(0))
    if bias is not None:
        x = x + bias
    rows = x.float()
    if weight_scale is not None and activation_scale is not None:
        rows = rows * _factor(weight_scale, group) * activation_scale.reshape(-1, 1)
    rows = swiglu(rows, activate_left=activate_left)
    if quant_scale is not None:
        rows = rows * _factor(quant_scale, group)
    return quantise(rows if inside is None else rows.masked_fill(~inside.unsqueeze(-1), 0))


def quantise(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return int8 ints and the float32 multiplier of each row of float32 ``rows``."""
    if rows.size(-1) == 0:
        return rows.to(torch.int8), rows.new_zeros(rows.shape[:-1])
    scale = rows.abs().amax(-1) / 127
    # 0/0 and inf/inf are NaN, which no cast to int8 defines.
    ints = (rows / scale.unsqueeze(-1)).round().nan_to_num(nan=0.0).clamp(-127, 127)
    return ints.to(torch.int8), scale


def _factor(scale: Tensor, group: Tensor | None) -> Tensor:
    return scale.float().reshape(-1) if group is None else scale.float()[group]


def _check_smooth(rules: Rules, rows: Tensor, smooth: Tensor | None, group_index: Tensor | None) -> None:
    hidden = rows.size(-1)
    if smooth is None:
        remedy = "it only says which row of smooth_scales to use: pass that too"
        rules.need(group_index is None, "group_index", group_index, "None without smooth_scales", remedy)
    elif group_index is None:
        if rules.tensor(smooth, "smooth_scales", (1,), FLOATS):
            rules.shape("smooth_scales", smooth, "(H,)", (hidden,))
    elif _is_index(rules, group_index) and rules.tensor(smooth, "smooth_scales", (2,), FLOATS):
        rules.shape("smooth_scales", smooth, "(len(group_index), H)", (group_index.size(0), hidden))
        if readable(group_index):
            rules.ends("group_index", group_index.tolist(), rows.numel() // max(hidden, 1))


def _is_index(rules: Rules, group_index: Tensor) -> bool:
    fits = rules.tensor(group_index, "group_index", (1,), INDICES)
    return fits and rules.need(group_index.numel() > 0, "len(group_index)", 0, "at least 1", "None means no groups")


def _check_dequant(
    rules: Rules,
    x: Tensor,
    weight_scale: Tensor | None,
    activation_scale: Tensor | None,
    bias: Tensor | None,
    quant_scale: Tensor | None,
    group_index: Tensor | None,
) -> None:
    if not rules.tensor(x, "x", (2,), (torch.int32, *FLOATS)):
        return
    rows, width = x.shape
    if not rules.need(width % 2 == 0, "x.size(1)", width, "even", "it holds the two halves side by side"):
        return
    groups = group_index.numel() if isinstance(group_index, Tensor) else None
    if x.dtype == torch.int32:
        _check_factor(rules, "weight_scale", weight_scale, groups, width, (torch.float32,))
        if rules.tensor(activation_scale, "activation_scale", (1, 2), (torch.float32,)):
            rules.shape("activation_scale", activation_scale, "(T,)", (rows,), (rows, 1))
    else:
        for name, value in (("weight_scale", weight_scale), ("activation_scale", activation_scale)):
            rules.only(name, value, (None,), "a float x is not dequantised")
    if bias is not None:
        usable = x.dtype == torch.int32 and group_index is None
        remedy = "it needs an int32 x and no group_index; add it in the product instead"
        if rules.need(usable, "bias", bias, "None here", remedy):
            _check_factor(rules, "bias", bias, None, width, (torch.int32,))
    if quant_scale is not None:
        _check_factor(rules, "quant_scale", quant_scale, groups, width // 2, FLOATS)
    if group_index is not None and _is_index(rules, group_index) and readable(group_index):
        rules.counts("group_index", group_index.tolist(), rows)


def _check_factor(
    rules: Rules,
    name: str,
    value: Tensor | None,
    groups: int | None,
    width: int,
    dtypes: tuple[torch.dtype, ...],
) -> None:
    if rules.tensor(value, name, (1, 2), dtypes):
        wanted = [(groups, width)] if groups is not None else [(width,), (1, width)]
        rules.shape(name, value, "one row per group", *wanted)
