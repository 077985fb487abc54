"""MPI, where it is: found in this Python's environment, and ranks started by its mpiexec.

MPI's processes have to be MPI's children, so with MPI all methods run in ranks that mpiexec has started; they connect back to this
process and then do what they are told, as any other `commfuse.ranks.Ranks`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

from ...ranks import RankFailedError, Ranks

HOW = "pip install 'commfuse[bench]' brings mpi4py and an MPI"
_START = 60.0  # seconds for mpiexec to start the ranks
_LOOK = 0.2  # seconds between looks at whether it still lives
_END = 5.0  # seconds for it to end by itself
_RANK = "commfuse.cli.bench.mpi_rank"
_VERSION = "import mpi4py; mpi4py.rc.initialize = False; from mpi4py import MPI; print(MPI.Get_library_version())"


@dataclass(frozen=True, kw_only=True)
class Mpi:
    """An MPI that can be used."""

    version: str  # the library's name and version
    launcher: str  # path of mpiexec


class MpiMissingError(Exception):
    """There is no MPI to use; the text says what is missing and how to get it."""


def find() -> Mpi:
    """Return the MPI of this Python's environment.

    Raises:
        MpiMissingError: mpi4py, its library or mpiexec is not there.
    """
    done = subprocess.run([sys.executable, "-c", _VERSION], capture_output=True, text=True, timeout=_START, check=False)
    if done.returncode:
        why = "mpi4py is not installed" if "No module named 'mpi4py'" in done.stderr else _last_line(done.stderr)
        raise MpiMissingError(f"{why}; {HOW}")
    launcher = shutil.which("mpiexec", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if launcher is None:
        raise MpiMissingError(f"there is no mpiexec beside {sys.executable} or on the path; {HOW}")
    return Mpi(version=done.stdout.strip("\0\n ").splitlines()[0].split(" for ")[0].split(", package")[0], launcher=launcher)


def settings(mpi: Mpi, world_size: int) -> tuple[list[str], dict[str, str]]:
    """Return options of mpiexec, and environment variables, with which ``mpi`` runs ``world_size`` ranks well on one host.

    No rank is bound to a core: the methods share the processes, and gloo's threads, or a wait that knows one core alone, would suffer.
    Where ranks outnumber cores they have to give up their core while they wait.
    """
    crowded = world_size > len(os.sched_getaffinity(0))
    if "Intel" in mpi.version:
        return [], {"I_MPI_PIN": "0", "I_MPI_FABRICS": "shm", **({"I_MPI_THREAD_YIELD": "2"} if crowded else {})}
    if "Open MPI" in mpi.version:
        root = {f"{name}_ALLOW_RUN_AS_ROOT{rest}": "1" for name in ("OMPI", "PRTE") for rest in ("", "_CONFIRM")}
        return ["--bind-to", "none", "--map-by", ":OVERSUBSCRIBE"], root if os.geteuid() == 0 else {}
    return [], {}


class MpiRanks(Ranks):
    """``world_size`` ranks started by mpiexec; otherwise as `Ranks`."""

    def __init__(self, world_size: int, mpi: Mpi) -> None:
        self.world_size = world_size
        self._folder = tempfile.TemporaryDirectory(prefix="commfuse-")  # for this user alone, and so is the door in it
        options, variables = settings(mpi, world_size)
        address, store = os.path.join(self._folder.name, "door"), os.path.join(self._folder.name, "store")
        self._log = Path(self._folder.name, "log")
        with socket.socket(socket.AF_UNIX) as door, self._log.open("wb") as log:
            door.bind(address)
            door.listen(world_size)
            door.settimeout(_LOOK)
            self._launcher = subprocess.Popen(
                [mpi.launcher, *options, "-n", str(world_size), sys.executable, "-m", _RANK, address, store],
                env={**os.environ, **variables},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for the command itself
            )
            self._pipes, self._processes = [], []
            try:
                self._let_in(door)
            except BaseException:
                self.close()
                raise

    def close(self) -> None:
        """End the processes."""
        for pipe in self._pipes:
            with contextlib.suppress(OSError):
                pipe.send(None)
            pipe.close()
        if not self._launcher_ends():
            for process in self._processes:
                process.kill()
            self._launcher.terminate()
            if not self._launcher_ends():
                self._launcher.kill()
                self._launcher.wait()
        self._folder.cleanup()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None:  # they may be in the middle of anything
            for process in self._processes:
                process.kill()
        self.close()

    def _let_in(self, door: socket.socket) -> None:
        callers: dict[int, tuple[Connection, int]] = {}
        end = time.monotonic() + _START
        while len(callers) < self.world_size:
            try:
                caller, _ = door.accept()
            except TimeoutError:
                if self._launcher.poll() is not None or time.monotonic() > end:
                    raise RankFailedError(f"mpiexec did not start {self.world_size} ranks: {self._said()}") from None
                continue
            pipe = Connection(caller.detach())
            rank, pid = pipe.recv()
            callers[rank] = pipe, pid
        self._pipes = [callers[rank][0] for rank in range(self.world_size)]
        self._processes: list[Any] = [_Started(callers[rank][1]) for rank in range(self.world_size)]

    def _said(self) -> str:
        return self._log.read_text(errors="replace")[-2000:] or "it said nothing"

    def _launcher_ends(self) -> bool:
        try:
            self._launcher.wait(_END)
        except subprocess.TimeoutExpired:
            return False
        return True


@dataclass(frozen=True)
class _Started:
    """A process that mpiexec has started; what `Ranks` asks of one."""

    pid: int

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["mpi4py cannot be loaded"])[-1]
