"""The core, or the reason why it is not there; addresses of arrays; and processes that end without ceremony."""

from __future__ import annotations

import importlib.util
import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy.typing as npt
import pytest

if importlib.util.find_spec("commfuse._core") is None:
    pytest.skip("commfuse._core is not built (needs a C++ compiler at install)", allow_module_level=True)

from commfuse import _core

__all__ = ["MIB", "_core", "address", "every_variant", "in_child", "status_of", "using"]

MIB = 1 << 20


def address(array: npt.NDArray[Any]) -> int:
    """Where a contiguous array lies."""
    assert array.flags.c_contiguous
    return int(array.ctypes.data)


def every_variant() -> list[str]:
    """The row kernels that this machine can run."""
    return [name for name in ("plain", "avx2", "avx512") if _core.has_kernels(name)]


@contextmanager
def using(variant: str) -> Iterator[None]:
    """Row kernels of one variant, then the best again."""
    _core.choose_kernels(variant)
    try:
        yield
    finally:
        _core.choose_kernels("")


def in_child(work: Callable[[], None]) -> int:
    """Run work in a forked child that then vanishes as if killed; returns its pid. A failure prints and exits with 1."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return pid


def status_of(pid: int) -> int:
    """Wait for a child: its exit code, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
