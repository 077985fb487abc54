"""int8 rows: the two published schemes, with plain torch, one rounding where the formulas round.

`per_row` is dispatch's: one scale for each row. `per_block` is combine's wire format: one scale for 8 columns.
"""

from __future__ import annotations

import torch

BLOCK = 8


def per_row(rows: torch.Tensor, smooth: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise [n, H] rows; return int8 [n, H] and the float32 [n] factors that turn them back.

    ``d = 127 / max|f|``, ``q = rint(f * d)``, factor ``1 / d``. A row of zeros, or so small that ``d`` overflows, gives zeros and
    factor 0; a row with NaN or infinity gives zeros and factor NaN.
    """
    wide = rows.float()
    if smooth is not None:
        wide = wide * smooth
    largest = wide.abs().amax(1)
    d = torch.full_like(largest, 127) / largest  # not 127.0 / largest, which torch computes as a reciprocal and a product
    quantised = torch.round(wide * d[:, None])
    quantised[~(torch.isfinite(d) & torch.isfinite(largest))] = 0
    factors = torch.where(torch.isfinite(largest), d.reciprocal(), torch.nan)
    return quantised.to(torch.int8), factors


def per_block(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise [n, H] rows in blocks of 8 columns; return int8 [n, H] and the scales [n, ceil(H/8)] in the rows' dtype."""
    n, hidden = rows.shape
    blocks = -(-hidden // BLOCK)
    padded = torch.nn.functional.pad(rows.float(), (0, -hidden % BLOCK)).view(n, blocks, BLOCK)
    scale = padded.abs().amax(2) * torch.tensor(1 / 127, dtype=torch.float32)
    ratio = (padded / scale[:, :, None]).to(torch.float16).float()
    quantised = torch.where(torch.isfinite(ratio), torch.round(ratio).clamp(-128, 127), 0.0).to(torch.int8)
    return quantised.view(n, blocks * BLOCK)[:, :hidden].contiguous(), scale.to(rows.dtype)


def from_blocks(quantised: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Turn `per_block`'s result back into rows of the scales' dtype."""
    hidden = quantised.shape[1]
    factors = scale.float().repeat_interleave(BLOCK, dim=1)[:, :hidden]
    return (quantised.float() * factors).to(scale.dtype)
