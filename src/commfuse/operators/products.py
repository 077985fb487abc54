"""Matrix products as all operators compute them: float32 accumulation, rounded once to the rows' dtype."""

from __future__ import annotations

import torch


def product(rows: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Write ``rows @ weight`` into ``out``, of the rows' dtype, and return it.

    float16 runs as a float32 product rounded once: torch's own float16 path on CPU is up to 170 times slower.
    """
    if rows.dtype == torch.float16:
        return out.copy_(torch.mm(rows.float(), weight.float()))
    return torch.mm(rows, weight, out=out)


def wide_product(rows: torch.Tensor, weight: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Return ``rows @ weight`` before rounding: float32, in ``out`` if that is given, or a new int32 (exact) for int8 operands."""
    if rows.dtype == torch.int8:
        return torch.mm(rows.to(torch.int32), weight.to(torch.int32))
    return torch.mm(rows.float(), weight.float(), out=out)
