"""The steps of calls: begin, publish, hear, meet, pull, end; and what stops a group. As in backends/cpu/session.py and slabs.py.

A step is what no other process can see half of: one store to a counter, one look at the peers, or work on what is this rank's alone.
"""

from __future__ import annotations

from collections.abc import Callable

from .explore import Violation
from .state import DEAD, DIRTY, DONE, ERROR, FAILED, HALVES, RUN, TELL, Rank, Reading, Slab, World, with_rank

Step = tuple[str, int, int]  # verb, line, and a member or 0
OK, BLOCKED, POISONED, PEER_DEAD = "ok", "blocked", "poisoned", "peer dead"


class Calls:
    """The steps of one rank's program. ``broken``: rules that are left out, to see that their absence is found."""

    def __init__(
        self, *, programs: tuple[tuple[tuple[Step, ...], ...], ...], depth: int, broken: frozenset[str], elastic: bool
    ) -> None:
        self.programs, self.depth, self.broken, self.elastic = programs, depth, broken, elastic
        self._verbs: dict[str, Callable[[World, int, int, int], list[World]]] = {
            "begin": self._begin,
            "lend": self._begin,
            "publish": self._publish,
            "hear": self._hear,
            "meet": self._meet,
            "pull": self._pull,
            "end": self._end,
            "tensor": self._tensor,
            "touch": self._touch,
            "drop": self._drop,
        }

    def steps(self, world: World, me: int) -> list[World]:
        """The states to which the next step of this rank's program can lead; none while it waits."""
        rank = world[me]
        program = self.programs[me][rank.program]
        if rank.step == len(program):
            return [with_rank(world, me, rank._replace(mode=DONE))]
        verb, line, argument = program[rank.step]
        return self._verbs[verb](world, me, line, argument)

    # --- waiting, and stopping the group -----------------------------------------------------------------------------------

    def _wait(self, world: World, me: int, line: int, counter: str, target: int) -> str:
        rank = world[me]
        missing = [one for one in rank.active if one != me and getattr(world[one].lines[line], counter) < target]
        if not missing:
            return OK
        if rank.is_poisoned:
            return POISONED
        return PEER_DEAD if any(world[one].mode == DEAD for one in missing) else BLOCKED

    def _stopped(self, world: World, me: int, status: str) -> list[World]:
        if status == BLOCKED:
            return []
        return [self.give_up(world, me) if status == POISONED else self._stop(world, me)]

    def _stop(self, world: World, me: int) -> World:
        """Member 0's word decides which cause is the first; then every member is told, one after the other."""
        rank, arbiter = world[me], world[0]
        if arbiter.poison[0] < rank.epoch:
            world = with_rank(world, 0, arbiter._replace(poison=(rank.epoch, me)))
        return with_rank(world, me, world[me]._replace(mode=TELL, untold=tuple(range(1, len(world)))))

    def tell(self, world: World, me: int) -> list[World]:
        """Tell one more member."""
        rank = world[me]
        if not rank.untold:
            return [self.give_up(world, me)]
        world = with_rank(world, me, rank._replace(untold=rank.untold[1:]))
        other = world[rank.untold[0]]
        if other.poison[0] < world[0].poison[0]:
            world = with_rank(world, rank.untold[0], other._replace(poison=world[0].poison))
        return [world]

    def give_up(self, world: World, me: int) -> World:
        """The call ends with an error; what it had published is given back."""
        rank = world[me]
        for line, sequence, slab in rank.staged:
            rank = self._give_back(rank, line, sequence, slab)
        return with_rank(world, me, rank._replace(mode=FAILED if self.elastic else ERROR, staged=()))

    # --- slabs ---------------------------------------------------------------------------------------------------------------

    def _reading(self, rank: Rank, line: int, sequence: int) -> Reading:
        return Reading(line, sequence, rank.epoch, rank.active)

    def _give_back(self, rank: Rank, line: int, sequence: int, index: int) -> Rank:
        slab = rank.slabs[index]
        readings = (*slab.readings, self._reading(rank, line, sequence))
        return rank.with_slab(index, slab._replace(is_held=False, readings=readings))

    def _is_over(self, world: World, me: int, reading: Reading) -> bool:
        rank = world[me]
        if "reclaim without CONSUMED" in self.broken:
            return True
        if rank.epoch == reading.epoch:
            if self._wait(world, me, reading.line, "consumed", reading.sequence) == OK:
                return True
            if not rank.is_poisoned:
                return False
        others = [world[one] for one in reading.members if one != me]
        return all(other.lines[reading.line].consumed >= reading.sequence or other.mode == DEAD for other in others)

    def _take(self, world: World, me: int, content: tuple[int, int]) -> tuple[Rank, int]:
        """A slab that is free, or a new one, filled."""
        rank, index = world[me], 0
        for index, slab in enumerate(rank.slabs):  # noqa: B007
            if not slab.is_held and all(self._is_over(world, me, reading) for reading in slab.readings):
                self._check_unread(world, me, slab)
                break
        else:
            index = len(rank.slabs)
        return rank.with_slab(index, Slab(content, True)), index

    def _check_unread(self, world: World, me: int, slab: Slab) -> None:
        for reading in slab.readings:
            for one in reading.members:
                if one != me and world[one].mode == RUN and world[one].lines[reading.line].consumed < reading.sequence:
                    raise Violation(f"rank {me} writes to what rank {one} may still read for call {reading.sequence}")

    # --- one call ------------------------------------------------------------------------------------------------------------

    def _next(self, world: World, me: int, rank: Rank) -> list[World]:
        return [with_rank(world, me, rank._replace(step=rank.step + 1))]

    def _begin(self, world: World, me: int, line: int, lend: int) -> list[World]:
        rank = world[me]
        if rank.is_poisoned:
            return [self.give_up(world, me)]
        if rank.loans:
            if rank.has_changed_loan and "changed loans pass" not in self.broken:
                return [self._stop(world, me)]
            world = with_rank(world, me, rank := self._take_back(world, me, rank))
        sequence, mine = rank.lines[line].sequence + 1, rank.lines[line]
        if sequence > mine.start + self.depth and "no CONSUMED wait" not in self.broken:
            if line == HALVES and rank.unheard and rank.unheard[0] <= sequence - self.depth:
                return self._hear_one(world, me)
            status = self._wait(world, me, line, "consumed", sequence - self.depth)
            if status != OK:
                return self._stopped(world, me, status)
        rank = rank.with_line(line, sequence=sequence, open=(*mine.open, sequence))
        if lend:
            slab = rank.slabs[rank.tensor]
            slab = Slab((line, sequence), True, (*slab.readings, self._reading(rank, line, sequence)))
            return self._next(world, me, rank.with_slab(rank.tensor, slab)._replace(loans=(*rank.loans, (line, sequence))))
        rank, index = self._take(with_rank(world, me, rank), me, (line, sequence))
        return self._next(world, me, rank._replace(staged=(*rank.staged, (line, sequence, index))))

    def _publish(self, world: World, me: int, line: int, lend: int) -> list[World]:
        rank = world[me]
        mine = rank.lines[line]
        late = [one for one in rank.active if one != me and world[one].lines[line].consumed < mine.sequence - self.depth]
        if late and "no CONSUMED wait" not in self.broken:
            raise Violation(f"the core refuses to publish call {mine.sequence} of rank {me}: its header's place is not free")
        index = rank.tensor if lend else rank.staged[-1][2]
        place = mine.sequence % self.depth
        ring = (*mine.ring[:place], (mine.sequence, index), *mine.ring[place + 1 :])
        unheard = (*rank.unheard, mine.sequence) if line == HALVES else rank.unheard
        return self._next(world, me, rank.with_line(line, ring=ring, published=mine.sequence)._replace(unheard=unheard))

    def _hear_one(self, world: World, me: int) -> list[World]:
        rank = world[me]
        status = self._wait(world, me, HALVES, "published", rank.unheard[0])
        if status != OK:
            return self._stopped(world, me, status)
        self._check_headers(world, me, HALVES, rank.unheard[0])
        return [with_rank(world, me, rank._replace(unheard=rank.unheard[1:]))]

    def _hear(self, world: World, me: int, line: int, only_oldest: int) -> list[World]:
        """Before a whole call is met all setups are heard; before a teardown, those up to its own."""
        rank = world[me]
        upto = rank.lines[HALVES].open[0] if only_oldest else rank.lines[HALVES].sequence
        if rank.unheard and rank.unheard[0] <= upto:
            return self._hear_one(world, me)
        return self._next(world, me, rank)

    def _meet(self, world: World, me: int, line: int, _: int) -> list[World]:
        sequence = world[me].lines[line].sequence
        status = self._wait(world, me, line, "published", sequence)
        if status != OK:
            return self._stopped(world, me, status)
        self._check_headers(world, me, line, sequence)
        return self._next(world, me, world[me])

    def _check_headers(self, world: World, me: int, line: int, sequence: int) -> None:
        for one in world[me].active:
            seen = world[one].lines[line].ring[sequence % self.depth][0]
            if seen != sequence:
                raise Violation(f"rank {me} finds the header of call {seen} of rank {one} where {sequence} should be")

    def _pull(self, world: World, me: int, line: int, member: int) -> list[World]:
        rank = world[me]
        if member not in rank.active:
            return self._next(world, me, rank)
        sequence = rank.lines[line].open[0]
        self._check_headers(world, me, line, sequence)
        owner = world[member]
        content = owner.slabs[owner.lines[line].ring[sequence % self.depth][1]].content
        if content == DIRTY:
            world = with_rank(world, member, owner._replace(is_misread=True))
        elif content != (line, sequence):
            raise Violation(f"rank {me} reads data of call {content[1]} of rank {member} for call {sequence}")
        return self._next(world, me, world[me])

    def _end(self, world: World, me: int, line: int, _: int) -> list[World]:
        rank = world[me]
        mine = rank.lines[line]
        sequence, rest = mine.open[0], mine.open[1:]
        rank = rank.with_line(line, open=rest, consumed=rest[0] - 1 if rest else mine.sequence)
        for staged in rank.staged:
            if staged[:2] == (line, sequence):
                rank = self._give_back(rank, *staged)
        rank = rank._replace(staged=tuple(one for one in rank.staged if one[:2] != (line, sequence)))
        return self._next(world, me, self._take_back(world, me, rank))

    # --- a tensor that is published where it lies --------------------------------------------------------------------------

    def _take_back(self, world: World, me: int, rank: Rank) -> Rank:
        if "loans end with the call" in self.broken:
            return rank._replace(loans=())
        return rank._replace(
            loans=tuple(loan for loan in rank.loans if self._wait(world, me, loan[0], "consumed", loan[1]) != OK)
        )

    def _tensor(self, world: World, me: int, line: int, _: int) -> list[World]:
        rank, index = self._take(world, me, (-1, 0))
        return self._next(world, me, rank._replace(tensor=index))

    def _touch(self, world: World, me: int, line: int, _: int) -> list[World]:
        """The user changes the tensor, or not."""
        rank = world[me]
        slab = rank.slabs[rank.tensor]
        if not rank.loans:
            self._check_unread(world, me, slab)
        changed = rank.with_slab(rank.tensor, slab._replace(content=DIRTY))._replace(has_changed_loan=bool(rank.loans))
        return self._next(world, me, rank) + self._next(world, me, changed)

    def _drop(self, world: World, me: int, line: int, _: int) -> list[World]:
        rank = world[me]
        slab = rank.slabs[rank.tensor]
        return self._next(world, me, rank.with_slab(rank.tensor, slab._replace(is_held=False))._replace(tensor=-1))
