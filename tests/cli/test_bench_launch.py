"""A launch on real ranks: figures only after results have been compared, and wrong ones are found whenever they come."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch.distributed as dist

from commfuse.cli.bench import matmul_rank
from commfuse.cli.bench.barrier import Barrier
from commfuse.cli.bench.formula import expected
from commfuse.cli.bench.launch import Effort, Launch, launch
from commfuse.cli.bench.matmul import trips
from commfuse.cli.bench.matmul_shapes import OPERATORS, Shape
from commfuse.cli.bench.method import Method, Problem
from commfuse.cli.bench.methods import METHODS, MethodRow
from commfuse.cli.bench.mpi import MpiMissingError
from commfuse.cli.bench.peers import AllToAll
from commfuse.cli.bench.transports import Gloo
from commfuse.cli.bench.workload import DTYPES, ROUTINGS, Workload, inputs

from ..conftest import RunRanks

SMALL = Workload(name="small", ranks=2, num_tokens=3, hidden=16, top_k=2, num_experts=4)
SHORT = Effort(rounds=2, seconds=0.01)
BY_NAME = {row.name: row for row in METHODS}
NO_MPI = MpiMissingError("no MPI for this test")


def quiet(what: str, done: int | None = None, total: int | None = None) -> None:
    """Show nothing."""


def measure(run_ranks: RunRanks, workload: Workload, *methods: MethodRow) -> Launch:
    return launch(functools.partial(run_ranks, workload.ranks), workload, methods, SHORT, quiet, NO_MPI)


@pytest.mark.parametrize("quant", ["none", "int8"])
def test_every_method(run_ranks: RunRanks, quant: str) -> None:
    found = measure(run_ranks, replace(SMALL, quant=quant), *METHODS)
    assert found.passed
    assert {row.name: row.wrong for row in found.rows if row.wrong} == {}
    assert {row.name: row.absent for row in found.rows if row.absent} == {"mpi": str(NO_MPI), "mpi-ag": str(NO_MPI)}
    assert [row.name for row in found.rows if row.figures is None] == ["mpi", "mpi-ag"]
    backends = {row.name: row.proof.backend for row in found.rows if row.proof is not None}
    assert backends == {"cpu": "cpu", "cpu-copy": "cpu", "portable": "portable"}
    exchanges = {row.name: row.proof.exchanges for row in found.rows if row.proof is not None}
    assert exchanges["cpu"] == exchanges["cpu-copy"] == 0
    assert exchanges["portable"] > 0


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_peers_are_right_for_all_rows_and_routings(run_ranks: RunRanks, routing: str, dtype: str) -> None:
    workload = replace(SMALL, routing=routing, dtype=dtype, ranks=4, num_tokens=2, num_experts=8)
    found = measure(run_ranks, workload, BY_NAME["gloo"], BY_NAME["gloo-ag"], BY_NAME["cpu"])
    assert {row.name: (row.wrong, row.absent) for row in found.rows if row.figures is None} == {}


def test_bytes(run_ranks: RunRanks) -> None:
    """Every token chooses both experts of both ranks, so half of all rows pass from one rank to the other."""
    workload = replace(SMALL, top_k=4)
    found = measure(run_ranks, workload, *(BY_NAME[name] for name in ("cpu", "gloo", "gloo-ag", "memcpy", "floor")))
    rows, row_bytes = 2 * 3 * 4, 16 * 2
    assert {row.name: row.logical_bytes for row in found.rows} == dict.fromkeys(
        ("cpu", "gloo", "gloo-ag", "memcpy", "floor"), 2 * rows * row_bytes
    )
    packed, sums = row_bytes + 8 * 4, 4 * 16
    between = {row.name: row.bytes_between_ranks for row in found.rows}
    assert between == {
        "cpu": rows * row_bytes,
        "gloo": rows * row_bytes,
        "gloo-ag": 2 * 3 * (packed + sums),
        "memcpy": 0,
        "floor": 0,
    }


def test_a_limit_that_has_not_done_its_work_is_found() -> None:
    workload = replace(SMALL, ranks=1)
    problem = Problem(workload=workload, rank=0, inputs=inputs(workload, 0), expected=expected(workload, 0))
    for name in ("memcpy", "floor"):
        method = BY_NAME[name].make(problem)
        for work, result in ((method.dispatch, method.received), (method.combine, method.sums)):
            with pytest.raises(AssertionError):
                result()
            work()
            result()


class _Late(AllToAll):
    """Right the first times, then off by one in a sum, as a peer's buffer that is written too early would be."""

    def __init__(self, problem: Problem, right: int) -> None:
        super().__init__(problem, Gloo())
        self._left = right
        self._wrong_rank = problem.workload.ranks - 1

    def combine(self) -> None:
        super().combine()
        self._left -= 1
        if self._left < 0 and self._problem.rank == self._wrong_rank:
            self._sums[0, 0] += 1


