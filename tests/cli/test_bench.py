"""``commfuse bench`` as a user runs it, on small sizes."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

import commfuse.cli.bench as command
from commfuse.cli.bench import matmul_shapes, mpi, plot
from commfuse.cli.bench.figures import FIGURES
from commfuse.cli.bench.methods import METHODS, MethodRow
from commfuse.cli.bench.mpi import Mpi, MpiMissingError, settings

from .commands import Outcome, here
from .test_bench_launch import at_once

SIZES = ("--ranks", "2", "--tokens", "2", "--hidden", "16", "--topk", "2", "--experts", "4")
SHORT = ("--seconds", "0.01", "--rounds", "1")


@pytest.fixture(autouse=True)
def no_mpi(monkeypatch: pytest.MonkeyPatch) -> None:
    def find() -> Mpi:
        raise MpiMissingError("no MPI for this test")

    monkeypatch.setattr(mpi, "find", find)


def bench(capsys: pytest.CaptureFixture[str], *arguments: str) -> Outcome:
    return here(capsys, "bench", *SHORT, *arguments)


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    outcome = bench(capsys, *SIZES, "--methods", "cpu,gloo,mpi,memcpy", "--json")
    found = json.loads(outcome.out)
    assert (outcome.code, found["command"], found["passed"]) == (0, "bench", True)
    assert set(found["machine"]) == {"cores", "processor", "python", "torch", "commfuse"}
    assert [launch["workload"]["quant"] for launch in found["launches"]] == ["none", "int8"]
    first = found["launches"][0]
    assert first["workload"]["hidden"] == 16
    rows = {row["name"]: row for row in first["methods"]}
    assert list(rows) == ["cpu", "gloo", "mpi", "memcpy"]
    assert rows["cpu"]["proof"] == {"backend": "cpu", "exchanges": 0}
    assert set(rows["cpu"]["microseconds"]) == {*FIGURES, "transfer", "iterations"}
    for name in ("cpu", "gloo", "memcpy"):
        assert 0 < rows[name]["microseconds"]["transfer"] < rows[name]["microseconds"]["round_trip"]["p90"], name
    assert set(rows["cpu"]["microseconds"]["round_trip"]) == {"median", "p10", "p90"}
    assert set(rows["cpu"]["round_trip_ratio_to"]) == set(rows["cpu"]["back_to_back_ratio_to"]) == {"gloo", "memcpy"}
    assert (rows["mpi"]["microseconds"], rows["mpi"]["absent"]) == (None, "no MPI for this test")
    trips = {name: row["microseconds"]["round_trip"]["median"] for name, row in rows.items() if row["microseconds"]}
    assert rows["cpu"]["round_trip_ratio_to"]["gloo"] == pytest.approx(trips["cpu"] / trips["gloo"])


def test_a_table_and_a_file(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    file = tmp_path / "bench.json"
    outcome = bench(capsys, *SIZES, "--methods", "cpu,mpi", "--quant", "int8", "--json", str(file))
    assert (outcome.code, outcome.err) == (0, "")
    assert "\x1b" not in outcome.out
    assert "custom: 2 ranks, 2 tokens each, hidden size 16" in outcome.out
    assert any(line.split()[:1] == ["cpu"] and line.split()[-2:] == ["1.00", "-"] for line in outcome.out.splitlines())
    assert "  mpi: no MPI for this test" in outcome.out.splitlines()
    assert len(json.loads(file.read_text())["launches"]) == 1


def test_a_wrong_method_fails_the_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    off = MethodRow(name="off", meaning="wrong on purpose", make=at_once)
    monkeypatch.setattr(command, "METHODS", (off, *METHODS))
    outcome = bench(capsys, *SIZES, "--methods", "off,gloo", "--quant", "none")
    assert outcome.code == 1
    assert "off is WRONG: rank 1, sums: 1 of 32 values are off" in outcome.out
    assert [line.split()[0] for line in outcome.out.splitlines() if line.startswith("  off")] == ["off"]


def test_a_named_case_with_another_size(capsys: pytest.CaptureFixture[str]) -> None:
    outcome = bench(
        capsys, "--case", "D,A", "--tokens", "1", "--hidden", "32", "--quant", "none", "--methods", "memcpy", "--json"
    )
    found = [launch["workload"] for launch in json.loads(outcome.out)["launches"]]
    assert [(work["name"], work["num_tokens"], work["hidden"], work["num_experts"]) for work in found] == [
        ("D", 1, 32, 16),
        ("A", 1, 32, 16),
    ]


def test_goals_that_are_missed_fail_the_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command.goals, "LAUNCHES", 2)
    outcome = bench(capsys, "--case", "D", "--hidden", "16", "--quant", "none", "--methods", "cpu,memcpy", "--goals", "--json")
    found = json.loads(outcome.out)
    assert outcome.code == 1
    assert len(found["launches"]) == 2
    goals = {goal["other"]: goal for goal in found["goals"] if goal["method"] == "cpu"}
    assert set(goals) == {"gloo", "mpi", "memcpy"}
    assert (len(goals["memcpy"]["ratios"]), goals["gloo"]["median"], goals["gloo"]["reached"]) == (2, None, False)


def test_matmul(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    small = tuple(
        matmul_shapes.Shape(operator=operator, ranks=2, m=4, k=32, n=16) for operator in ("all-gather-mm", "gmm-alltoallv")
    )
    monkeypatch.setattr(matmul_shapes, "SHAPES", small)
    found = json.loads(bench(capsys, "--operators", "matmul", "--json").out)
    assert (found["passed"], [row["operator"] for row in found["matmul"]]) == (True, ["all-gather-mm", "gmm-alltoallv"])
    assert set(found["matmul"][0]["microseconds"]) == {"cpu", "gloo", "gloo-overlap", "compute"}
    assert [summary["shapes"] for summary in found["summaries"]] == [1, 1]
    outcome = bench(capsys, "--operators", "gmm-alltoallv")
    assert outcome.code == 0
    assert "all-gather-mm" not in outcome.out


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--case", "F"], "there is no case 'F'; there are A, B, C, D, E"),
        (["--methods", "cpu,nccl"], "there is no method 'nccl'; there are cpu, cpu-copy, portable"),
        (["--ranks", "3"], "16 experts do not divide among 3 ranks"),
        (["--topk", "17"], "a token cannot choose 17 of 16 experts"),
        (["--hidden", "30"], "--hidden 30: must be a multiple of 4, for the peers' messages"),
        (["--seconds", "many"], "argument --seconds: must be a number of seconds, not 'many'"),
        (["--seconds", "0"], "argument --seconds: must be in 0.01..600 seconds, not 0"),
    ],
)
def test_what_cannot_be_measured(capsys: pytest.CaptureFixture[str], options: list[str], sentence: str) -> None:
    outcome = here(capsys, "bench", *options)
    assert outcome.code == 2
    assert outcome.err.startswith(f"commfuse bench: {sentence}")
    assert outcome.err.count("\n") == 1


def test_a_plot_without_matplotlib_is_refused_first(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def find(name: str) -> Any:
        return None if name == "matplotlib" else importlib.util.find_spec(name)

    monkeypatch.setattr(plot, "find_spec", find)
    outcome = bench(capsys, *SIZES, "--plot", "bench.png")
    assert outcome.code == 2
    assert outcome.err == "commfuse bench: --plot needs matplotlib; pip install 'commfuse[plot]' brings it\n"


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib (the extra `plot`)")
def test_a_plot(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "bench.png"
    assert bench(capsys, *SIZES, "--methods", "cpu,memcpy", "--plot", str(file)).code == 0
    assert file.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("version", "ranks", "options", "variables"),
    [
        ("Intel(R) MPI Library 2021.19", 1, [], {"I_MPI_PIN": "0", "I_MPI_FABRICS": "shm"}),
        ("Intel(R) MPI Library 2021.19", 999, [], {"I_MPI_PIN": "0", "I_MPI_FABRICS": "shm", "I_MPI_THREAD_YIELD": "2"}),
        ("MPICH Version: 5.0.2", 2, [], {}),
    ],
)
def test_how_mpi_is_started(version: str, ranks: int, options: list[str], variables: dict[str, str]) -> None:
    assert settings(Mpi(version=version, launcher="mpiexec"), ranks) == (options, variables)


def test_open_mpi_binds_nothing() -> None:
    options, _ = settings(Mpi(version="Open MPI v5.0.11", launcher="mpiexec"), 2)
    assert options == ["--bind-to", "none", "--map-by", ":OVERSUBSCRIBE"]
