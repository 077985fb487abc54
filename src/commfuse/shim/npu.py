"""What ``torch.npu`` and ``torch_npu.npu`` are under the look-alike: one module, on the host's processor and memory.

Operations are finished when they return, so streams and events order nothing, but events do measure time.
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch

from . import surface

_Device = int | str | torch.device | None

config = SimpleNamespace(allow_internal_format=True)
"""Switches that scripts set, as ``torch.npu.config.allow_internal_format``; without effect here."""

_current = 0


def _index(wanted: _Device) -> int:
    if wanted is None:
        return _current
    if isinstance(wanted, str):
        wanted = torch.device(wanted)
    if isinstance(wanted, torch.device):
        return _current if wanted.index is None else wanted.index
    return int(wanted)


def set_device(device: _Device) -> None:
    """Make ``device`` (an index, "npu:3" or a torch.device) what `current_device` returns. Any index from 0 is accepted.

    Raises:
        RuntimeError: a negative index.
    """
    global _current
    index = _index(device)
    if index < 0:
        raise RuntimeError(f"torch.npu.set_device: device must be 0 or more, got {device!r}")
    _current = index


def current_device() -> int:
    """Return the index of the last `set_device`, 0 before the first."""
    return _current


def device_count() -> int:
    """Return the devices of one machine of the product: 8 with ``COMMFUSE_PRODUCT=A2``, otherwise 16."""
    return 8 if _product() == "A2" else 16


def is_available() -> bool:
    """Return True."""
    return True


def is_initialized() -> bool:
    """Return True."""
    return True


def is_bf16_supported() -> bool:
    """Return True."""
    return True


def _is_in_bad_fork() -> bool:
    return False  # torch.manual_seed asks; a forked child may use this device


@contextmanager
def device(device: _Device) -> Iterator[None]:
    """Make ``device`` the current one within a ``with`` block."""
    before = _current
    set_device(device)
    try:
        yield
    finally:
        set_device(before)


def _product() -> str:
    from .. import config as settings

    return str(settings.get("product").name)


def get_soc_version() -> int:
    """Return the first chip number of the product: 220 with ``COMMFUSE_PRODUCT=A2``, otherwise 250, an A3."""
    return 220 if _product() == "A2" else 250


def get_device_name(device: _Device = None) -> str:
    """Return "npu (commfuse, CPU)"."""
    return "npu (commfuse, CPU)"


def get_device_properties(device: _Device = None) -> SimpleNamespace:
    """Return ``name`` and ``total_memory`` (bytes of this host)."""
    return SimpleNamespace(name=get_device_name(device), total_memory=mem_get_info()[1])


def mem_get_info(device: _Device = None) -> tuple[int, int]:
    """Return the free and the total memory of this host, in bytes."""
    page = os.sysconf("SC_PAGE_SIZE")
    return os.sysconf("SC_AVPHYS_PAGES") * page, os.sysconf("SC_PHYS_PAGES") * page


def memory_allocated(device: _Device = None) -> int:
    """Return the resident memory of this process, in bytes."""
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def max_memory_allocated(device: _Device = None) -> int:
    """Return the largest resident memory of this process so far, in bytes."""
    # The kernel keeps the two counts apart and neither is exact to the page.
    return max(memory_allocated(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


memory_reserved = memory_allocated
max_memory_reserved = max_memory_allocated


def manual_seed(seed: int) -> None:
    """Seed torch's CPU generator, which makes the random numbers of this device. `seed` is any int."""
    # Not torch.manual_seed: that one calls back here.
    torch.default_generator.manual_seed(int(seed))


manual_seed_all = manual_seed


def seed() -> None:
    """Seed torch's CPU generator with a fresh number."""
    torch.default_generator.seed()


seed_all = seed


def initial_seed() -> int:
    """Return the seed of torch's CPU generator."""
    return torch.default_generator.initial_seed()


def get_rng_state(device: _Device = None) -> torch.Tensor:
    """Return the state of torch's CPU generator, a uint8 tensor."""
    return torch.default_generator.get_state()


def set_rng_state(new_state: torch.Tensor, device: _Device = None) -> None:
    """Set the state of torch's CPU generator to what `get_rng_state` returned."""
    torch.default_generator.set_state(new_state)


class Event:
    """A point in time. Work is finished when a call returns, so an event is reached as soon as it is recorded."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> None:
        self._time: float | None = None

    def record(self, stream: Stream | None = None) -> None:
        """Note the time."""
        self._time = time.perf_counter()

    def elapsed_time(self, end_event: Event) -> float:
        """Return the milliseconds from this event to ``end_event``.

        Raises:
            RuntimeError: one of the two has not been recorded.
        """
        if self._time is None or end_event._time is None:
            raise RuntimeError("torch.npu.Event.elapsed_time: both events must be recorded first")
        return (end_event._time - self._time) * 1e3

    def query(self) -> bool:
        """Return True."""
        return True

    def wait(self, stream: Stream | None = None) -> None:
        """Do nothing."""

    def synchronize(self) -> None:
        """Do nothing."""


class Stream:
    """An order of execution. There is one order only, that of the program."""

    def __init__(self, device: _Device = None, priority: int = 0, **options: Any) -> None:
        self.device = torch.device("npu", _index(device))
        self.priority = priority

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exception: object) -> None:
        """Do nothing."""

    def query(self) -> bool:
        """Return True."""
        return True

    def record_event(self, event: Event | None = None) -> Event:
        """Record ``event``, or a new one, and return it."""
        event = event or Event(enable_timing=True)
        event.record(self)
        return event

    def synchronize(self) -> None:
        """Do nothing."""

    def wait_event(self, event: Event) -> None:
        """Do nothing."""

    def wait_stream(self, stream: Stream) -> None:
        """Do nothing."""


def current_stream(device: _Device = None) -> Stream:
    """Return a stream."""
    return Stream(device)


default_stream = current_stream


@contextmanager
def stream(stream: Stream | None) -> Iterator[None]:
    """Do nothing around a ``with`` block."""
    yield


def synchronize(device: _Device = None) -> None:
    """Do nothing: operations are finished when they return."""


def _does_nothing(path: str) -> Callable[..., None]:
    def nothing(*args: Any, **kwargs: Any) -> None:
        """Do nothing: see the table of names in the documentation."""

    nothing.__name__ = nothing.__qualname__ = path.rpartition(".")[2]
    return nothing


for _row in surface.ROWS:
    if _row.kind == surface.NOTHING and _row.owner == "torch.npu" and _row.name not in globals():
        globals()[_row.name] = _does_nothing(_row.path)


def __getattr__(name: str) -> Any:
    raise surface.missing("torch.npu", name)