def at_once(problem: Problem) -> Method:
    return _Late(problem, right=0)


def after_a_while(problem: Problem) -> Method:
    return _Late(problem, right=20)


@pytest.mark.parametrize("make", [at_once, after_a_while])
def test_wrong_results_have_no_figures(run_ranks: RunRanks, make: Any) -> None:
    off = MethodRow(name="off", meaning="wrong on purpose", make=make)
    found = measure(run_ranks, SMALL, off, BY_NAME["gloo"])
    assert not found.passed
    row = found.row("off")
    assert row is not None
    assert row.figures is None
    assert row.wrong[0].startswith("rank 1, sums: 1 of 48 values are off; the worst at (0, 0)")
    assert found.figures("gloo") is not None


def test_another_backend_than_the_row_says_is_found(run_ranks: RunRanks) -> None:
    found = measure(run_ranks, SMALL, replace(BY_NAME["cpu"], name="not-cpu", backend="portable"), BY_NAME["portable"])
    assert found.passed
    pretended = measure(run_ranks, SMALL, replace(BY_NAME["portable"], make=on_portable, backend="cpu"))
    assert pretended.rows[0].wrong[0] == "rank 0: the group ran on portable, not on cpu"
    assert pretended.rows[0].figures is None


def on_portable(problem: Problem) -> Method:
    from commfuse import config

    config.set(backend="portable")  # as if the setting had no effect
    return BY_NAME["portable"].make(problem)


def test_a_backend_that_cannot_run_is_absent_with_its_reason(run_ranks: RunRanks) -> None:
    found = measure(run_ranks, SMALL, replace(BY_NAME["portable"], backend="none-such"))
    assert found.passed
    assert "there is no such backend" in found.rows[0].absent


def one_after_another(rank: int, path: str, rounds: int) -> bool:
    """Every rank counts a number up in turn; between two barriers nobody else writes."""
    barrier = Barrier(path, rank, dist.get_world_size())
    for turn in range(rounds):
        if turn % dist.get_world_size() == rank:
            with open(path + ".number", "r+", encoding="utf-8") as file:
                number = int(file.read())
                file.seek(0)
                file.write(str(number + 1))
        barrier.wait()
    with open(path + ".number", encoding="utf-8") as file:
        return file.read() == str(rounds)


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_barrier_holds_everybody(run_ranks: RunRanks, tmp_path: Any, world_size: int) -> None:
    (tmp_path / "barrier.number").write_text("0")
    assert run_ranks(world_size, one_after_another, str(tmp_path / "barrier"), 200) == [True] * world_size


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize(("ranks", "m"), [(2, 1), (2, 6), (4, 9)])
def test_matmul_methods(run_ranks: RunRanks, tmp_path: Any, operator: str, ranks: int, m: int) -> None:
    shape = Shape(operator=operator, ranks=ranks, m=m, k=24, n=8)
    made = run_ranks(ranks, matmul_rank.make, shape, str(tmp_path / "barrier"))
    assert made == [()] * ranks
    turns = trips(run_ranks(ranks, matmul_rank.measure, 3))
    names = {"cpu", "gloo", "compute"} | ({"gloo-overlap"} if operator == "all-gather-mm" else set())
    assert {name: len(times) for name, times in turns.items()} == dict.fromkeys(names, 3)
    assert all((times > 0).all() for times in turns.values())
