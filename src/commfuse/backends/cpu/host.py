"""Which host a process is on, as far as shared windows are concerned, and what keeps it from using them."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

from ... import config


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
    """Return a text that is equal in two processes only if they can map each other's windows.

    The kernel that runs now, the namespaces in which processes and sockets are found, and ``COMMFUSE_HOST`` where that is set: ranks
    with different values of it are taken to be on different hosts.
    """
    parts = [_read("/proc/sys/kernel/random/boot_id"), _link("/proc/self/ns/pid"), _link("/proc/self/ns/net")]
    return " ".join([*parts, config.get("host")]).strip()


def cores() -> int:
    """Return how many cores this process may use: its affinity, or the cgroup's CPU quota if that is less."""
    allowed = len(os.sched_getaffinity(0))
    quota = _read("/sys/fs/cgroup/cpu.max").split()
    if len(quota) == 2 and quota[0].isdigit():
        allowed = min(allowed, max(int(quota[0]) // int(quota[1]), 1))
    return allowed


def large_copy() -> int:
    """Return from how many bytes on a copy goes past the cache: half of the last level, 0 (never) where its size is not known."""
    try:
        return max(os.sysconf("SC_LEVEL3_CACHE_SIZE"), 0) // 2
    except (ValueError, OSError):
        return 0


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""
