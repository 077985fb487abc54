"""Which host a process is on, as far as shared windows are concerned, and what keeps it from using them."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

from ... import peers


def missing() -> list[str]:
    """Return what this process lacks for windows; empty when nothing."""
    if sys.platform != "linux":
        return [f"windows need Linux, this is {sys.platform}"]
    if importlib.util.find_spec("commfuse._core") is None:
        return ["the C++ core is not built: install commfuse again where a C++ compiler is found"]
    try:
        importlib.import_module("commfuse._core")
    except ImportError as error:
        return [f"the C++ core cannot be loaded: {error}"]
    return []


def identity() -> str:
    """Return a text that is equal in two processes only if they can map each other's windows: see `peers.place`."""
    return peers.place()


def cores() -> int:
    """Return how many cores this process may use: its affinity, or the cgroup's CPU quota if that is less."""
    allowed = len(os.sched_getaffinity(0))
    quota = _read("/sys/fs/cgroup/cpu.max").split()
    if len(quota) == 2 and quota[0].isdigit():
        allowed = min(allowed, max(int(quota[0]) // int(quota[1]), 1))
    return allowed


def large_copy(ranks: int) -> int:
    """Return from how many bytes on what one rank receives goes past the cache; 0 (never) where the cache's size is not known.

    A quarter of the last level, shared by all ``ranks``: a layer's rows then leave room for what the experts and combine read.
    """
    cache = "/sys/devices/system/cpu/cpu0/cache/index3/"
    size, sharing = _read(cache + "size"), _cpus(_read(cache + "shared_cpu_list"))
    if not size.endswith("K") or not size[:-1].isdigit() or not sharing:
        return 0
    caches = max((os.cpu_count() or 1) // sharing, 1)
    return int(size[:-1]) * 1024 * caches // (4 * ranks)


def _cpus(text: str) -> int:
    """Count the processors of a list like 0-3,8."""
    ends = [part.split("-") for part in text.split(",") if part]
    return sum(int(part[-1]) - int(part[0]) + 1 for part in ends)


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""
