"""What this process may use of the machine."""

from __future__ import annotations

import os
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


def affinity_cores() -> int:
    """Return the number of cores that the scheduler may put this process on."""
    return len(os.sched_getaffinity(0))


def quota_cores(membership: Path = MEMBERSHIP, root: Path = CGROUPS) -> float | None:
    """Return the CPU quota of this process's cgroups in cores, the tightest of them; None where there is none.

    Read from cgroup version 2 (``cpu.max``) or version 1 (``cpu.cfs_quota_us``). Inside a container the paths that the kernel
    names may lie outside the mount; then the mount's own top is what counts.
    """
    quotas = [quota for folder in _folders(membership, root) for quota in _quotas(folder)]
    return min(quotas, default=None)


def cores(membership: Path = MEMBERSHIP, root: Path = CGROUPS) -> float:
    """Return how many cores this process can keep busy: the smaller of affinity and quota."""
    quota = quota_cores(membership, root)
    return affinity_cores() if quota is None else min(affinity_cores(), quota)


def _folders(membership: Path, root: Path) -> list[Path]:
    """The folders of this process's cgroups, each up to the mount's top."""
    folders = []
    for line in _read(membership).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = root if not controllers else root / "cpu" if (root / "cpu").exists() else root / controllers
        here = top / path.lstrip("/")
        folders += [here, *(parent for parent in here.parents if parent.is_relative_to(top))]
    return folders


def _quotas(folder: Path) -> list[float]:
    """The quota of one cgroup in cores, or nothing."""
    limit = _read(folder / "cpu.max").split()
    if not limit:
        limit = [_read(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
    if len(limit) != 2 or not all(text.isdigit() and int(text) for text in limit):  # "max" and -1: none
        return []
    return [int(limit[0]) / int(limit[1])]


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""
