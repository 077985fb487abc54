"""What a case gives on a rank, and what it should give."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Expected:
    """One output of one operator on one rank, as the golden has it."""

    operator: str
    name: str
    tensor: torch.Tensor | None
    valid: int | None = None  # leading entries along dim 0 that are specified; None: all
    bounds: tuple[float, float] | None = None  # relative and absolute (see compare.MATMUL_TOLERANCE); None: bit for bit


@dataclass(frozen=True, kw_only=True)
class RankRun:
    """What the operators returned on one rank, and the backend that ran them."""

    outputs: list[torch.Tensor | None]
    backend: str
