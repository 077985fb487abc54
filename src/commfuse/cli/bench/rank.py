"""What one process does for the measurement, step by step. Its state stays here between the steps, which the parent starts."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from ... import config
from ...errors import CommfuseError
from .barrier import Barrier
from .formula import expected
from .method import Method, Problem, logical_bytes
from .methods import MethodRow
from .own import Commfuse
from .proof import Proof, counting_exchanges, proof_of
from .workload import Workload, inputs


@dataclass(frozen=True, kw_only=True)
class Ready:
    """What a rank tells about a method that it has made and tried."""

    absent: str = ""  # why it cannot run here
    wrong: tuple[str, ...] = ()  # in what its results differ from the formula
    proof: Proof | None = None  # of methods of commfuse
    logical_bytes: int = 0
    bytes_between_ranks: int = 0


@dataclass(frozen=True, kw_only=True)
class Times:
    """One rank's clock (nanoseconds, the same clock on all ranks) around each phase."""

    steps: list[tuple[int, int, int]]  # before dispatch, between, after combine
    loop: tuple[int, int]  # before and after as many round trips without a barrier
    moved_ns: int | None  # for how long rows were on their way within ``steps``, all together; None if not known
    wrong: tuple[str, ...]  # the last results, compared again


@dataclass(kw_only=True)
class _Here:
    problem: Problem
    barrier: Barrier
    methods: dict[str, tuple[MethodRow, Method]] = field(default_factory=dict)


_state: list[_Here] = []


def prepare(rank: int, workload: Workload, barrier_path: str) -> None:
    """Make this rank's inputs, and what it should get from them."""
    torch.set_num_threads(1)
    problem = Problem(workload=workload, rank=rank, inputs=inputs(workload, rank), expected=expected(workload, rank))
    _state[:] = [_Here(problem=problem, barrier=Barrier(barrier_path, rank, workload.ranks))]


def make(rank: int, row: MethodRow) -> Ready:
    """Make a method and run it once; nothing is measured whose results are wrong."""
    here = _state[0]
    with _backend(row):
        try:
            method = row.make(here.problem)
            method.dispatch()  # the first call of a group makes its connections
            method.combine()
            with counting_exchanges() as exchanges:
                method.dispatch()
                method.combine()
            here.methods[row.name] = row, method
            return Ready(
                wrong=_wrong(here, row, method),
                proof=proof_of(method.group, exchanges) if isinstance(method, Commfuse) else None,
                logical_bytes=logical_bytes(here.problem),
                bytes_between_ranks=method.bytes_between_ranks(),
            )
        except (CommfuseError, ImportError) as error:  # on all ranks alike
            return Ready(absent=str(error))


def measure(rank: int, name: str, iterations: int) -> Times:
    """Take the times of ``iterations`` round trips from a common start each, then of as many in a row."""
    here = _state[0]
    row, method = here.methods[name]
    with _backend(row):
        before = method.moved_ns()
        steps = [_one(here.barrier, method) for _ in range(iterations)]
        after = method.moved_ns()
        here.barrier.wait()
        begin = time.perf_counter_ns()
        for _ in range(iterations):
            method.dispatch()
            method.combine()
        end = time.perf_counter_ns()
        here.barrier.wait()
        method.dispatch()
        method.combine()
        moved = None if before is None or after is None else after - before
        return Times(steps=steps, loop=(begin, end), moved_ns=moved, wrong=_wrong(here, row, method))


def _one(barrier: Barrier, method: Method) -> tuple[int, int, int]:
    clock = time.perf_counter_ns
    barrier.wait()
    begin = clock()
    method.dispatch()
    between = clock()
    method.combine()
    return begin, between, clock()


def _wrong(here: _Here, row: MethodRow, method: Method) -> tuple[str, ...]:
    rows, scales = method.received()
    judge = here.problem.expected
    compare = judge.wrong_exactly if row.exact else judge.wrong_beyond_rounding
    return tuple(f"rank {here.problem.rank}, {text}" for text in compare(rows, scales, method.sums()))


@contextlib.contextmanager
def _backend(row: MethodRow) -> Iterator[None]:
    with config.override(backend=row.backend) if row.backend else contextlib.nullcontext():
        yield
