"""Tensors in this process's window, which peers read where they lie."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .backends.cpu import host
from .errors import ArgumentError


def window_empty(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Return an uninitialised tensor that lies in this process's window: what the ``cpu`` backend publishes from it is not copied.

    For the experts' results (combine reads them there), and for the shard of all-gather + matmul. From the call that publishes it until
    the group's next call it must stay as it is: a change is found and raises ExchangeError. Take a fresh one for every use; dropped ones
    come back by themselves when no peer reads them any more. Memory is allocated as it is written. With other backends, and where this
    process has no windows (see `commfuse info`), it is a tensor like any other.

    Args:
        shape: sizes, each at least 0.
        dtype: any dtype.

    Raises:
        ArgumentError: a size is negative.
        MemoryError: ``COMMFUSE_WINDOW_MAX`` or the window's address space is used up.
    """
    sizes = tuple(int(size) for size in shape)
    if any(size < 0 for size in sizes):
        raise ArgumentError(f"window_empty: shape = {sizes}: must have no negative size")
    if host.missing():
        return torch.empty(sizes, dtype=dtype)
    from . import _core
    from .backends.cpu import slabs

    try:
        return slabs.own().lent(sizes, dtype)
    except _core.CoreMemoryError as lack:
        raise MemoryError(f"window_empty: {lack}") from lack
