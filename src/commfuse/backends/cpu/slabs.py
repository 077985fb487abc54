"""Pieces of this process's arena, handed out as tensors and taken back when nobody needs them.

A slab is free again when its tensor is gone and every operation that published it has been consumed by all living peers. Slabs are
sparse: addresses are reserved for the whole shape, memory only for what is written. What was used last is used first, so that pages
stay warm.
"""

from __future__ import annotations

import math
import os
import threading
import warnings
from dataclasses import dataclass, field
from functools import cache, lru_cache

import numpy as np
import numpy.typing as npt
import torch

from ... import _core, config
from ...errors import CommfuseWarning

ADDRESSES = 64 << 30  # bytes of address space reserved for one process
CONTROL = 4 << 20  # of them for the control blocks of groups
_LARGE_TAIL = 64 << 20  # filled bytes behind the used part of which the user is told, once
_TAIL = 1 << 20  # a slab is only looked at for pages behind its used part if they could be this many bytes


@dataclass(eq=False, slots=True)
class Slab:
    """A range of the arena."""

    offset: int
    num_bytes: int
    address: int
    used: int = 0  # bytes that the backend itself has written
    readers: list[Reading] = field(default_factory=list)

    def add_reader(self, reading: Reading) -> None:
        """Note that it has been published; what one group's latest call has published says all of its calls before."""
        others = [one for one in self.readers if one.channel is not reading.channel or one.epoch != reading.epoch]
        self.readers = [*others, reading]

    def in_use(self) -> bool:
        """Whether a peer may still read it."""
        if not self.readers:
            return False
        self.readers = [reading for reading in self.readers if not reading.is_over()]
        return bool(self.readers)


@dataclass(eq=False, kw_only=True, slots=True)  # not frozen: one is made for each publication
class Reading:
    """A call that has published a slab to those who took part in it, and who may be reading it."""

    channel: _core.Channel
    sequence: int
    epoch: int
    members: tuple[int, ...]

    def is_over(self) -> bool:
        """Whether every one of them has finished, or has ended."""
        channel = self.channel
        if channel.epoch == self.epoch:
            if channel.reached(_core.CONSUMED, self.sequence):
                return True
            if not channel.poisoned:
                return False
        others = [member for member in self.members if member != channel.index]  # left out since then, one may be reading still
        return all(channel.counter(one, _core.CONSUMED) >= self.sequence or not channel.alive(one) for one in others)


