"""Failed child processes, noted where `commfuse run` can see them.

Published scripts start their ranks with multiprocessing, join them and print that all went well, whatever the ranks'
exit codes. So each process under `commfuse run` that starts children appends to one file when a child has failed, and
again when the script has looked at that child's ``exitcode``, or had ended the child itself: then it is the script's own
affair. What is left at the end failed unseen.
"""

from __future__ import annotations

import os
from multiprocessing import popen_fork, popen_forkserver, process
from pathlib import Path
from typing import Any

LOG_VARIABLE = "COMMFUSE_RUN_LOG"
"""The environment variable that names the file; set by `commfuse run` alone."""


def watch() -> None:
    """Begin to note failed children of this process and of its forked children, if `commfuse run` asks for it."""
    log = os.environ.get(LOG_VARIABLE)
    if log:
        _note_failures(popen_fork.Popen, Path(log))
        _note_failures(popen_forkserver.Popen, Path(log))
        _note_terminations(popen_fork.Popen, Path(log))
        _note_looks(process.BaseProcess, Path(log))


def unseen(log: Path) -> list[str]:
    """Return one line per child that failed unseen, in the order of their ends."""
    failed: dict[str, str] = {}
    for line in log.read_text().splitlines() if log.exists() else []:
        event, key, text = line.split(" ", 2)
        if event == "failed":
            failed[key] = text
        else:
            failed.pop(key, None)
    return list(failed.values())


def _append(log: Path, event: str, child: Any, text: str = "-") -> None:
    line = f"{event} {os.getpid()}:{child.pid} {text}\n".encode()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        os.write(file, line)  # one write of a short line: other processes' lines stay whole
    finally:
        os.close(file)


def _note_failures(popen: Any, log: Path) -> None:
    """Note a failure when the child's end becomes known to the process that started it."""
    original = popen.poll

    def poll(self: Any, *args: Any, **kwargs: Any) -> int | None:
        before = self.returncode
        code: int | None = original(self, *args, **kwargs)
        if before is None and code and not getattr(self, "_ended_by_script", False):
            how = f"was ended by signal {-code}" if code < 0 else f"exited with code {code}"
            _append(log, "failed", self, f"process {self.pid} {how}")
        return code

    popen.poll = poll


def _note_terminations(popen: Any, log: Path) -> None:
    """Note that the script itself ended the child: ``Process.terminate`` and ``Process.kill``."""
    original = popen._send_signal

    def _send_signal(self: Any, signal: int) -> None:
        if self.returncode is None:
            self._ended_by_script = True
        original(self, signal)

    popen._send_signal = _send_signal


def _note_looks(base: Any, log: Path) -> None:
    """Note that the script has looked at the exit code of a child that had ended."""
    original = base.exitcode.fget

    def exitcode(self: Any) -> int | None:
        code: int | None = original(self)
        child = self._popen
        if code and child is not None and not getattr(child, "_looked_at", False):
            child._looked_at = True
            _append(log, "seen", child)
        return code

    base.exitcode = property(exitcode, doc=base.exitcode.__doc__)
