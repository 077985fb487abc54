"""The products of all experts in one call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._check import as_dtype
from .grouped_product import Factors, forward, product, weight_gradient
from .grouped_rules import Call, check, check_sizes


def npu_grouped_matmul(
    x: Sequence[Tensor],
    weight: Sequence[Tensor],
    *,
    bias: Sequence[Tensor] | None = None,
    scale: Sequence[Tensor] | None = None,
    offset: Sequence[Tensor] | None = None,
    antiquant_scale: Sequence[Tensor] | None = None,
    antiquant_offset: Sequence[Tensor] | None = None,
    per_token_scale: Sequence[Tensor] | None = None,
    group_list: Tensor | Sequence[int] | None = None,
    activation_input: Sequence[Tensor] | None = None,
    activation_quant_scale: Sequence[Tensor] | None = None,
    activation_quant_offset: Sequence[Tensor] | None = None,
    split_item: int | None = 0,
    group_type: int | None = None,
    group_list_type: int | None = 0,
    act_type: int | None = 0,
    tuning_config: Sequence[int] | None = None,
    output_dtype: torch.dtype | int | None = None,
    x_dtype: int | None = None,
    weight_dtype: int | None = None,
    scale_dtype: int | None = None,
    per_token_scale_dtype: int | None = None,
) -> list[Tensor]:
    """Multiply groups of rows by one weight each.

    Shapes: T rows, K channels in, N channels out, E groups. The forms, by ``group_type`` and ``split_item``:

    * 0 with 2 or 3: one x ``[T, K]`` and one weight ``[E, K, N]``, or E weights ``[K, N]``, give one
      ``[T, N]``: the rows of group g times weight g.
    * 0 with 2 or 3: E x ``[T_i, K]`` and E weights ``[K, N]`` give one ``[sum of T_i, N]``.
    * -1 with 0 or 1: E x ``[..., K_i]`` and E weights ``[K_i, N_i]`` give E results ``[..., N_i]``.
    * 2 with 2 or 3: one x ``[K, T]`` and one weight ``[T, N]`` give one ``[E, K, N]``: the columns of group g
      of x times the rows of group g of weight. This is the gradient of the weights.

    Rows past the last group give zeros, and what they hold does not matter; a group without rows or columns
    gives an empty product, zeros for ``group_type`` 2. Views, transposed ones among them, are taken as they
    are.

    Arithmetic: sums in float32, rounded once. int8 times int8 sums exactly in int32; then
    ``y = (sum + bias) * scale * per_token_scale`` in float32. A float ``x`` with int8 weights multiplies by
    ``(weight + antiquant_offset) * antiquant_scale``.

    A *list per weight* has one tensor ``[E, N]`` for one 3-D weight, else a tensor ``[N]`` for each weight.

    Args:
        x: list of float16, bfloat16, float32 or int8.
        weight: list, in ``x``'s type; int8 also with a float ``x`` and ``antiquant_scale``.
        bias: list per weight, float16, bfloat16 or float32, with int8 ``x`` int32; not with ``group_type`` 2.
        scale: list per weight, float32 or bfloat16, with int8 ``x`` and a float ``output_dtype``.
        antiquant_scale: list per weight, float16, bfloat16 or float32, with float ``x`` and int8 weights.
        antiquant_offset: likewise; None is 0.
        per_token_scale: one ``[T]`` float32 for each x, with int8 ``x`` and ``scale``.
        group_list: ``[E]`` int32 or int64, or ``[n, 2]`` with ``group_list_type`` 2; or a list of ints:
            prefix sums. None with ``group_type`` -1; may be None with several x, and else says how many rows
            each has.
        split_item: see the table.
        group_type: see the table. None means 0 with a list of ints, and -1 without ``group_list``.
        group_list_type: 0 prefix sums, 1 counts, 2 pairs of group and count up to the first count of 0.
        act_type: 0.
        tuning_config: ignored, a hint for the hardware.
        output_dtype: type of the result, or its code. None means ``x``'s type if that is a float. int8 ``x``
            needs int32 (the plain sums, without ``scale``) or a float type (with ``scale``).
        offset: None; reserved in torch_npu as well.
        activation_input: None, likewise.
        activation_quant_scale: None, likewise.
        activation_quant_offset: None, likewise.
        x_dtype: None: 4-bit and 8-bit float types are not computed here.
        weight_dtype: None, likewise.
        scale_dtype: None, likewise.
        per_token_scale_dtype: None, likewise.

    Returns:
        A list of one tensor, or of E with ``group_type`` -1. Not differentiable, as in torch_npu.

    Raises:
        ArgumentError: for other forms, types or shapes, with all broken rules in one message; also for a
            ``group_list`` that decreases, is negative, or passes the rows: in compiled code when it runs.
    """
    given = None if group_list is None else _as_tensor(group_list)
    call = Call(
        x=x,
        weight=weight,
        bias=_given(bias),
        scale=_given(scale),
        antiquant_scale=_given(antiquant_scale),
        antiquant_offset=_given(antiquant_offset),
        per_token_scale=_given(per_token_scale),
        group_list=given,
        group_type=_group_type(group_type, group_list),
        group_list_type=group_list_type or 0,
        split_item=split_item or 0,
        output_dtype=as_dtype(output_dtype),
    )
    reserved = {
        "offset": offset,
        "activation_input": activation_input,
        "activation_quant_scale": activation_quant_scale,
        "activation_quant_offset": activation_quant_offset,
        "act_type": act_type,
        "x_dtype": x_dtype,
        "weight_dtype": weight_dtype,
        "scale_dtype": scale_dtype,
        "per_token_scale_dtype": per_token_scale_dtype,
    }
    check(call, reserved)
    dtype = call.output_dtype or x[0].dtype
    if call.group_type == -1:
        return _each(call, dtype)
    if call.group_type == 2:
        assert given is not None
        return [weight_gradient(x[0], weight[0], given, call.group_list_type, dtype)]
    if len(x) > 1 or given is None:
        check_sizes(call)
        return [torch.cat(_each(call, dtype))]
    per_token = call.per_token_scale[0] if call.per_token_scale else None
    lists = (call.weight, call.bias, call.scale, call.antiquant_scale, call.antiquant_offset)
    return [forward(x[0], *(list(t) for t in lists), per_token, given, call.group_list_type, dtype)]


def _each(call: Call, dtype: torch.dtype) -> list[Tensor]:
    """Return the products of x i and weight i."""
    factors = Factors.of(call.weight, call.bias, call.scale, call.antiquant_scale, call.antiquant_offset)
    results = []
    for i, (x, group) in enumerate(zip(call.x, factors, strict=True)):
        per_token = call.per_token_scale[i].flatten() if call.per_token_scale else None
        rows = product(x.flatten(0, -2), group, per_token, dtype)
        results.append(rows.view(*x.shape[:-1], group.weight.size(1)))
    return results


def _given(tensors: Sequence[Tensor] | None) -> Sequence[Tensor]:
    return () if tensors is None else tensors


def _group_type(given: int | None, group_list: object) -> int | None:
    if given is not None:
        return given
    return -1 if group_list is None else None if isinstance(group_list, Tensor) else 0


def _as_tensor(group_list: Tensor | Sequence[int]) -> Tensor:
    return group_list if isinstance(group_list, Tensor) else torch.tensor(list(group_list), dtype=torch.int64)
