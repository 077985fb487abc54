"""From clocks to figures, from figures to goals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from commfuse.cli.bench import goals, matmul
from commfuse.cli.bench.figures import Figures, Spread, figures, ratio, spread, value
from commfuse.cli.bench.goals import GOALS, Goal, judge
from commfuse.cli.bench.launch import FEWEST, MOST, Effort, Launch, Row, iterations
from commfuse.cli.bench.matmul_methods import _transposed
from commfuse.cli.bench.matmul_shapes import GRID, OPERATORS, Shape
from commfuse.cli.bench.proof import Proof
from commfuse.cli.bench.rank import Times
from commfuse.cli.bench.workload import CASES
from commfuse.cli.terminal import console


def clocks(*steps: tuple[int, int, int], loop: tuple[int, int] = (0, 1000), moved_us: int | None = None) -> Times:
    """Clocks in microseconds."""
    moved_ns = None if moved_us is None else 1000 * moved_us
    in_ns = [(1000 * a, 1000 * b, 1000 * c) for a, b, c in steps]
    return Times(steps=in_ns, loop=(1000 * loop[0], 1000 * loop[1]), moved_ns=moved_ns, wrong=())


def made(round_trip: float, back_to_back: float = 1.0) -> Figures:
    some = Spread(median=1.0, p10=1.0, p90=1.0)
    trip = Spread(median=round_trip, p10=round_trip, p90=round_trip)
    return Figures(dispatch=some, combine=some, round_trip=trip, back_to_back=back_to_back, transfer=None, iterations=1)


def launched(case: str, quant: str = "none", **methods: Figures | None) -> Launch:
    rows = tuple(Row(name=name.replace("_", "-"), figures=found) for name, found in methods.items())
    return Launch(workload=replace(CASES[case], quant=quant), rows=rows, mpi="")


def test_the_slowest_rank_counts_and_a_trip_is_from_first_start_to_last_end() -> None:
    one = clocks((0, 10, 30), (100, 120, 130), loop=(0, 100))
    other = clocks((5, 12, 35), (100, 105, 150), loop=(4, 120))
    found = figures([[one, other]])
    assert found.dispatch.median == pytest.approx((10 + 20) / 2)
    assert found.combine.median == pytest.approx((23 + 45) / 2)
    assert found.round_trip.median == pytest.approx((35 + 50) / 2)
    assert found.back_to_back == pytest.approx(120 / 2)
    assert found.iterations == 2


def test_rounds_are_put_together() -> None:
    turns = [[clocks((0, 1, 2), loop=(0, end))] for end in (10, 30, 90)]
    found = figures(turns)
    assert (found.iterations, found.back_to_back) == (3, 30)


def test_transfer_is_the_slowest_ranks_per_round_trip() -> None:
    turns = [[clocks((0, 1, 2), (3, 4, 5), moved_us=moved), clocks((0, 1, 2), (3, 4, 5), moved_us=4)] for moved in (2, 6, 20)]
    assert figures(turns).transfer == 3
    assert figures([[clocks((0, 1, 2))]]).transfer is None


def test_percentiles() -> None:
    found = spread(np.arange(101.0))
    assert (found.p10, found.median, found.p90) == (10, 50, 90)


def test_ratios() -> None:
    assert ratio(made(30), made(10)) == 3
    assert ratio(made(30, 5), made(10, 10), "back_to_back") == 0.5
    assert value(made(30), "round_trip") == 30


def test_iterations_fit_into_the_time() -> None:
    effort = Effort(rounds=4, seconds=2.0)
    assert iterations(made(1000), effort) == 250
    assert iterations(made(1e9), effort) == FEWEST
    assert iterations(made(0.1), effort) == MOST


def test_the_goals_are_those_that_were_set() -> None:
    rows = [goal for goal in GOALS if goal.method == "cpu"]
    found = {(goal.case, goal.quant, goal.other): goal.at_least or goal.at_most for goal in rows}
    assert len(found) == len(rows) == 34
    asked = {
        "gloo": {"A": (10, 15), "B": (12, 18), "C": (15, 20), "D": (80, 80), "E": (10, 12)},
        "mpi": {"A": (5, 7), "B": (4, 7), "C": (5, 7), "D": (10, 12), "E": (3.5, 5)},
        "mpi-ag": {"A": (2.5, 2.5), "E": (2.5, 2.5)},
        "memcpy": {"A": (1.2, 1.2), "B": (2.5, 2.5), "C": (6, 6), "D": (2.5, 2.5), "E": (1.3, 1.3)},
    }
    wanted = {
        (case, quant, other): times
        for other, cases in asked.items()
        for case, both in cases.items()
        for quant, times in zip(("none", "int8"), both, strict=True)
    }
    assert found == wanted
    assert {goal.case for goal in GOALS if goal.figure == "back_to_back"} == {"B", "C"}


@pytest.mark.parametrize(("slow", "reached"), [((9, 10, 11), True), ((9, 9.5, 30), False), ((), False)])
def test_the_median_of_the_launches_counts(slow: Sequence[float], reached: bool) -> None:
    goal = Goal(case="A", quant="none", other="gloo", at_least=10)
    launches = [launched("A", cpu=made(1), gloo=made(times)) for times in slow] or [launched("A", cpu=made(1), gloo=None)]
    (found,) = judge(launches, [goal])
    assert (found.ratios, found.reached) == (tuple(slow), reached)


@pytest.mark.parametrize(("back_to_back", "reached"), [(2.5, True), (2.6, False)])
def test_at_most(back_to_back: float, reached: bool) -> None:
    goal = Goal(case="B", quant="int8", other="memcpy", at_most=2.5, figure="back_to_back")
    launches = [launched("B", "int8", cpu=made(99, back_to_back), memcpy=made(1, 1.0))]
    assert [row.reached for row in judge(launches, [goal])] == [reached]


@pytest.mark.parametrize(
    ("proof", "backend", "wrong"),
    [
        (Proof(backend="cpu", exchanges=0), "cpu", ""),
        (Proof(backend="cpu", exchanges=2), "cpu", "2 messages went over the process group, not through windows"),
        (Proof(backend="portable", exchanges=2), "portable", ""),
        (Proof(backend="portable", exchanges=0), "cpu", "the group ran on portable, not on cpu"),
    ],
)
def test_the_way_that_was_taken(proof: Proof, backend: str, wrong: str) -> None:
    assert proof.wrong(backend) == wrong


def test_only_goals_of_what_was_measured() -> None:
    launches = [launched("D", cpu=made(1), gloo=made(100), memcpy=made(1))]
    found = judge(launches)
    assert {(row.goal.case, row.goal.quant) for row in found} == {("D", "none")}
    assert {row.goal.other: row.reached for row in found} == {"gloo": True, "mpi": False, "memcpy": True, "cpu": False}


def test_missed_goals_are_listed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    launches = [launched("D", cpu=made(1), cpu_copy=made(1.5), gloo=made(50), memcpy=made(1))]
    goals.draw(judge(launches), console())
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "Goals: 2 of 4 reached (medians of 5 launches)" in lines
    assert "D none 50.00 cpu at least 80 times as fast as gloo" in lines
    assert "D none nothing cpu at least 10 times as fast as mpi" in lines


def test_ratios_of_a_matmul_are_paired() -> None:
    shape = Shape(operator="all-gather-mm", ranks=2, m=1, k=256, n=2048)
    cpu, gloo, other = np.array([1.0, 3.0, 8.0]), np.array([4.0, 2.0, 8.0]), np.array([9.0, 9.0, 9.0])
    found = matmul.row(shape, {"cpu": cpu, "gloo": gloo, "gloo-overlap": other, "compute": cpu / 2}, ())
    assert (found.best_plain, found.against_plain, found.against_compute) == ("gloo", 1.0, 2.0)
    (summary,) = matmul.summaries([found])
    assert (summary.median, summary.worst, summary.wide_against_compute, summary.reached) == (1.0, 1.0, 2.0, False)


def test_a_turn_is_from_the_first_start_to_the_last_end() -> None:
    by_rank = [{"cpu": [(1000, 5000)]}, {"cpu": [(2000, 9000)]}]
    assert matmul.trips(by_rank)["cpu"].tolist() == [8.0]


def test_the_grid_is_as_wide_as_the_goals_ask() -> None:
    for operator in OPERATORS:
        mine = [shape for shape in GRID if shape.operator == operator]
        assert len(mine) >= 40
        assert {shape.ranks for shape in mine} == {2, 4}
        ends = [(min(sizes), max(sizes)) for sizes in zip(*((shape.m, shape.k, shape.n) for shape in mine), strict=True)]
        assert ends == [(1, 4096), (256, 8192), (64, 8192)]


def test_blocks_are_turned_around() -> None:
    counts = torch.tensor([[1, 2], [3, 0]])  # rows 0 | 1 2 | 3 4 5 |
    assert _transposed(counts).tolist() == [0, 3, 4, 5, 1, 2]
