"""The arithmetic of grouped products, and its operators for compiled code.

How many rows a group has is known only when the numbers are, so a compiled graph holds one operator for all
groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .grouped_rules import INT8, segments

_EXACT = 1024  # int8 products of this many terms are below 2**24: float32 sums them exactly, in any order


@dataclass(frozen=True, kw_only=True)
class Factors:
    """What one group's rows are multiplied with."""

    weight: Tensor
    bias: Tensor | None
    scale: Tensor | None
    antiquant_scale: Tensor | None
    antiquant_offset: Tensor | None

    @staticmethod
    def of(
        weight: Sequence[Tensor],
        bias: Sequence[Tensor],
        scale: Sequence[Tensor],
        antiquant_scale: Sequence[Tensor],
        antiquant_offset: Sequence[Tensor],
    ) -> list[Factors]:
        """Return the factors of every group; a list holds one stacked tensor, one per group, or nothing."""
        stacked = weight[0].dim() == 3
        count = weight[0].size(0) if stacked else len(weight)
        columns = [
            [None] * count if not tensors else list(tensors[0].unbind(0)) if stacked else list(tensors)
            for tensors in (weight, bias, scale, antiquant_scale, antiquant_offset)
        ]
        names = ("weight", "bias", "scale", "antiquant_scale", "antiquant_offset")
        return [Factors(**dict(zip(names, group, strict=True))) for group in zip(*columns, strict=True)]


@torch.library.custom_op("commfuse::local_grouped_matmul", mutates_args=())
def forward(
    x: Tensor,
    weight: list[Tensor],
    bias: list[Tensor],
    scale: list[Tensor],
    antiquant_scale: list[Tensor],
    antiquant_offset: list[Tensor],
    per_token_scale: Tensor | None,
    group_list: Tensor,
    group_list_type: int,
    dtype: torch.dtype,
) -> Tensor:
    """Multiply the rows of each group by its weight; rows without a group give zeros."""
    factors = Factors.of(weight, bias, scale, antiquant_scale, antiquant_offset)
    out = x.new_empty((x.size(0), weight[0].size(-1)), dtype=dtype)
    last = 0
    for group, start, stop in segments(group_list, group_list_type, len(factors), x.size(0)):
        per_token = None if per_token_scale is None else per_token_scale[start:stop]
        out[start:stop] = product(x[start:stop], factors[group], per_token, dtype)
        last = stop
    out[last:].zero_()
    return out


@forward.register_fake
def _(
    x: Tensor,
    weight: list[Tensor],
    bias: list[Tensor],
    scale: list[Tensor],
    antiquant_scale: list[Tensor],
    antiquant_offset: list[Tensor],
    per_token_scale: Tensor | None,
    group_list: Tensor,
    group_list_type: int,
    dtype: torch.dtype,
) -> Tensor:
    return x.new_empty((x.size(0), weight[0].size(-1)), dtype=dtype)


@torch.library.custom_op("commfuse::local_grouped_weight_gradient", mutates_args=())
def weight_gradient(x: Tensor, weight: Tensor, group_list: Tensor, group_list_type: int, dtype: torch.dtype) -> Tensor:
    """Multiply columns of ``x`` ``[K, T]`` by rows of ``weight`` ``[T, N]``, per group: ``[E, K, N]``."""
    num_groups = group_list.size(0)
    out = x.new_zeros((num_groups, x.size(0), weight.size(1)), dtype=dtype)
    for group, start, stop in segments(group_list, group_list_type, num_groups, x.size(1)):
        out[group] = _float_product(x[:, start:stop], weight[start:stop], None, dtype)
    return out


@weight_gradient.register_fake
def _(x: Tensor, weight: Tensor, group_list: Tensor, group_list_type: int, dtype: torch.dtype) -> Tensor:
    return x.new_empty((group_list.size(0), x.size(0), weight.size(1)), dtype=dtype)


def product(x: Tensor, factors: Factors, per_token_scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return one group's product of ``x`` ``[rows, K]``, in ``dtype``."""
    if x.dtype == INT8:
        return _int8_product(x, factors, per_token_scale, dtype)
    if factors.antiquant_scale is None:
        return _float_product(x, factors.weight, factors.bias, dtype)
    weight = factors.weight.float()
    if factors.antiquant_offset is not None:
        weight = weight + factors.antiquant_offset.float()
    return _float_product(x, weight * factors.antiquant_scale.float(), factors.bias, dtype)


def _float_product(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    # torch's fp16 product on the CPU is far slower than the float32 one; a bias enters before the rounding.
    if bias is None and x.dtype == weight.dtype == dtype and (x.dtype != torch.float16 or x.is_cuda):
        return x @ weight
    rows = x.float() @ weight.float()
    return (rows if bias is None else rows + bias.float()).to(dtype)


def _int8_product(x: Tensor, factors: Factors, per_token_scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    total = int8_matmul(x, factors.weight)
    if factors.bias is not None:
        total = total + factors.bias
    if factors.scale is None:
        return total
    rows = total.float() * factors.scale.float()
    return (rows if per_token_scale is None else rows * per_token_scale.unsqueeze(1)).to(dtype)


def int8_matmul(x: Tensor, weight: Tensor) -> Tensor:
    """Return the exact int32 product of int8 ``x`` ``[rows, K]`` and ``weight`` ``[K, N]``."""
    total = torch.zeros((x.size(0), weight.size(1)), dtype=torch.int32, device=x.device)
    for start in range(0, x.size(1), _EXACT):
        part = x[:, start : start + _EXACT].float() @ weight[start : start + _EXACT].float()
        total = total + part.to(torch.int32)
    return total
