"""Several columns of one row as the bytes of one message, so that a row and what belongs to it travel together."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def pack(columns: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return uint8 [n, bytes]: each row of each [n] or [n, width] tensor, one after the other."""
    rows = len(columns[0])
    packed = columns[0].new_empty((rows, sum(_width(column) for column in columns)), dtype=torch.uint8)
    begin = 0
    for column in columns:
        end = begin + _width(column)
        if column.numel():
            plain = column.reshape(rows, -1).clone(memory_format=torch.contiguous_format)  # contiguous() may keep odd strides
            packed[:, begin:end] = plain.view(torch.uint8)
        begin = end
    return packed


def unpack(packed: torch.Tensor, like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Inverse of `pack`; ``like`` gives dtype and row shape of each column, its number of rows does not matter."""
    out, begin = [], 0
    for column in like:
        end = begin + _width(column)
        made = packed.new_empty((len(packed), *column.shape[1:]), dtype=column.dtype)
        if made.numel():
            made.view(len(packed), -1).view(torch.uint8)[:] = packed[:, begin:end]
        out.append(made)
        begin = end
    return out


def _width(column: torch.Tensor) -> int:
    return column.shape[1:].numel() * column.element_size()
