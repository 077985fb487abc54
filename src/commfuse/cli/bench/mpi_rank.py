"""The program of a rank that mpiexec starts: connect to the command that wanted it, and do what it is told."""

from __future__ import annotations

import os
import socket
import sys
from multiprocessing.connection import Connection

from mpi4py import MPI

from ...ranks import _serve


def main(address: str, store: str) -> None:
    """Serve as the rank that MPI says; ``address``: a unix socket, ``store``: a file for torch.distributed's start."""
    world = MPI.COMM_WORLD
    caller = socket.socket(socket.AF_UNIX)
    caller.connect(address)
    pipe = Connection(caller.detach())
    pipe.send((world.rank, os.getpid()))
    _serve(pipe, world.rank, world.size, store)


if __name__ == "__main__":
    main(*sys.argv[1:])
