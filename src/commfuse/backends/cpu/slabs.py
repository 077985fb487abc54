"""Pieces of this process's arena, handed out as tensors and taken back when nobody needs them.

What is free, and who may still be reading it, the core keeps (csrc/slabs.h); here slabs become tensors. Slabs are sparse: addresses
are reserved for the whole shape, memory only for what is written.
"""

from __future__ import annotations

import math
import os
import warnings
from functools import cache

import numpy as np
import numpy.typing as npt
import torch

from ... import _core, config
from ...errors import CommfuseWarning

Slab = _core.Slab
ADDRESSES = 64 << 30  # bytes of address space reserved for one process
CONTROL = 4 << 20  # of them for the control blocks of groups


class Slabs:
    """The arena of this process and what of it is free."""

    def __init__(self) -> None:
        self.arena = _core.Arena(ADDRESSES, CONTROL)
        limit = config.get("window_max")
        if limit:
            self.arena.limit_bytes = limit
        self.core = _core.Slabs(self.arena, torch.Tensor, _tell_of_tail)
        self._bytes: npt.NDArray[np.uint8] = np.frombuffer(memoryview(self.arena), dtype=np.uint8)

    def staging(self, num_bytes: int) -> Slab:
        """Return a slab of which the first ``num_bytes`` can be written.

        Raises:
            CoreMemoryError: there is not enough memory or address space; nothing has been touched.
        """
        return self.core.take_ready(num_bytes, num_bytes)

    def give(self, slab: Slab) -> None:
        """Take ``slab`` back; it is handed out again when its readers are done."""
        self.core.give(slab)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, rows: int) -> torch.Tensor:
        """Return a tensor in the window of which the first ``rows`` rows can be written.

        Raises:
            CoreMemoryError: there is not enough memory or address space.
        """
        row_bytes = math.prod(shape[1:]) * dtype.itemsize
        if shape[0] * row_bytes == 0:
            return torch.empty(shape, dtype=dtype)
        return self.tensor(self.core.take_ready(shape[0] * row_bytes, min(rows, shape[0]) * row_bytes), shape, dtype)

    def lent(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return a tensor in the window for the user to write.

        Raises:
            CoreMemoryError: all of it would not fit.
        """
        more, limit = math.prod(shape) * dtype.itemsize, self.arena.limit_bytes
        held = self.arena.allocated_bytes()
        if held + more > limit and self.core.empty_free():
            held = self.arena.allocated_bytes()
        if held + more > limit:
            raise _core.CoreMemoryError(
                f"{more} bytes beside the {held} that the window holds exceed COMMFUSE_WINDOW_MAX = {limit} bytes"
            )
        return self.empty(shape, dtype, rows=0)

    def tensor(self, slab: Slab, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return a tensor over ``slab``, which comes back when the last alias of the tensor is gone."""
        if not torch.is_inference_mode_enabled():
            return self.core.lend(slab, shape, _sample(dtype))
        with torch.inference_mode(False):  # a normal tensor, whose changes are counted, wherever the call was made
            return self.core.lend(slab, shape, _sample(dtype))

    def view(self, slab: Slab, begin: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return a tensor over a part of ``slab``, for use before the slab is given back."""
        if not math.prod(shape):
            return torch.empty(shape, dtype=dtype)
        return self.core.view(slab, begin, shape, _sample(dtype))

    def ints(self, slab: Slab, begin: int, count: int) -> npt.NDArray[np.int32]:
        """Return ``count`` int32 of a part of ``slab``, for use before the slab is given back."""
        return self._bytes[slab.offset + begin : slab.offset + begin + 4 * count].view(np.int32)

    def holding(self, tensor: torch.Tensor) -> Slab | None:
        """Return the slab that ``tensor`` lies in, if it begins where a slab does."""
        return self.core.at(tensor.data_ptr())


def _tell_of_tail(filled: int, used: int) -> None:
    warnings.warn(
        f"an operation has written {filled >> 20} MiB behind the {used >> 20} MiB of rows that were received: use "
        "expand_x[:total], with total the last of ep_recv_counts, in place of the whole buffer",
        CommfuseWarning,
        stacklevel=2,
    )


@cache
def _sample(dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(0, dtype=dtype)


_of_process: tuple[int, Slabs] | None = None


def own() -> Slabs:
    """Return the slabs of this process (a forked child gets its own)."""
    global _of_process
    if _of_process is None or _of_process[0] != os.getpid():
        _of_process = os.getpid(), Slabs()
    return _of_process[1]
