"""Running commands, here or in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass

import pytest

from commfuse.cli import main


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a command ended."""

    code: int
    out: str
    err: str


def here(capsys: pytest.CaptureFixture[str], *arguments: str) -> Outcome:
    """Run in this process: its monkeypatches hold for the command, not for the ranks that it starts."""
    try:
        code = main(arguments)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    out, err = capsys.readouterr()
    return Outcome(code=code, out=out, err=err)


def alone(*arguments: str, deadline: float = 60, **env: str) -> Outcome:
    """Run as a user does, with pipes for stdout and stderr."""
    done = subprocess.run(
        [sys.executable, "-m", "commfuse", *arguments],
        env={**os.environ, **env},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=deadline,
        check=False,
    )
    return Outcome(code=done.returncode, out=done.stdout, err=done.stderr)
