"""``import commfuse`` does no work: no thread, no process, no look at its settings, and hardly any time beside torch's own import."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from typing import Any

_PROBE = """
import json, os, sys, threading, time

begin = time.perf_counter()
import torch, torch.distributed
torch_seconds = time.perf_counter() - begin

read = []
kind = type(os.environ)
look_up = kind.__getitem__
kind.__getitem__ = lambda self, key: read.append(key) or look_up(self, key)
threads = len(os.listdir("/proc/self/task"))
environment = dict(os.environ)
read.clear()
loaded = set(sys.modules)

begin = time.perf_counter()
import commfuse
seconds = time.perf_counter() - begin

noted = [name for name in read if name.startswith(("COMMFUSE_", "HCCL_"))]
tasks = [f"/proc/self/task/{task}/children" for task in os.listdir("/proc/self/task")]
children = [open(path).read().split() for path in tasks if os.path.exists(path)]
print(json.dumps({
    "torch_seconds": torch_seconds,
    "seconds": seconds,
    "read": noted,
    "threads": len(os.listdir("/proc/self/task")) - threads,
    "children": sum(children, []),
    "changed": [name for name in {*os.environ, *environment} if os.environ.get(name) != environment.get(name)],
    "loaded": sorted({name.partition(".")[0] for name in set(sys.modules) - loaded}),
    "group": torch.distributed.is_initialized(),
}))
"""


@cache
def probe() -> dict[str, Any]:
    """What a fresh interpreter sees when it imports commfuse, with every variable set that a careless import would read."""
    environment = {**os.environ, "COMMFUSE_PRODUCT": "no such product", "HCCL_BUFFSIZE": "no number"}
    command = [sys.executable, "-c", _PROBE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_it_starts_nothing() -> None:
    assert (probe()["threads"], probe()["children"], probe()["group"]) == (0, [], False)


def test_it_neither_reads_nor_changes_the_environment() -> None:
    assert (probe()["read"], probe()["changed"]) == ([], [])


def test_it_takes_little_time() -> None:
    """0.2 s on a small machine where torch takes 3; the bound leaves room for a busy one."""
    assert probe()["seconds"] < max(0.5, 0.25 * probe()["torch_seconds"])


def test_it_loads_nothing_for_the_terminal_or_the_shim() -> None:
    assert {"rich", "torch_npu", "torchair", "argparse", "hypothesis", "pytest"}.isdisjoint(probe()["loaded"])
