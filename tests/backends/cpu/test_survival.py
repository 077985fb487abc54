"""After a death those who are left go on: twice, out of different calls, in other roles."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import commfuse
from commfuse.checking.moe_distribute import MoeDistribute, groups_of
from commfuse.compare import difference
from commfuse.operators.moe_distribute.cases import RoundTrip
from tests.faults.bodies import Body, die, error_of, run, struck, world
from tests.faults.rank import Notes
from tests.faults.work import round_without, split, v2

from . import core, layer  # noqa: F401 - skips where the core is not built


def second_death(rank: int, world_size: int, notes: Notes) -> None:
    assert v2(rank, world_size, 0)
    if rank == 1:
        die()
    found = [error_of(lambda: v2(rank, world_size, 1))]
    assert commfuse.alive(world()) == (0, 2, 3)
    assert round_without(rank, world_size, (0, 2, 3), 2)
    if rank == 3:
        die()
    found.append(error_of(lambda: round_without(rank, world_size, (0, 2, 3), 3)))
    alive = commfuse.alive(world())
    right = [round_without(rank, world_size, alive, seed) for seed in (4, 5)]
    notes.write("found", {"errors": [one["text"] for one in found], "alive": alive, "right": right})


def test_a_second_death_is_survived_the_same_way(tmp_path: Path) -> None:
    notes = run(tmp_path, 4, second_death, 1, 3)
    for rank in (0, 2):
        found = notes[rank]["found"]
        assert "rank 1 (pid " in found["errors"][0]
        assert "rank 3 (pid " in found["errors"][1]
        assert (found["alive"], found["right"]) == ([0, 2], [True, True])


def death_while_agreeing(rank: int, world_size: int, notes: Notes, after: bool) -> None:
    """Rank 1 dies; rank 2 dies before, or after, it has shown the others with whom it goes on."""
    from commfuse.backends.cpu.board import Board

    assert v2(rank, world_size, 0)
    if rank == 1:
        die()
    error_of(lambda: v2(rank, world_size, 1))
    with struck(Board, "show", die, after) if rank == 2 else nullcontext():
        found = error_of(lambda: round_without(rank, world_size, (0, 2, 3), 2))
    alive = commfuse.alive(world())
    right = [round_without(rank, world_size, alive, seed) for seed in (4, 5)]
    notes.write("found", {"error": found, "alive": alive, "right": right})


def death_before_showing(rank: int, world_size: int, notes: Notes) -> None:
    death_while_agreeing(rank, world_size, notes, False)


def death_after_showing(rank: int, world_size: int, notes: Notes) -> None:
    death_while_agreeing(rank, world_size, notes, True)


@pytest.mark.parametrize("body", [death_before_showing, death_after_showing])
def test_a_death_while_the_others_agree(tmp_path: Path, body: Body) -> None:
    notes = run(tmp_path, 4, body, 1, 2)
    for rank in (0, 3):
        found = notes[rank]["found"]
        assert "rank 2 (pid " in found["error"]["text"]
        assert " has ended" in found["error"]["text"]
        assert (found["alive"], found["right"]) == ([0, 3], [True, True])


def different_calls(rank: int, world_size: int, notes: Notes) -> None:
    """Rank 1 dies when rank 0 has two setups under way and is in a dispatch, rank 2 in a teardown, and rank 3 in a barrier."""
    assert v2(rank, world_size, 0)
    assert split(rank, world_size, 0)
    x, ids, _ = layer.inputs(rank)
    common = layer.common(rank, world_size)
    setups = [commfuse.npu_moe_distribute_dispatch_setup(x, ids, **common) for _ in range({0: 2, 2: 1}.get(rank, 0))]
    notes.write("ready", rank)
    if rank == 1:
        notes.await_all("ready", [0, 2, 3])
        die()
    calls: dict[int, Callable[[], Any]] = {
        0: lambda: layer.dispatch(rank, world_size),
        2: lambda: commfuse.npu_moe_distribute_dispatch_teardown(x, setups[0][0], ids, setups[0][2], **common),
        3: lambda: commfuse._npu_distribute_barrier(torch.ones(1), world(), world_size),
    }
    error, again = error_of(calls[rank]), error_of(lambda: layer.dispatch(rank, world_size))
    right = round_without(rank, world_size, (0, 2, 3), 4)
    notes.write("found", {"texts": [error["text"], again["text"]], "right": right})


def test_survivors_that_were_interrupted_in_different_calls(tmp_path: Path) -> None:
    notes = run(tmp_path, 4, different_calls, 1)
    for rank in (0, 2, 3):
        for text in notes[rank]["found"]["texts"]:
            assert "rank 1 (pid " in text
            assert " has ended" in text
        assert notes[rank]["found"]["right"]


WHOLE = RoundTrip(id="whole", num_tokens=(3,) * 4, hidden=16, moe_expert_num=6, shared_expert_rank_num=1)
PROMOTED = replace(
    WHOLE, id="promoted", alive=(1, 2, 3), alive_shared_rank_num=1
)  # the shared-expert rank is gone: 1 takes its part
FEWER = replace(WHOLE, id="fewer", alive=(0, 1, 3), alive_shared_rank_num=1)
CHANGED = replace(WHOLE, id="changed", alive=(2, 1, 3), alive_shared_rank_num=1)


def problems(rank: int, case: RoundTrip) -> list[str]:
    """What of a round trip on this rank is not what the golden gives."""
    done = MoeDistribute().run_on_rank(rank, case)
    assert done is not None
    wanted = MoeDistribute().expected(case)[rank]
    pairs = zip(wanted, done.outputs, strict=True)
    return [text for one, got in pairs if (text := difference(one.name, one.tensor, got, one.valid))]


def other_roles(rank: int, world_size: int, notes: Notes, dead: int, case: RoundTrip, shared: tuple[int, ...] | None) -> None:
    (group,), _ = groups_of(WHOLE)
    assert problems(rank, WHOLE) == []
    if rank == dead:
        die()
    found = error_of(lambda: problems(rank, WHOLE))
    table = commfuse.elastic_info(group, commfuse.alive(group), moe_expert_num=6, shared_expert_rank_num=1, shared_ranks=shared)
    same = torch.equal(table, case.dispatch_args(rank)["elastic_info"])
    notes.write("found", {"error": found["text"], "table": same, "problems": problems(rank, case)})


def shared_rank_dies(rank: int, world_size: int, notes: Notes) -> None:
    other_roles(rank, world_size, notes, 0, PROMOTED, None)


def shared_rank_dies_and_another_is_named(rank: int, world_size: int, notes: Notes) -> None:
    other_roles(rank, world_size, notes, 0, CHANGED, (2,))


def moe_rank_dies(rank: int, world_size: int, notes: Notes) -> None:
    other_roles(rank, world_size, notes, 2, FEWER, None)


@pytest.mark.parametrize(
    ("body", "dead"), [(shared_rank_dies, 0), (shared_rank_dies_and_another_is_named, 0), (moe_rank_dies, 2)]
)
def test_shared_experts_and_changed_roles(tmp_path: Path, body: Body, dead: int) -> None:
    for rank, notes in enumerate(run(tmp_path, 4, body, dead)):
        if rank != dead:
            assert f"rank {dead} (pid " in notes["found"]["error"]
            assert notes["found"]["table"]
            assert notes["found"]["problems"] == []
