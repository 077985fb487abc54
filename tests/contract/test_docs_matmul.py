"""The pages of the operators that fuse a matmul with communication: drawings and messages are what happens."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from commfuse import errors
from tests.conftest import RunRanks

from .test_docs import numbers, page, program

GMM, BACK = "npu_gmm_alltoallv", "npu_alltoallv_gmm"
GATHER, SCATTER, REDUCE = "npu_all_gather_base_mm", "npu_mm_reduce_scatter_base", "npu_mm_all_reduce_base"
BARRIER = "_npu_distribute_barrier"


def run_program(rank: int, source: str) -> list[Any]:
    namespace: dict[str, Any] = {}
    exec(source, namespace)
    return [result.tolist() for result in namespace["example"](rank)]


def constants(name: str) -> dict[str, Any]:
    """What the program defines in capitals: a value for each rank."""
    return {found[1]: eval(found[2]) for found in re.finditer(r"^([A-Z0-9]+) = (.*)$", program(name), re.MULTILINE)}


def drawn(name: str, pattern: str) -> list[list[str]]:
    """What ``pattern`` finds in the page's drawing, once for each rank: left half, right half."""
    (drawing,) = [text for text in re.findall(r"```\n(.*?)```", page(name), re.DOTALL) if "+---" in text]
    halves: list[list[str]] = [[], []]
    for line in drawing.splitlines():
        for half, text in zip(halves, (line[:42], line[42:]), strict=True):
            if found := re.fullmatch(pattern, text.strip()):
                half.append(" ".join(filter(None, found.groups())))
    return halves


def first_column(rows: list[list[float]]) -> list[float]:
    return [row[0] for row in rows]


def blocks(counts: list[int]) -> list[tuple[int, int]]:
    """(local expert, peer) of each row, sorted so; ``counts`` is [peer * 2 + expert]."""
    return [(expert, peer) for expert in range(2) for peer in range(2) for _ in range(counts[2 * peer + expert])]


# --- drawings --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [GMM, BACK])
def test_counts_in_the_drawing_are_those_of_the_program(name: str) -> None:
    for what, key in (("send_counts", "SEND"), ("recv_counts", "RECV")):
        assert drawn(name, rf"{what} +(\d) (\d) (\d) (\d)") == [[numbers(*counts)] for counts in constants(name)[key]]


def test_the_drawn_alltoallv_gmm_is_what_happens(run_ranks: RunRanks) -> None:
    results, known = run_ranks(2, run_program, program(BACK)), constants(BACK)
    rows, moved = drawn(BACK, r"(\d+) \.\.\. +(\d)"), drawn(BACK, r"(\d+) \.\.\. +(\d) +(\d) +(\d+) \.\.\.")
    for rank, (gmm_y, permute_out) in enumerate(results):
        experts = [i for i, count in enumerate(known["SEND"][rank]) for _ in range(count)]
        assert rows[rank] == [numbers(10 * (rank + 1) + i, expert) for i, expert in enumerate(experts)]
        places = [(2 * rank + expert, peer) for expert, peer in blocks(known["RECV"][rank])]
        before, after = first_column(permute_out), first_column(gmm_y)
        assert moved[rank] == [numbers(x, *place, y) for x, place, y in zip(before, places, after, strict=True)]


def test_the_drawn_gmm_alltoallv_is_what_happens(run_ranks: RunRanks) -> None:
    results, known = run_ranks(2, run_program, program(GMM)), constants(GMM)
    rows, came = drawn(GMM, r"(\d+) \.\.\. +(\d) +(\d)"), drawn(GMM, r"(\d+) \.\.\. +(\d)")
    for rank, (y,) in enumerate(results):
        places = [(2 * rank + expert, peer) for expert, peer in blocks(known["SEND"][rank])]
        assert rows[rank] == [numbers(x, *place) for x, place in zip(known["ROWS"][rank], places, strict=True)]
        experts = [i for i, count in enumerate(known["RECV"][rank]) for _ in range(count)]
        assert came[rank] == [numbers(x, expert) for x, expert in zip(first_column(y), experts, strict=True)]


