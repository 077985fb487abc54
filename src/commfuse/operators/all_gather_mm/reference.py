"""Goldens of matmul fused with a collective, and of the group barrier: all ranks at once.

Legend: `W` ranks; `m`, `k`, `n`: rows, inner and output width of one rank's matmul.

None of these operators has an argument that tells a rank's number, so the order of `ranks` does: `ranks[r]`
holds the arguments of group rank `r`. The first argument goes by its schema name (`self` for
`all_gather_base_mm` and `mm_reduce_scatter_base`, `x1` for `mm_all_reduce_base`, `x_ref` for the barrier).
Group names, `comm_mode`, `time_out` and `elastic_info` are not read.

Matmul, bias and the sum over ranks are float32 (float64 for float64 inputs), sums over ranks in ascending
order of rank, and are rounded once to the output's dtype. int8 products are accumulated exactly, in int32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Arguments = dict[str, Any]
Output = tuple[Tensor | None, int]


def all_gather_base_mm(ranks: list[Arguments]) -> list[list[Output]]:
    """The `self` of all ranks, one below the other, times the local `x2`, plus the local `bias`.

    `self` `[m, k]`, equal shape and dtype on all ranks; `x2` `[k, n]`; `bias` `[n]` or None.
    int8 `self` and `x2` need `x2_scale` `[1, n]` (float32, or int64 that carries float32 bits) and may have
    `x1_scale` `[m, 1]` float32; then `output = (gathered x1_scale * x2_scale) * (gather_out @ x2) + bias`.

    Returns per rank `output` `[m * W, n]`, in the dtype of `self`, or in the int8 form float16 when
    `x2_scale` is int64, else `output_dtype`, else bfloat16; and `gather_out` `[m * W, k]`, exact copies, or
    an empty tensor of shape `(0,)` without `gather_output`. Raises ValueError when ranks disagree or an
    argument has no defined meaning.
    """
    _check_world_size(ranks)
    _check_same("shape of self", [tuple(rank["self"].shape) for rank in ranks])
    _check_same("dtype of self", [rank["self"].dtype for rank in ranks])
    _check_same("presence of x1_scale", [rank["x1_scale"] is not None for rank in ranks])
    for rank in ranks:
        _check_only(rank, gather_index=0, comm_turn=0)
    x1_scale = None if ranks[0]["x1_scale"] is None else torch.cat([rank["x1_scale"] for rank in ranks])
    results = []
    for rank in ranks:
        gathered = torch.cat([peer["self"] for peer in ranks])
        output = _scaled_matmul(gathered, rank["x2"], x1_scale, rank["x2_scale"], rank["bias"])
        gather_out = gathered if rank["gather_output"] else gathered.new_empty(0)
        results.append([_whole(output.to(_output_dtype(rank))), _whole(gather_out)])
    return results


def mm_reduce_scatter_base(ranks: list[Arguments]) -> list[list[Output]]:
    """Rank `r` gets rows `[r * m / W, (r + 1) * m / W)` of the sum over ranks of `self @ x2 + bias`.

    `self` `[m, k]` with `m` a multiple of `W`; `x2` `[k, n]`; `bias` `[n]` or None, added by every rank. The
    int8 form and the output's dtype are those of `all_gather_base_mm`, with the local scales.

    Returns per rank one tensor `[m / W, n]`. Raises ValueError when `m`, `n` or the output dtype differ
    between ranks, when `W` does not divide `m`, or an argument has no defined meaning.
    """
    _check_world_size(ranks)
    for rank in ranks:
        _check_only(rank, reduce_op="sum", comm_turn=0)
    _check_same("output dtype", [_output_dtype(rank) for rank in ranks])
    total = _sum_over_ranks(
        [_scaled_matmul(rank["self"], rank["x2"], rank["x1_scale"], rank["x2_scale"], rank["bias"]) for rank in ranks]
    )
    if total.size(0) % len(ranks):
        raise ValueError(f"m = {total.size(0)} rows cannot be shared out evenly among {len(ranks)} ranks")
    share = total.size(0) // len(ranks)
    dtype = _output_dtype(ranks[0])
    return [[_whole(total[r * share : (r + 1) * share].to(dtype, copy=True))] for r in range(len(ranks))]


def mm_all_reduce_base(ranks: list[Arguments]) -> list[list[Output]]:
    """Every rank gets the sum over ranks of `x1 @ x2 + bias + x3`.

    `x1` `[m, k]` or `[b, s, k]`; `x2` `[k, n]`; `bias` `[n]` or None; `x3` of the output's shape or None.
    Every rank adds its bias and x3 before the sum, so that equal ones count `W` times.

    * Floating `x1` with int8 `x2`: `x2` counts as `(x2 + antiquant_offset) * antiquant_scale`. Both have
      shape `[1]` (one value), `[n]` or `[1, n]` (one per column), or, with `antiquant_group_size = g > 0`,
      `[ceil(k / g), n]`: row `i` of `x2` takes row `i // g` of them. No offset means 0.
    * int8 `x1` and `x2`: int32 accumulation, plus an int32 bias, times `dequant_scale` (`[1]`, `[n]` or
      `[1, n]`; floating, or int64 that carries float32 bits), times `pertoken_scale` (float32, one per row of
      `x1` with its leading dimensions flattened).

    `comm_quant_scale_1` and `comm_quant_scale_2` lower the precision of the reduction on a device; they are
    not read.

    Returns per rank one tensor of shape `x1.shape[:-1] + (n,)`, in the dtype of `x1`; for int8 float16, or
    bfloat16 when `dequant_scale` is bfloat16. Raises ValueError when shape or dtype of the output differ
    between ranks or an argument has no defined meaning.
    """
    for rank in ranks:
        _check_only(rank, reduce_op="sum", comm_turn=0)
    _check_same("output dtype", [_all_reduce_dtype(rank) for rank in ranks])
    _check_same("shape of the output", [(*rank["x1"].shape[:-1], rank["x2"].size(1)) for rank in ranks])
    total = _sum_over_ranks([_all_reduce_term(rank) for rank in ranks])
    dtype = _all_reduce_dtype(ranks[0])
    return [[_whole(total.to(dtype, copy=True))] for _ in ranks]


def distribute_barrier(ranks: list[Arguments]) -> list[list[Output]]:
    """Every rank gets its own `x_ref` back, as a new tensor. Its shape and dtype are free, on each rank."""
    _check_world_size(ranks)
    return [[_whole(rank["x_ref"].clone())] for rank in ranks]


def _scaled_matmul(x1: Tensor, x2: Tensor, x1_scale: Tensor | None, x2_scale: Tensor | None, bias: Tensor | None) -> Tensor:
    """`x1 @ x2`, times the scales in the int8 form, plus bias; not yet rounded to the output's dtype."""
    if (x1.dtype == torch.int8) != (x2_scale is not None):
        raise ValueError(f"x2_scale belongs to int8 inputs and to no others, but x1 is {x1.dtype}")
    if x1_scale is not None and x2_scale is None:
        raise ValueError("x1_scale needs x2_scale")
    product = _matmul(x1, x2)
    if x2_scale is not None:
        scale = _scale_values(x2_scale).reshape(1, -1)
        if x1_scale is not None:
            scale = x1_scale.reshape(-1, 1).to(torch.float32) * scale
        product = scale * product.to(torch.float32)
    return product if bias is None else product + bias.to(product.dtype)


