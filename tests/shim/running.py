"""Running scripts through ``python -m commfuse run``, each under a deadline."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

SCRIPTS = Path(__file__).parent / "scripts"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run ended: ``code`` is None when it had to be ended at its deadline."""

    code: int | None
    out: str
    err: str

    def __str__(self) -> str:
        return f"code {self.code}\n--- stdout\n{self.out[-3000:]}\n--- stderr\n{self.err[-6000:]}"


def run(*arguments: str | Path, deadline: float = 150, env: dict[str, str] | None = None) -> Outcome:
    """Run ``commfuse run`` with ``arguments``; at ``deadline`` seconds end it and every process that it started."""
    process = subprocess.Popen(
        [sys.executable, "-m", "commfuse", "run", *map(str, arguments)],
        env={**os.environ, **(env or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    code: int | None
    try:
        out, err = process.communicate(timeout=deadline)
        code = process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        code = None
    return Outcome(code=code, out=out, err=err)


def free_port() -> str:
    """Return a TCP port of this host that nothing uses, below those that the system hands out to connections by itself."""
    first_ephemeral = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    for port in random.SystemRandom().sample(range(10_000, first_ephemeral), 100):  # tests may run side by side
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return str(port)
    raise AssertionError("no free port")
