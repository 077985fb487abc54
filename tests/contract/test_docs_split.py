"""The pages of the split path, the first version and combine with RMS norm: drawings and messages are what happens."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

import commfuse
from tests.conftest import RunRanks

from .test_docs import numbers, page

NAME = "npu_moe_distribute_{}"
SETUP, TEARDOWN, BACK, TOTAL = (
    NAME.format(half) for half in ("dispatch_setup", "dispatch_teardown", "combine_setup", "combine_teardown")
)
DISPATCH, COMBINE, NORM = (NAME.format(name) for name in ("dispatch", "combine", "combine_add_rms_norm"))


def program(name: str) -> str:
    return str(re.findall(r"```python\n(.*?)```", page(name), re.DOTALL)[0])


def constant(name: str, of: str) -> Any:
    return eval(re.findall(rf"{name} = (.*)", program(of))[0])


def drawn(name: str, pattern: str, begins: str = "rank 0") -> list[list[str]]:
    """What ``pattern`` finds in the page's drawing that begins with ``begins``: left half for rank 0, right half for rank 1."""
    (drawing,) = [
        text for text in re.findall(r"```\n(.*?)```", page(name), re.DOTALL) if re.match(rf"{begins}.{{20,}}rank 1|token", text)
    ]
    halves: list[list[str]] = [[], []]
    for line in drawing.splitlines():
        for half, text in zip(halves, (line[:42], line[42:]), strict=True):
            if found := re.fullmatch(pattern, text.strip()):
                half.append(" ".join(found.groups()))
    return halves


def run_program(rank: int, source: str, function: str) -> list[Any]:
    """The program's results on this rank, as lists."""
    namespace: dict[str, Any] = {}
    exec(source, namespace)
    return [result.tolist() for result in namespace[function](rank)]


# --- the split path ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def layer(run_ranks: RunRanks) -> list[list[Any]]:
    """y, expand_idx, the experts' rows, assist, nums and the sums of each rank."""
    return run_ranks(2, run_program, program(SETUP), "example")