def _output_dtype(rank: Arguments) -> torch.dtype:
    dtype: torch.dtype = rank["self"].dtype
    if rank["x2_scale"] is not None:
        dtype = rank["output_dtype"] or torch.bfloat16
        if rank["x2_scale"].dtype == torch.int64:
            dtype = torch.float16
    return dtype


def _all_reduce_term(rank: Arguments) -> Tensor:
    """One rank's share of the sum, of the output's shape; not yet rounded to the output's dtype."""
    _check_forms(rank)
    x1: Tensor = rank["x1"]
    x2 = _dequantised_weight(rank)
    rows = _matmul(x1.reshape(-1, x1.size(-1)), x2)
    if rank["bias"] is not None:
        rows = rows + rank["bias"].to(rows.dtype)
    if rank["dequant_scale"] is not None:
        rows = rows.to(torch.float32) * _scale_values(rank["dequant_scale"]).reshape(1, -1)
    if rank["pertoken_scale"] is not None:
        rows = rows * rank["pertoken_scale"].reshape(-1, 1)
    term = rows.reshape(*x1.shape[:-1], x2.size(1))
    return term if rank["x3"] is None else term + rank["x3"].to(term.dtype)


def _check_forms(rank: Arguments) -> None:
    """Which scales belong to which dtypes of x1 and x2."""
    x1, x2, scale = rank["x1"], rank["x2"], rank["antiquant_scale"]
    if (scale is not None) != (x1.dtype != torch.int8 and x2.dtype == torch.int8):
        raise ValueError(f"antiquant_scale belongs to floating x1 with int8 x2, not to {x1.dtype} and {x2.dtype}")
    if (rank["dequant_scale"] is not None) != (x1.dtype == torch.int8):
        raise ValueError(f"dequant_scale belongs to int8 x1 and to no others, but x1 is {x1.dtype}")
    if rank["pertoken_scale"] is not None and rank["dequant_scale"] is None:
        raise ValueError("pertoken_scale needs dequant_scale")
    if rank["antiquant_offset"] is not None and scale is None:
        raise ValueError("antiquant_offset needs antiquant_scale")
    if x1.dtype == torch.int8 and rank["bias"] is not None and rank["bias"].dtype != torch.int32:
        raise ValueError(f"the bias of an int8 matmul must be int32, got {rank['bias'].dtype}")


