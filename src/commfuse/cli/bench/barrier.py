"""A barrier in shared memory, so that ranks start together and waiting for the start is not timed."""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import time

_FUTEX = {"x86_64": 202, "aarch64": 98, "riscv64": 98}  # the system call's number
_WAIT, _WAKE, _EVERYBODY = 0, 1, 2**31 - 1
_LINE = 16  # 4-byte words: a cache line for each rank
_LOOKS = 1000  # at a peer's word before sleeping, where every rank has a core of its own: some 50 us
_LOOKS_AWAKE = 20_000  # when all are awake already
_DEADLINE = 120.0  # seconds


class _Time(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class Barrier:
    """``world_size`` ranks of one host; ``path`` is a file that all can write. Each rank writes its own word and looks at the others'.

    Where ranks outnumber cores, who waits sleeps: looking on would take the core from those who are awaited. Elsewhere they meet
    twice, because waking up takes longer than what is to be measured: first to be awake, then to leave within a microsecond.
    """

    def __init__(self, path: str, rank: int, world_size: int) -> None:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        num_bytes = 4 * _LINE * world_size
        os.ftruncate(descriptor, num_bytes)
        self._memory = mmap.mmap(descriptor, num_bytes)
        os.close(descriptor)
        self._words = memoryview(self._memory).cast("i")
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self._own, self._others = rank * _LINE, [peer * _LINE for peer in range(world_size) if peer != rank]
        self._meetings = (_LOOKS, _LOOKS_AWAKE) if world_size <= len(os.sched_getaffinity(0)) else (1,)
        self._round = 0
        self._call = ctypes.CDLL(None).syscall
        self._number = _FUTEX[platform.machine()]
        self._second = _Time(1, 0)

    def wait(self) -> None:
        """Return when all ranks have called it as often as this one.

        Raises:
            TimeoutError: a rank did not come.
        """
        for looks in self._meetings:
            self._round += 1
            self._words[self._own] = self._round
            self._futex(self._own, _WAKE, _EVERYBODY)
            for word in self._others:
                self._wait_for(word, looks)

    def _wait_for(self, word: int, looks: int) -> None:
        words, goal = self._words, self._round
        end = 0.0
        while (seen := words[word]) < goal:
            looks -= 1
            if looks <= 0:
                self._futex(word, _WAIT, seen)
                end = end or time.monotonic() + _DEADLINE
                if time.monotonic() > end:
                    raise TimeoutError(f"rank {word // _LINE} did not come to the barrier within {_DEADLINE:.0f} s")

    def _futex(self, word: int, operation: int, value: int) -> None:
        self._call(
            ctypes.c_long(self._number),
            ctypes.c_void_p(self._address + 4 * word),
            ctypes.c_int(operation),
            ctypes.c_int(value),
            ctypes.byref(self._second),
            None,
            ctypes.c_int(0),
        )
