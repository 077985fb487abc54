"""COMMFUSE_LOG: what is told, where it goes, and that the program's own logging is left alone."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys

import commfuse
from tests.conftest import RunRanks

from .calls import new_group, refused, round_trip

PROGRAM = """
import logging, sys, torch, torch.distributed as dist, commfuse
{before}
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
for _ in range(2):
    commfuse._npu_distribute_barrier(torch.zeros(2, 3), str(dist.group.WORLD.group_name), 1)
"""
LINE = r"_npu_distribute_barrier: group '0', rank 0 of 1, call {}: x_ref float32 \[2, 3\]: [\d,.]+ us"


def run(log: str, before: str = "") -> list[str]:
    """What a program with COMMFUSE_LOG=``log`` writes to stderr."""
    environment = {**os.environ, "COMMFUSE_LOG": log}
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM.format(before=before)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
    return [line for line in done.stderr.splitlines() if "commfuse" in line or "barrier" in line or line.startswith("  ")]


def test_calls_are_lines_on_stderr() -> None:
    lines = run("calls")
    assert len(lines) == 2
    for number, line in enumerate(lines, 1):
        assert re.fullmatch("commfuse: " + LINE.format(number), line)


def test_statistics_are_a_table_at_the_end() -> None:
    lines = run("statistics")
    assert lines[0].startswith("commfuse: group '0' on ")
    assert [line.split()[:3] for line in lines if "_npu_distribute_barrier" in line] == [["_npu_distribute_barrier", "2", "0"]]
    assert lines[-1].split() == ["0", "0.0", "this", "process"]


def test_off_says_nothing() -> None:
    assert run("off") == []


def test_a_program_that_has_set_up_logging_gets_the_lines_its_own_way() -> None:
    lines = run("calls", "logging.basicConfig(format='mine %(name)s %(levelname)s %(message)s', stream=sys.stderr)")
    assert [bool(re.fullmatch("mine commfuse INFO " + LINE.format(i), line)) for i, line in enumerate(lines, 1)] == [True, True]
    assert run("calls", "logging.getLogger('commfuse').setLevel(logging.WARNING)") == []


def logged(rank: int, log: str) -> list[str]:
    """The lines of a round trip, a refused call, and a round trip whose first call comes after a pause of the log."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("commfuse")
    logger.addHandler(handler)
    try:
        with commfuse.config.override(log=log, backend="cpu"):
            group = new_group()
            round_trip(rank, group)
            refused(rank, group)
        with commfuse.config.override(backend="cpu"):
            round_trip(rank, group)
        with commfuse.config.override(log=log, backend="cpu"):
            round_trip(rank, group)
    finally:
        logger.removeHandler(handler)
    return lines


def test_a_line_has_shapes_waits_and_errors(run_ranks: RunRanks) -> None:
    for rank, lines in enumerate(run_ranks(2, logged, "calls")):
        assert len(lines) == 5
        where = rf"group '\w+', rank {rank} of 2, call "
        waited = rf"[\d,.]+ us, waited [\d,.]+ us for rank {1 - rank}"
        dispatch = rf"npu_moe_distribute_dispatch_v2: {where}{{}}: x bfloat16 \[3, 8\], expert_ids int32 \[3, \d\]: "
        assert re.fullmatch(dispatch.format(1) + waited, lines[0])
        assert re.match(rf"npu_moe_distribute_combine_v2: {where}2: expand_x bfloat16 \[", lines[1])
        assert re.search(rf"{where}3: ArgumentError after [\d,.]+ us: npu_moe_distribute_dispatch_v2: refused on", lines[2])
        assert re.fullmatch(
            dispatch.format(6) + r"[\d,.]+ us", lines[3]
        )  # the waits of calls that were not logged are not its own
        assert re.search(rf"call 7: expand_x .*: [\d,.]+ us(, waited [\d,.]+ us for rank {1 - rank})?$", lines[4])


def test_off_logs_nothing(run_ranks: RunRanks) -> None:
    assert run_ranks(2, logged, "off") == [[], []]
