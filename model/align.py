"""How those who are left go on after a death: one attempt to agree, as in backends/cpu/align.py.

One look at all boards is one step here.
"""

from __future__ import annotations

from .explore import Violation
from .state import ALIGN, DEAD, ERROR, FAILED, HALVES, RUN, WHOLE, Agreed, Note, Rank, World, with_rank

MAX_TRIES = 4  # calls of one user until all have found together


def propose(world: World, me: int) -> list[World]:
    """The user calls again and leaves out whoever has ended by now."""
    rank = world[me]
    wanted = tuple(one for one in rank.active if world[one].mode != DEAD)
    if wanted == rank.active or rank.num_tries == MAX_TRIES:
        return [with_rank(world, me, rank._replace(mode=ERROR))]
    calls = rank.lines[WHOLE].published, rank.lines[HALVES].published
    mine = Agreed(max(rank.settled.attempt, rank.failed) + 1, wanted, calls)
    return [with_rank(world, me, _shown(rank._replace(mode=ALIGN, num_tries=rank.num_tries + 1), mine))]


def look(world: World, me: int, broken: frozenset[str]) -> list[World]:
    """One look at the boards; nothing while others are to be waited for."""
    rank, answers = world[me], {}
    mine = rank.mine
    silent = [one for one in mine.members if world[one].mode == DEAD and not _has_answered(world[one], mine)]
    if silent and "deaths are seen last" not in broken:
        return [_fail(world, me)]
    for one in mine.members:
        note = world[one].note
        if one == me or note is None:
            continue
        if (note.settled.attempt, note.settled.members) == (mine.attempt, mine.members):
            return [_settle(world, me, note.settled, broken)]
        if note.proposal.attempt < mine.attempt:
            continue
        if note.state == "failed":
            return [_fail(world, me)]
        newest = note.proposal.attempt + (note.state == "settled")
        if newest > mine.attempt:
            return [with_rank(world, me, _shown(rank, mine._replace(attempt=newest)))]
        if note.proposal.members != mine.members:
            return [_fail(world, me)]
        answers[one] = note.proposal.calls
    missing = [one for one in mine.members if one != me and one not in answers]
    if any(world[one].mode == DEAD for one in missing):
        return [_fail(world, me)]
    if missing and "nobody is waited for" not in broken:
        return []
    calls = [max(numbers) for numbers in zip(mine.calls, *answers.values(), strict=True)]
    if "calls go on from one's own" in broken:
        calls = list(mine.calls)
    return [_settle(world, me, mine._replace(calls=(calls[0], calls[1])), broken)]


def _has_answered(other: Rank, mine: Agreed) -> bool:
    return other.note is not None and other.note.proposal[:2] == mine[:2]


def _shown(rank: Rank, mine: Agreed) -> Rank:
    return rank._replace(mine=mine, note=Note("proposed", mine, rank.settled))


def _fail(world: World, me: int) -> World:
    rank = world[me]
    note = Note("failed", Agreed(rank.mine.attempt), rank.settled)
    return with_rank(world, me, rank._replace(mode=FAILED, failed=rank.mine.attempt, note=note))


def _settle(world: World, me: int, agreed: Agreed, broken: frozenset[str]) -> World:
    """Go on in a new epoch: numbers behind all that were used, what was lent and set up before is forgotten."""
    for other in world:
        if other.settled.attempt == agreed.attempt and me in other.settled.members and other.settled != agreed:
            raise Violation(f"rank {me} goes on with {agreed}, another with {other.settled}")
    rank = world[me]._replace(settled=agreed, note=Note("settled", agreed, agreed), active=agreed.members)
    if "the epoch stays" not in broken:
        rank = rank._replace(epoch=agreed.attempt)
    for line, newest in enumerate(agreed.calls):
        if newest < rank.lines[line].published:
            raise Violation(f"a counter of rank {me} would go back to {newest}")
        rank = rank.with_line(line, published=newest, consumed=newest, sequence=newest, start=newest, open=())
    rank = rank._replace(unheard=(), loans=(), has_changed_loan=False)
    return with_rank(world, me, rank._replace(mode=RUN, program=1, step=0))
