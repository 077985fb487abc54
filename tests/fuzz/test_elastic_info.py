"""`elastic_info` gives a table that every operator accepts and that keeps its promises, or an ArgumentError with the reasons."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest import mock

from hypothesis import example, given, settings
from hypothesis import strategies as st

import commfuse
from commfuse import groups
from commfuse.operators.moe_distribute import plan, values

SEEDED = settings(derandomize=True, database=None, deadline=None, max_examples=400)

RANKS = st.lists(st.integers(-1, 8), max_size=8)
NUMBERS = st.integers(-2, 5)


def built(world: int, alive: list[int], sizes: dict[str, Any]) -> list[int] | None:
    """The table; None if it was refused."""
    with mock.patch.object(groups, "resolve", return_value=SimpleNamespace(size=world)):
        try:
            return list(commfuse.elastic_info("any", alive, **sizes).tolist())
        except commfuse.ArgumentError as error:
            refused = str(error)
    assert refused.startswith("elastic_info: refused:\n  ")
    return None


def sizes_of(**changes: Any) -> dict[str, Any]:
    return {"moe_expert_num": 8, "shared_expert_num": 1, "shared_expert_rank_num": 0, "shared_ranks": None, **changes}


SIZES = st.fixed_dictionaries(
    {
        "moe_expert_num": st.integers(-1, 24),
        "shared_expert_num": NUMBERS,
        "shared_expert_rank_num": NUMBERS,
        "shared_ranks": st.none() | RANKS,
    }
)


@SEEDED
@given(st.integers(1, 8), RANKS, SIZES)
@example(4, [0, 1], sizes_of(moe_expert_num=4 * 2**31))  # beyond int32
@example(4, [0, 1, 2], sizes_of(shared_expert_num=-1, shared_expert_rank_num=2))
@example(4, [0, 1, 2], sizes_of(shared_expert_num=0, shared_expert_rank_num=2))
@example(4, [0, 1, 2], sizes_of(moe_expert_num=6, shared_expert_rank_num=-2))
@example(4, [], sizes_of())
def test_a_table_is_right_or_refused(world: int, alive: list[int], sizes: dict[str, Any]) -> None:
    table = built(world, alive, sizes)
    if table is None:
        return
    flag, living, shared, experts = table[:4]
    order = table[4 + world :][:living]
    assert (flag, living, sorted(order)) == (1, len(alive), sorted(alive))
    assert all(values.living_table(tuple(table), world, rank) == [] for rank in alive)
    assert experts == sizes["moe_expert_num"] // (world - sizes["shared_expert_rank_num"]) * (living - shared) > 0
    had = sizes["shared_expert_num"] if sizes["shared_expert_rank_num"] else 0
    assert shared % had == 0 if had else shared == 0
    assert sizes["shared_ranks"] in (None, order[:shared])
    top = plan.topology(world, sizes["shared_expert_rank_num"], had, sizes["moe_expert_num"], tuple(table))
    assert (top.world, top.shared_ranks) == (living, shared)


@SEEDED
@given(st.integers(2, 8), st.data())
def test_a_shrink_that_leaves_enough_is_never_refused(world: int, data: Any) -> None:
    """No shared experts: any one rank that is left is enough."""
    alive = data.draw(st.lists(st.integers(0, world - 1), min_size=1, unique=True))
    table = built(world, alive, sizes_of(moe_expert_num=3 * world))
    assert table is not None
    assert table[:4] == [1, len(alive), 0, 3 * len(alive)]
