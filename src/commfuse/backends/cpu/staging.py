"""What one call publishes besides tensors that already lie in the window: a slab, cut into the segments of its header."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch

from ... import _core
from .session import Session

DTYPES = {torch.bfloat16: _core.BF16, torch.float16: _core.FP16, torch.float32: _core.F32}
_ALIGN = 64


class Staging:
    """Segments of given sizes, one after the other in a slab of this process's window."""

    def __init__(self, session: Session, sizes: Sequence[int]) -> None:
        """Raises CoreMemoryError when there is not enough memory; nothing has been touched then."""
        self._begins, num_bytes = _cut(tuple(sizes))
        self._sizes = sizes
        self._session = session
        self._held = False
        self._slab = session.slabs.staging(num_bytes)
        self._held = True

    def address(self, segment: int) -> int:
        """Where ``segment`` begins."""
        return self._slab.address + self._begins[segment]

    def view(self, segment: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return ``segment`` as a tensor; not for use after `release`."""
        return self._session.slabs.view(self._slab, self._begins[segment], shape, dtype)

    def ints(self, segment: int) -> npt.NDArray[np.int32]:
        """Return ``segment`` as int32; not for use after `release`."""
        return self._session.slabs.ints(self._slab, self._begins[segment], self._sizes[segment] // 4)

    def copy_in(self, segment: int, rows: torch.Tensor) -> None:
        """Write ``rows`` to ``segment``, without gaps."""
        if rows.is_contiguous():
            _core.copy(self.address(segment), rows.data_ptr(), rows.numel() * rows.element_size(), self._session.large_copy)
        else:
            self.view(segment, tuple(rows.shape), rows.dtype).copy_(rows)

    def copy_first(self, segment: int, rows: torch.Tensor) -> None:
        """Fill ``segment`` with the first of ``rows``, of which there are enough, without gaps."""
        num_bytes = self._sizes[segment]
        if rows.is_contiguous():
            _core.copy(self.address(segment), rows.data_ptr(), num_bytes, self._session.large_copy)
        elif num_bytes:
            self.copy_in(segment, rows[: num_bytes * len(rows) // (rows.numel() * rows.element_size())])

    def fill(self, offer: _core.Offer) -> None:
        """Name the segments in ``offer``."""
        for segment, size in enumerate(self._sizes):
            offer.set_segment(segment, self.address(segment), size)

    def release(self, sequence: int) -> None:
        """Give the slab back, once every peer has read what call ``sequence`` published."""
        self._held = False
        self._slab.add_reader(self._session.reading(sequence))
        self._session.slabs.give(self._slab)

    def __del__(self) -> None:
        if self._held:  # an error came before `release`: peers may read what was published
            self.release(self._session.newest)


@lru_cache(maxsize=1024)
def _cut(sizes: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
    """Return where segments of ``sizes`` bytes begin, and how many bytes they take in all."""
    begin, begins = 0, []
    for size in sizes:
        begins.append(begin)
        begin += -(-size // _ALIGN) * _ALIGN
    return tuple(begins), begin