def test_the_drawn_all_gather_is_what_happens(run_ranks: RunRanks) -> None:
    results, known = run_ranks(2, run_program, program(GATHER)), constants(GATHER)
    given, made = drawn(GATHER, r"(\d) (\d) +(\d) (\d) (\d)"), drawn(GATHER, r"(\d) (\d) {2,}(\d+) +(\d+) +(\d+)")
    for rank, (output, gather_out) in enumerate(results):
        inputs = [numbers(*row, *column) for row, column in zip(known["INPUT"][rank], known["X2"][rank], strict=True)]
        assert given[rank][:2] == inputs
        assert made[rank][-4:] == [numbers(*row, *out) for row, out in zip(gather_out, output, strict=True)]


@pytest.mark.parametrize(("name", "num_rows"), [(SCATTER, 4), (REDUCE, 2)])
def test_the_drawn_reductions_are_what_happens(run_ranks: RunRanks, name: str, num_rows: int) -> None:
    results, x2 = run_ranks(2, run_program, program(name)), constants(name)["X2"]
    given, made = drawn(name, r"(\d+) +(\d+)(?: {2,}(\d) (\d) (\d))?"), drawn(name, r"(\d+) +(\d+) +(\d+)")
    for rank, (output,) in enumerate(results):
        rows = [[(rank + 1) * 2 * i, (rank + 1) * (2 * i + 1)] for i in range(num_rows)]
        columns = [*x2[rank], *[[]] * (num_rows - 2)]
        assert given[rank] == [numbers(*row, *column) for row, column in zip(rows, columns, strict=True)]
        assert made[rank] == [numbers(*row) for row in output]


def test_the_barrier_gives_back_what_is_drawn(run_ranks: RunRanks) -> None:
    results = run_ranks(2, run_program, program(BARRIER))
    for rank, (result,) in enumerate(results):
        line = f"rank {rank}: x_ref = {numbers(*result)}"
        assert re.search(rf"^{line} +the result is {numbers(*result)}$", page(BARRIER), re.MULTILINE)


# --- messages --------------------------------------------------------------------------------------------------------------


def change(old: str, new: str) -> Callable[[str], str]:
    def changed(source: str) -> str:
        assert old in source
        return source.replace(old, new)

    return changed


OTHER_DTYPE = change(
    "    domain = ",
    "    gmm_x, gmm_weight = (t.to(torch.bfloat16 if rank else torch.float32) for t in (gmm_x, gmm_weight))\n    domain = ",
)
ELSEWHERE = "commfuse.npu_mm_all_reduce_base(torch.ones(1, 1), torch.ones(1, 1), dist.group.WORLD.group_name)"

MESSAGES = [
    (BACK, change("[1, 2, 0, 1], [2,", "[1, 2, 1, 0], [2,")),
    (BACK, OTHER_DTYPE),
    (GMM, change("[1, 2, 2, 0], [0,", "[1, 2, 1, 1], [0,")),
    (GMM, OTHER_DTYPE),
    (GATHER, change("[[2, 0, 0], [0, 2, 1]]", "[[2, 0, 0], [0, 2, 1], [0, 0, 0]]")),
    (GATHER, change("[[5, 6], [7, 8]]", "[[5, 6]]")),
    (SCATTER, change("arange(8).view(4, 2)", "arange(6).view(3, 2)")),
    (SCATTER, change(".half(), torch", ".half()[: 4 - 2 * rank], torch")),
    (REDUCE, change(".group_name)", ".group_name, reduce_op='avg')")),
    (REDUCE, change(".half(), torch", ".half()[: 2 - rank], torch")),
    (BARRIER, change("group_name, 2)", "group_name, 2 + rank)")),
    (BARRIER, change("    x = ", f"    if rank:\n        return {ELSEWHERE}\n    x = ")),
]


def refuse(rank: int, source: str) -> str:
    with pytest.raises(errors.ArgumentError) as caught:
        run_program(rank, source)
    return str(caught.value)


@pytest.mark.parametrize(("name", "wrong"), MESSAGES)
def test_the_messages_on_the_pages_are_real(run_ranks: RunRanks, name: str, wrong: Callable[[str], str]) -> None:
    for message in run_ranks(2, refuse, wrong(program(name))):
        quoted = "\n".join(f"  {line}" for line in message.splitlines())
        assert re.sub(r"group '\w+'", "group '0'", quoted) in page(name)