class Slabs:
    """The arena of this process and what of it is free."""

    def __init__(self) -> None:
        self.arena = _core.Arena(ADDRESSES, CONTROL)
        limit = config.get("window_max")
        if limit:
            self.arena.limit_bytes = limit
        self._warned = False
        self._bytes: npt.NDArray[np.uint8] = np.frombuffer(memoryview(self.arena), dtype=np.uint8)
        self._base = self.arena.address
        self._end = CONTROL
        self._free: dict[int, list[Slab]] = {}
        self._waiting: list[Slab] = []  # nobody holds them here, but peers may be reading
        self._lender = _core.Lender(torch.Tensor, self.arena)
        self._held: dict[int, Slab] = {}  # slabs under tensors, by address
        self._lock = threading.RLock()  # groups may be used by different threads

    def take(self, num_bytes: int) -> Slab:
        """Return a free slab of at least ``num_bytes``; its memory is not there yet (see `populate`).

        Raises:
            CoreMemoryError: the address space is used up.
        """
        size = _size_class(num_bytes)
        with self._lock:
            self._tidy()
            free = self._free.get(size)
            if free:
                return free.pop()
            self.arena.grow(self._end + size)
            slab = Slab(self._end, size, self._base + self._end)
            self._end += size
            return slab

    def staging(self, num_bytes: int) -> Slab:
        """Return a slab of which the first ``num_bytes`` can be written."""
        slab = self.take(num_bytes)
        self.populate(slab, num_bytes)
        return slab

    def populate(self, slab: Slab, num_bytes: int) -> None:
        """Make the first ``num_bytes`` of ``slab`` ready to be written.

        Raises:
            CoreMemoryError: there is not enough memory; nothing has been touched.
        """
        if num_bytes > slab.used:  # only what lies behind is ever given back
            self.arena.populate(slab.offset, num_bytes)
            slab.used = num_bytes

    def give(self, slab: Slab) -> None:
        """Take ``slab`` back; it is handed out again when its readers are done."""
        with self._lock:
            if slab.in_use():
                self._waiting.append(slab)
                return
            if slab.num_bytes - slab.used >= _TAIL:
                self._punch_tail(slab)
            self._free.setdefault(slab.num_bytes, []).append(slab)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, rows: int) -> torch.Tensor:
        """Return a tensor in the window of which the first ``rows`` rows can be written.

        Raises:
            CoreMemoryError: there is not enough memory or address space.
        """
        row_bytes = math.prod(shape[1:]) * dtype.itemsize
        if shape[0] * row_bytes == 0:
            return torch.empty(shape, dtype=dtype)
        slab = self.take(shape[0] * row_bytes)
        self.populate(slab, min(rows, shape[0]) * row_bytes)
        return self.tensor(slab, shape, dtype)

    def lent(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return a tensor in the window for the user to write.

        Raises:
            CoreMemoryError: all of it would not fit.
        """
        held, more, limit = self.arena.allocated_bytes(), math.prod(shape) * dtype.itemsize, self.arena.limit_bytes
        if held + more > limit:
            raise _core.CoreMemoryError(
                f"{more} bytes beside the {held} that the window holds exceed COMMFUSE_WINDOW_MAX = {limit} bytes"
            )
        return self.empty(shape, dtype, rows=0)

    def tensor(self, slab: Slab, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return a tensor over ``slab``, which comes back when the last alias of the tensor is gone."""
        self._held[slab.address] = slab
        if not torch.is_inference_mode_enabled():
            return self._lender.lend(slab.address, shape, _sample(dtype))
        with torch.inference_mode(False):  # a normal tensor, whose changes are counted, wherever the call was made
            return self._lender.lend(slab.address, shape, _sample(dtype))

    def view(self, slab: Slab, begin: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return a tensor over a part of ``slab``, for use before the slab is given back."""
        num_bytes = math.prod(shape) * dtype.itemsize
        memory = self._bytes[slab.offset + begin : slab.offset + begin + num_bytes]
        return torch.from_numpy(memory).view(dtype).view(shape)

    def ints(self, slab: Slab, begin: int, count: int) -> npt.NDArray[np.int32]:
        """Return ``count`` int32 of a part of ``slab``, for use before the slab is given back."""
        return self._bytes[slab.offset + begin : slab.offset + begin + 4 * count].view(np.int32)

    def holding(self, tensor: torch.Tensor) -> Slab | None:
        """Return the slab that ``tensor`` lies in, if it begins where a slab does."""
        return self.at(tensor.data_ptr())

    def at(self, address: int) -> Slab | None:
        """Return the slab under the tensor that begins at ``address``, if one does."""
        return self._held.get(address)

    def _tidy(self) -> None:
        if self._lender.has_returned:
            for address in self._lender.returned():
                self.give(self._held.pop(address))
        if self._waiting:
            waiting, self._waiting = self._waiting, []
            for slab in waiting:
                self.give(slab)

    def _punch_tail(self, slab: Slab) -> None:
        """Give back pages behind the used part, which an operation on a whole buffer may have filled."""
        first = slab.offset + slab.used
        tail = slab.offset + slab.num_bytes - first
        filled = self.arena.allocated_bytes(first, tail)
        if filled >= _TAIL:
            self.arena.punch(first, tail)
        if filled >= _LARGE_TAIL and not self._warned:
            self._warned = True
            warnings.warn(
                f"an operation has written {filled >> 20} MiB behind the {slab.used >> 20} MiB of rows that were received: use "
                "expand_x[:total], with total the last of ep_recv_counts, in place of the whole buffer",
                CommfuseWarning,
                stacklevel=2,
            )


@cache
def _sample(dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(0, dtype=dtype)


@lru_cache(maxsize=1024)
def _size_class(num_bytes: int) -> int:
    """Round up to one of eight sizes an octave, in whole pages, so that slabs of similar sizes serve each other."""
    step = max(_core.PAGE_BYTES, 1 << max(num_bytes.bit_length() - 4, 0))
    return max(-(-num_bytes // step), 1) * step


_of_process: tuple[int, Slabs] | None = None


def own() -> Slabs:
    """Return the slabs of this process (a forked child gets its own)."""
    global _of_process
    if _of_process is None or _of_process[0] != os.getpid():
        _of_process = os.getpid(), Slabs()
    return _of_process[1]