def _dequantised_weight(rank: Arguments) -> Tensor:
    """`x2` as the matmul takes it: unchanged, or what its int8 values stand for by `antiquant_scale`."""
    weight: Tensor = rank["x2"]
    if rank["antiquant_scale"] is not None:
        wide = _wide(rank["x1"].dtype)
        weight = weight.to(wide)
        if rank["antiquant_offset"] is not None:
            weight = weight + _per_weight(rank["antiquant_offset"], rank).to(wide)
        weight = weight * _per_weight(rank["antiquant_scale"], rank).to(wide)
    return weight


def _per_weight(values: Tensor, rank: Arguments) -> Tensor:
    """Scale or offset in a shape that broadcasts to `x2` `[k, n]`."""
    group_size, k = rank["antiquant_group_size"], rank["x2"].size(0)
    if group_size == 0:
        return values.reshape(1, -1)
    if values.size(0) != -(-k // group_size):
        raise ValueError(f"{values.size(0)} rows of antiquant values for k = {k} in groups of {group_size}")
    return values[torch.arange(k) // group_size]


def _all_reduce_dtype(rank: Arguments) -> torch.dtype:
    dtype: torch.dtype = rank["x1"].dtype
    scale: Tensor | None = rank["dequant_scale"]
    if dtype == torch.int8:
        dtype = torch.bfloat16 if scale is not None and scale.dtype == torch.bfloat16 else torch.float16
    return dtype


def _matmul(x1: Tensor, x2: Tensor) -> Tensor:
    """`x1 @ x2`: int8 in int32, which is exact for k < 131072; float64 in float64; all others in float32."""
    wide = _wide(x1.dtype)
    return torch.matmul(x1.to(wide), x2.to(wide))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return {torch.int8: torch.int32, torch.float64: torch.float64}.get(dtype, torch.float32)


def _scale_values(scale: Tensor) -> Tensor:
    """A scale as float32. An int64 scale has the bits of a float32 in its low half; the rest is not read."""
    if scale.dtype == torch.int64:
        low_halves = scale.contiguous().view(torch.float32).reshape(-1, 2)[:, 0]
        return low_halves.reshape(scale.shape)
    return scale.to(torch.float32)


def _sum_over_ranks(terms: list[Tensor]) -> Tensor:
    """The sum in ascending order of rank, so that its bits are defined."""
    _check_same("shape of the product", [tuple(term.shape) for term in terms])
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def _whole(tensor: Tensor) -> Output:
    return tensor, tensor.size(0) if tensor.dim() else 1


def _check_world_size(ranks: list[Arguments]) -> None:
    for i, rank in enumerate(ranks):
        if rank["world_size"] != len(ranks):
            raise ValueError(f"rank {i}: world_size is {rank['world_size']}, but {len(ranks)} ranks take part")


def _check_only(rank: Arguments, **allowed: Any) -> None:
    for name, value in allowed.items():
        if rank[name] != value:
            raise ValueError(f"{name} must be {value!r}, got {rank[name]!r}")


def _check_same(what: str, values: list[Any]) -> None:
    for i, value in enumerate(values):
        if value != values[0]:
            raise ValueError(f"the {what} differs between ranks: {values[0]} on rank 0, {value} on rank {i}")
