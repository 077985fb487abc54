"""The int8 forms of a row: per-token quantisation of dispatch, and the wire format of combine."""

from __future__ import annotations

import torch
from torch import Tensor

WIRE_BLOCK = 8  # elements of a row that share one scale on the wire


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """Rows of bf16, fp16 and float32 are computed in float32, rows of float64 in float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def quantize_rows(rows: Tensor, smooth: Tensor | None) -> tuple[Tensor, Tensor]:
    """`quant_mode` 2: int8 rows (n, H) and the multipliers (n,) float32 that give the rows back.

    `rows` is (n, H) in any row dtype, `smooth` float32 (n, H) or None. Rounding is half to even. A row of
    zeros, and one so small that 127 / max overflows, becomes zeros with multiplier 0. A row with NaN or
    infinity becomes zeros with multiplier NaN.
    """
    work = working_dtype(rows.dtype)
    factors = rows.to(work)
    if smooth is not None:
        factors = factors * smooth.to(work)
    largest = factors.abs().amax(dim=1)
    up = torch.tensor(127.0, dtype=work) / largest
    quantised = torch.round(factors * up.unsqueeze(1))
    regular = largest.isfinite() & up.isfinite()
    quantised = torch.where(regular.unsqueeze(1), quantised, 0.0).to(torch.int8)
    down = torch.where(largest.isfinite(), torch.ones_like(up) / up, torch.nan)
    return quantised, down.to(torch.float32)


def over_the_wire(rows: Tensor) -> Tensor:
    """`comm_quant_mode` 2: rows (n, H) as they arrive after the trip as int8, in the same dtype.

    Every 8 consecutive elements share a scale, kept in the row's dtype; the last block may be shorter. The
    quotient is rounded to fp16 first and to an integer then. A block of zeros arrives as zeros, a block with
    NaN or infinity as NaN. Integers that a subnormal scale drives past int8 saturate.
    """
    work = working_dtype(rows.dtype)
    num_rows, hidden = rows.shape
    num_blocks = -(-hidden // WIRE_BLOCK)
    blocks = torch.zeros(num_rows, num_blocks * WIRE_BLOCK, dtype=work)
    blocks[:, :hidden] = rows.to(work)
    blocks = blocks.reshape(num_rows, num_blocks, WIRE_BLOCK)
    scale = blocks.abs().amax(dim=2, keepdim=True) * torch.tensor(1.0 / 127.0, dtype=work)
    quotient = blocks / scale
    integers = torch.round(quotient.to(torch.float16)).clamp(-128, 127)
    integers = torch.where(quotient.isfinite(), integers, 0.0).to(torch.int8)
    arrived = integers.to(work) * scale.to(rows.dtype).to(work)
    return arrived.flatten(1)[:, :hidden].to(rows.dtype)