def test_the_drawn_dispatch_setup_is_what_happens(layer: list[list[Any]]) -> None:
    posted = drawn(SETUP, r"(\d) +(\d+) \.\.\. +(\d)  +(\d)", "rank 0 holds")
    tokens = drawn(SETUP, r"(\d) +(\d+) \.\.\. +(\d) (\d)", "rank 0 holds")
    for rank, (y, index, *_) in enumerate(layer):
        ids = constant("IDS", SETUP)[rank]
        assert posted[rank] == [numbers(f, y[f][0], ids[f // 2][f % 2], index[f]) for f in range(6)]
        assert tokens[rank] == [numbers(t, 100 * rank + 10 * t, *ids[t]) for t in range(3)]
        assert len(y) == 9
        assert len(y[0]) == 256
        assert not any(any(row) for row in y[6:])


def test_the_drawn_dispatch_teardown_is_what_happens(layer: list[list[Any]]) -> None:
    rows = drawn(TEARDOWN, r"(\d) +(\d+) \.\.\.  (\d) +(\d)", "rank 0 holds")
    nums = drawn(TEARDOWN, r"expert_token_nums +(\d) (\d)", "rank 0 holds")
    sums = drawn(TEARDOWN, r"assist_info begins with +(\d) (\d) (\d) (\d)", "rank 0 holds")
    for rank, (_, _, made, assist, counts, _) in enumerate(layer):
        assert (nums[rank], sums[rank]) == ([numbers(*counts)], [numbers(*assist[:4])])
        places = sources(assist[:4])
        experts = [2 * rank + i for i, n in enumerate(counts) for _ in range(n)]
        found = [numbers(i, made[i][0] / (experts[i] + 1), experts[i], places[i]) for i in range(6)]
        assert rows[rank] == found


def sources(sums: list[int]) -> list[int]:
    """The source rank of each row, from the running sums over (local expert, source rank) of two ranks."""
    return [i % 2 for i, (end, begin) in enumerate(zip(sums, [0, *sums], strict=False)) for _ in range(end - begin)]


def test_the_drawn_combine_setup_is_what_happens(layer: list[list[Any]]) -> None:
    rows = drawn(BACK, r"(\d) +(\d+) \.\.\.  (\d) +(\d)", "rank 0 holds")
    sums = drawn(BACK, r"assist_info begins with +(\d) (\d) (\d) (\d)", "rank 0 holds")
    for rank, (_, _, made, assist, counts, _) in enumerate(layer):
        experts = [2 * rank + i for i, n in enumerate(counts) for _ in range(n)]
        assert rows[rank] == [numbers(i, made[i][0], experts[i], sources(assist[:4])[i]) for i in range(6)]
        assert sums[rank] == [numbers(*assist[:4])]


SUM = r"(\d) +([\d.]+) +([\d.]+) +([\d.]+) +\.\.\."


def test_the_drawn_combine_teardown_is_what_happens(layer: list[list[Any]]) -> None:
    for rank, (*_, out) in enumerate(layer):
        weights = constant("WEIGHTS", SETUP)[rank]
        assert drawn(TOTAL, SUM)[rank] == [numbers(t, *weights[t], out[t][0]) for t in range(3)]


# --- the first version, and RMS norm --------------------------------------------------------------------------------------------


def test_the_drawn_first_dispatch_is_what_happens(run_ranks: RunRanks) -> None:
    results = run_ranks(2, run_program, program(DISPATCH), "example")
    shown = drawn(DISPATCH, r"(\d) +(\d) (\d) +(\d) (\d)", "rank 0 ")
    for rank, (_, _, index, *_) in enumerate(results):
        ids = constant("IDS", DISPATCH)[rank]
        assert shown[rank] == [numbers(t, *ids[t], *index[2 * t : 2 * t + 2]) for t in range(3)]
    assert results[0][0][2][0] == 110  # the row that the text finds


def test_the_drawn_sharing_out_is_what_happens(run_ranks: RunRanks) -> None:
    results = run_ranks(4, run_program, program(DISPATCH), "shared")
    rows = drawn(DISPATCH, r"(\d) +(\d+) \.\.\. +(\d)", "rank 0: ")
    sums = drawn(DISPATCH, r"ep_recv_counts +(\d) (\d) (\d) (\d)", "rank 0: ")
    for rank, (expand_x, _, _, _, counts, _, _) in enumerate(results[:2]):
        assert rows[rank] == [numbers(i, row[0], row[0] // 100) for i, row in enumerate(expand_x[:6])]
        assert sums[rank] == [numbers(*counts)]
        assert len(expand_x) == counts[-1] == 6


def test_the_drawn_first_combine_is_what_happens(run_ranks: RunRanks) -> None:
    results = run_ranks(2, run_program, program(COMBINE), "example")
    rows = drawn(COMBINE, r"(\d) +(\d+) \.\.\.  (\d)", "rank 0 holds")
    for rank, (made, out) in enumerate(results):
        assert [text[: text.rindex(" ")] for text in rows[rank]] == [numbers(i, made[i][0]) for i in range(6)]
        weights = constant("WEIGHTS", COMBINE)[rank]
        assert drawn(COMBINE, SUM, "rank 0 holds")[rank] == [numbers(t, *weights[t], out[t][0]) for t in range(3)]


def test_the_drawn_norm_is_what_happens(run_ranks: RunRanks) -> None:
    results = run_ranks(2, run_program, program(NORM), "example")
    for rank, (y, rstd, x) in enumerate(results):
        for name, values in (("y", y[0][0]), ("rstd", rstd[0][0]), ("x", x[0][0])):
            shown = drawn(NORM, rf"{name} +([\d. ]+)", "rank 0 ")[rank]
            assert shown == [" ".join(f"{round(value, 4):g}" for value in values)], name


# --- the messages -----------------------------------------------------------------------------------------------------------------


def text_of(call: Callable[[], Any]) -> str:
    try:
        call()
    except commfuse.ArgumentError as error:
        return str(error)
    return ""


def run_changed(rank: int, source: str, old: str, new: str) -> str:
    """The message of the program with one piece of it changed."""
    assert source.count(old) >= 1
    namespace: dict[str, Any] = {}
    exec(source.replace(old, new), namespace)
    return text_of(lambda: namespace["example"](rank))


TWO_SETUPS = """
    first = commfuse.npu_moe_distribute_dispatch_setup(x, expert_ids, *domain)
    y, expand_idx, command = commfuse.npu_moe_distribute_dispatch_setup(x, expert_ids, *domain)
    try:
        commfuse.npu_moe_distribute_dispatch_teardown(x, y, expert_ids, command, *domain)
    finally:
        commfuse.npu_moe_distribute_dispatch_teardown(x, first[0], expert_ids, first[2], *domain)
        commfuse.npu_moe_distribute_dispatch_teardown(x, y, expert_ids, command, *domain)
"""
ONE_SETUP = "    y, expand_idx, command = commfuse.npu_moe_distribute_dispatch_setup(x, expert_ids, *domain)\n"
WRONG_INDEX = """
    try:
        commfuse.npu_moe_distribute_combine_teardown(
            rows, placeholder, expert_ids, expand_idx * torch.tensor([1, 1, 1, 1, rank, 1]).int(), weights, command, *domain
        )
    finally:
        commfuse.npu_moe_distribute_combine_teardown(
            rows, placeholder, expert_ids, expand_idx, weights, command, *domain
        )
    out = commfuse"""

MESSAGES = {
    "setup": (SETUP, SETUP, "[[1, 0], [2, 0], [3, 1]]", "[[1, 9], [2, 0], [3, 1]]", [0, 1]),
    "disagreement": (TEARDOWN, SETUP, "2, rank, 4", "2, rank, 4 + 4 * rank", [0, 1]),
    "order": (TEARDOWN, SETUP, ONE_SETUP, TWO_SETUPS, [0]),
    "assist": (BACK, SETUP, "    first = 0\n", "    assist[2] *= rank\n    first = 0\n", [0, 1]),
    "index": (TOTAL, SETUP, "    out = commfuse", WRONG_INDEX, [0]),
    "counts": (TOTAL, SETUP, "    first = 0\n", "    if rank == 0:\n        assist[1:4] -= 1\n    first = 0\n", [1]),
    "first version": (DISPATCH, DISPATCH, "[[1, 0], [2, 0], [3, 1]]", "[[1, 9], [2, 0], [3, 1]]", [0, 1]),
    "first combine": (COMBINE, COMBINE, "    first = 0\n", "    expand_idx[4] *= rank\n    first = 0\n", [0, 1]),
    "norm": (NORM, NORM, "[1.0, 1.0, 2.0, 2.0])", "[1.0, 1.0, 2.0, 2.0])[rank:]", [0, 1]),
}


@pytest.mark.parametrize("name", MESSAGES)
def test_the_messages_on_the_pages_are_real(run_ranks: RunRanks, name: str) -> None:
    on_page, of, old, new, readers = MESSAGES[name]
    messages = run_ranks(2, run_changed, program(of), old, new)
    for rank in readers:
        quoted = "\n".join(f"  {line}" for line in messages[rank].splitlines())
        assert messages[rank]
        assert plain(quoted) in plain(page(on_page))


def plain(text: str) -> str:
    """The text without the name of the group and the numbers of operations, which depend on what was called before."""
    text = re.sub(r"group '\w+'", "group '0'", text)
    return re.sub(r"comm_cmd_info\[0\] = \d+: must be \d+", "comm_cmd_info[0] = 4: must be 3", text)
