"""Ranks of two hosts, which are network namespaces here: the group runs on portable by itself, and on cpu never."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import commfuse
from commfuse import backends, config, groups
from commfuse.ranks import Ranks
from tests.backends.cpu import core, layer  # noqa: F401 - skips where the core is not built
from tests.conftest import RunRanks

ROOT = Path(__file__).parents[2]


def told(call: Callable[[], Any]) -> tuple[str, str]:
    try:
        call()
    except commfuse.CommfuseError as error:
        return type(error).__name__, str(error)
    return "", ""


def on_host_of_its_own(rank: int) -> dict[str, Any]:
    """A round trip with each setting, from a host that COMMFUSE_HOST makes another one for every second rank."""
    group = groups.resolve(layer.common(rank, 4)["group_ep"])
    found: dict[str, Any] = {}
    with config.override(host=f"host {rank % 2}"):
        with config.override(backend="cpu"):
            found["cpu"] = told(lambda: layer.dispatch(rank, 4))
        with config.override(backend="auto"):
            out = layer.dispatch(rank, 4)
            found["right"] = bool((layer.combine(rank, 4, out, out[0] * 2) == layer.expected(rank)).all())
            found["runs on"] = backends.of(group).name
    return found


def test_a_group_over_two_hosts_runs_on_portable_and_cpu_says_why_not() -> None:
    with Ranks(4) as ranks:
        found = ranks.run(on_host_of_its_own)
    assert len({one["cpu"] for one in found}) == 1
    for one in found:
        kind, text = one["cpu"]
        assert kind == "BackendError"
        for rank in range(4):
            assert f"rank {rank}, cpu: the ranks are on different hosts; this one is on " in text
        assert "host 0" in text
        assert "host 1" in text
        assert (one["right"], one["runs on"]) == (True, "portable")


def after_a_change_of_host(rank: int) -> list[str]:
    """The same ranks, once they are on one host again and ask for that."""
    group = groups.resolve(layer.common(rank, 2)["group_ep"])
    names = []
    for setting in ("auto", "cpu"):
        with config.override(backend=setting):
            layer.dispatch(rank, 2)
            names.append(backends.of(group).name)
    return names


def test_ranks_of_one_host_run_on_cpu(run_ranks: RunRanks) -> None:
    assert run_ranks(2, after_a_change_of_host) == [["cpu", "cpu"]] * 2


# --- two network namespaces, joined by a pair of interfaces ---------------------------------------------------------------------------

SCRIPT = """
import sys
from datetime import timedelta
import torch.distributed as dist
import commfuse
from commfuse import backends, config, groups
from tests.backends.cpu import layer

rank, world_size = int(sys.argv[1]), 2
store = dist.TCPStore("10.213.7.1", 29631, world_size, is_master=rank == 0, timeout=timedelta(seconds=30))
dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=30))
try:
    with config.override(backend="cpu"):
        layer.dispatch(rank, world_size)
except commfuse.BackendError as error:
    print(error)
out = layer.dispatch(rank, world_size)
x = layer.combine(rank, world_size, out, out[0] * 2)
print(bool((x == layer.expected(rank)).all()), backends.of(groups.resolve(layer.common(rank, world_size)["group_ep"])).name)
dist.barrier()
"""

# In a user namespace that makes us root in it, every rank gets a network namespace of its own.
HOSTS = """
set -e
ip link set lo up
ip link add here type veth peer name there
ip addr add 10.213.7.1/24 dev here
ip link set here up
unshare --net sh -c 'echo $$ > "$FOLDER/pid"; read _ < "$FOLDER/go"; ip link set lo up; ip addr add 10.213.7.2/24 dev there;
    ip link set there up; GLOO_SOCKET_IFNAME=there exec timeout 60 "$PYTHON" -c "$SCRIPT" 1' > "$FOLDER/1" 2>&1 &
until [ -s "$FOLDER/pid" ]; do sleep 0.01; done
ip link set there netns "$(cat "$FOLDER/pid")"
echo > "$FOLDER/go"
GLOO_SOCKET_IFNAME=here timeout 60 "$PYTHON" -c "$SCRIPT" 0 > "$FOLDER/0" 2>&1
wait $!
"""
_TRY = "ip link set lo up && ip link add here type veth peer name there"


@pytest.fixture
def namespaces() -> None:
    """Skips where this process may not make network namespaces, with what the machine says."""
    try:
        tried = subprocess.run(["unshare", "-rn", "sh", "-c", _TRY], capture_output=True, text=True, timeout=20)
    except FileNotFoundError:
        pytest.skip("needs unshare, of util-linux")
    if tried.returncode:
        pytest.skip(f"network namespaces cannot be made here: {tried.stderr.strip()}")


@pytest.mark.usefixtures("namespaces")
def test_two_network_namespaces_are_two_hosts(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "go")
    around = {"FOLDER": str(tmp_path), "PYTHON": sys.executable, "SCRIPT": SCRIPT, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["unshare", "-rn", "sh", "-c", HOSTS], env={**os.environ, **around}, capture_output=True, text=True, timeout=120
    )
    texts = [(tmp_path / str(rank)).read_text() for rank in range(2)]
    assert done.returncode == 0, "\n".join([done.stderr, *texts])
    for text in texts:
        assert text.rstrip().endswith("True portable")
        for rank in range(2):
            assert f"rank {rank}, cpu: the ranks are on different hosts; this one is on " in text
    namespaces = {line.rpartition("net:[")[2] for line in texts[0].splitlines() if "different hosts" in line}
    assert len(namespaces) == 2
