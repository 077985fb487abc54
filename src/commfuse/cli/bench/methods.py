"""The methods that are measured side by side, in one table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .limits import Floor, Memcpy
from .method import Method, Problem
from .own import Commfuse
from .peers import AllGather, AllToAll
from .transports import Gloo, Mpi

LIMIT = "memcpy"


@dataclass(frozen=True, kw_only=True)
class MethodRow:
    """One method: how it is made on a rank, and what it needs."""

    name: str
    meaning: str
    make: Callable[[Problem], Method]
    backend: str | None = None  # of commfuse that must run it
    needs_mpi: bool = False
    exact: bool = False  # its bits are promised


def _in_window(problem: Problem) -> Method:
    return Commfuse(problem, in_window=True)


def _elsewhere(problem: Problem) -> Method:
    return Commfuse(problem, in_window=False)


def _gloo_all_to_all(problem: Problem) -> Method:
    return AllToAll(problem, Gloo())


def _gloo_all_gather(problem: Problem) -> Method:
    return AllGather(problem, Gloo())


def _mpi_all_to_all(problem: Problem) -> Method:
    return AllToAll(problem, Mpi())


def _mpi_all_gather(problem: Problem) -> Method:
    return AllGather(problem, Mpi())


METHODS = (
    MethodRow(
        name="cpu",
        meaning="commfuse, cpu backend; the experts' results lie in the window (commfuse.window_empty)",
        make=_in_window,
        backend="cpu",
        exact=True,
    ),
    MethodRow(
        name="cpu-copy",
        meaning="the same with the experts' results elsewhere: combine copies them in",
        make=_elsewhere,
        backend="cpu",
        exact=True,
    ),
    MethodRow(
        name="portable",
        meaning="commfuse, portable backend: torch.distributed over gloo",
        make=_elsewhere,
        backend="portable",
        exact=True,
    ),
    MethodRow(
        name="gloo",
        meaning="torch.distributed over gloo: all_to_all_single, permutes, weighted sum",
        make=_gloo_all_to_all,
    ),
    MethodRow(
        name="gloo-ag",
        meaning="torch.distributed over gloo: all-gather, own experts picked; partial sums, reduce-scatter",
        make=_gloo_all_gather,
    ),
    MethodRow(name="mpi", meaning="as gloo, with MPI Alltoallv", make=_mpi_all_to_all, needs_mpi=True),
    MethodRow(
        name="mpi-ag", meaning="as gloo-ag, with MPI Allgather and Reduce_scatter_block", make=_mpi_all_gather, needs_mpi=True
    ),
    MethodRow(
        name=LIMIT,
        meaning="no exchange: as many processes copy the bytes that they must end up with, row by row",
        make=Memcpy,
        exact=True,
    ),
    MethodRow(
        name="floor",
        meaning="no exchange: each rank's rows written from a few that the cache holds, and the returned rows read once and summed",
        make=Floor,
        exact=True,
    ),
)
