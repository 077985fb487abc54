"""Rows by index and by group, where a row may be missing or belong to no group."""

from __future__ import annotations

import torch
from torch import Tensor


def take_rows(rows: Tensor, index: Tensor) -> Tensor:
    """Return ``rows[index]`` in float32, with zeros where ``index`` is not in ``[0, len(rows))``.

    Whatever row stands in for a missing one is not looked at: it may hold NaN.
    """
    if rows.size(0) == 0:
        return rows.new_zeros((index.numel(), rows.size(1)), dtype=torch.float32)
    missing = (index < 0) | (index >= rows.size(0))
    taken = rows.index_select(0, index.masked_fill(missing, 0)).float()
    return taken.masked_fill(missing.unsqueeze(1), 0)


def inverse(order: Tensor) -> Tensor:
    """Return the permutation that undoes ``order``."""
    return torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))


def group_of_rows(ends: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """Return each row's group and whether it has one; ``ends`` is the prefix sum of the group sizes."""
    row = torch.arange(num_rows, device=ends.device)
    group = torch.searchsorted(ends.to(torch.int64), row, right=True)
    return group.clamp(max=ends.numel() - 1), group < ends.numel()
