"""Ranks that differ about who goes on read what each of them wants, and nobody goes on by mistake."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest

import commfuse
from tests.faults.bodies import Body, die, error_of, run, struck, world
from tests.faults.rank import Notes
from tests.faults.work import round_without, split, v2

from . import core, layer  # noqa: F401 - skips where the core is not built


def different_tables(rank: int, world_size: int, notes: Notes) -> None:
    """Rank 3 leaves out rank 2, which lives, too; then it sees reason."""
    assert v2(rank, world_size, 0)
    if rank == 1:
        die()
    error_of(lambda: v2(rank, world_size, 1))
    found = error_of(lambda: round_without(rank, world_size, (0, 3) if rank == 3 else (0, 2, 3), 2))
    notes.write("found", {"error": found})
    notes.await_all("found", [0, 2, 3])  # whoever comes when the others have gone on to their next call takes part in that one
    notes.write("right", round_without(rank, world_size, (0, 2, 3), 3))


def test_different_tables_are_shown_on_all(tmp_path: Path) -> None:
    notes = run(tmp_path, 4, different_tables, 1)
    texts = [notes[rank]["found"]["error"]["text"] for rank in (0, 2, 3)]
    for rank, text in zip((0, 2, 3), texts, strict=True):
        assert notes[rank]["found"]["error"]["error"] == "MismatchError"
        assert "ranks of group '0' disagree on who goes on:" in text
        assert "rank 3: goes on with ranks 0, 3" in text
        assert "goes on with ranks 0, 2, 3" in text
        assert notes[rank]["right"]


def dead_in_the_table(rank: int, world_size: int, notes: Notes) -> None:
    """The table leaves out rank 2, which lives, and not rank 1, which is dead: nobody goes on with that."""
    assert v2(rank, world_size, 0)
    if rank == 1:
        die()
    error_of(lambda: v2(rank, world_size, 1))
    found = {} if rank == 2 else error_of(lambda: round_without(rank, world_size, (0, 1, 3), 2))
    notes.write("found", {"error": found})
    notes.await_all("found", [0, 2, 3])
    notes.write("right", round_without(rank, world_size, (0, 2, 3), 3))


def test_a_table_that_names_the_dead_is_refused(tmp_path: Path) -> None:
    notes = run(tmp_path, 4, dead_in_the_table, 1)
    for rank in (0, 3):
        text = notes[rank]["found"]["error"]["text"]
        assert "rank 1 (pid " in text
        assert "has ended" in text
        assert "Leave it out of elastic_info" in text
    assert all(notes[rank]["right"] for rank in (0, 2, 3))


def one_asks_who_lives(rank: int, world_size: int, notes: Notes) -> None:
    """Rank 0 asks who is alive, the others go on without asking."""
    assert v2(rank, world_size, 0)
    if rank == 1:
        die()
    error_of(lambda: v2(rank, world_size, 1))
    found = error_of(lambda: commfuse.alive(world()) if rank == 0 else round_without(rank, world_size, (0, 2, 3), 2))
    alive = commfuse.alive(world())
    notes.write("found", {"error": found, "alive": alive, "right": round_without(rank, world_size, alive, 3)})


def test_one_rank_asks_who_lives_while_the_others_go_on(tmp_path: Path) -> None:
    notes = run(tmp_path, 4, one_asks_who_lives, 1)
    for rank in (0, 2, 3):
        found = notes[rank]["found"]
        assert found["error"]["error"] == "MismatchError"
        assert "rank 0: asks who is alive" in found["error"]["text"]
        assert "goes on with ranks 0, 2, 3" in found["error"]["text"]
        assert (found["alive"], found["right"]) == ([0, 2, 3], True)


def death_while_asking(rank: int, world_size: int, notes: Notes, after: bool) -> None:
    from commfuse.backends.cpu.board import Board

    assert v2(rank, world_size, 0)
    if rank == 1:
        die()
    error_of(lambda: v2(rank, world_size, 1))
    with struck(Board, "show", die, after) if rank == 2 else nullcontext():
        first = commfuse.alive(world())
    second = commfuse.alive(world())
    notes.write("found", {"first": first, "second": second, "right": round_without(rank, world_size, second, 3)})


def death_before_answering(rank: int, world_size: int, notes: Notes) -> None:
    death_while_asking(rank, world_size, notes, False)


def death_after_answering(rank: int, world_size: int, notes: Notes) -> None:
    death_while_asking(rank, world_size, notes, True)


@pytest.mark.parametrize("body", [death_before_answering, death_after_answering])
def test_a_death_while_asking_who_lives(tmp_path: Path, body: Body) -> None:
    notes = run(tmp_path, 4, body, 1, 2)
    found = [notes[rank]["found"] for rank in (0, 3)]
    assert found[0] == found[1]
    assert found[0]["first"] in ([0, 3], [0, 2, 3])
    assert (found[0]["second"], found[0]["right"]) == ([0, 3], True)


def left_out_and_back(rank: int, world_size: int, notes: Notes) -> None:
    """Ranks 0, 1 and 3 go on without rank 2, which lives and knows; then all call together again."""
    assert v2(rank, world_size, 0)
    if rank != 2:
        assert round_without(rank, world_size, (0, 1, 3), 1)
        assert round_without(rank, world_size, (0, 1, 3), 2)
    right = [v2(rank, world_size, seed) and split(rank, world_size, seed) for seed in (3, 4)]
    notes.write("right", right)


def test_a_living_rank_is_left_out_and_taken_in_again(tmp_path: Path) -> None:
    notes = run(tmp_path, 4, left_out_and_back)
    assert [one["right"] for one in notes] == [[True, True]] * 4
