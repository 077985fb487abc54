"""What the ranks know, write and show each other: the state of the machine."""

from __future__ import annotations

from typing import Any, NamedTuple

WHOLE, HALVES = 0, 1  # the two lines of calls of a group
RUN, TELL, FAILED, ALIGN, DONE, ERROR, DEAD = "run", "tell", "failed", "align", "done", "error", "dead"
DIRTY = (-1, -1)  # in a slab: the owner of a lent tensor has changed it


class Line(NamedTuple):
    """One line of calls, as one rank has it. The first three are what peers see."""

    published: int = 0
    consumed: int = 0
    ring: tuple[tuple[int, int], ...] = ()  # by call number modulo depth: which call the header is of, which slab it names
    sequence: int = 0  # the newest call that has begun
    start: int = 0  # the calls before are of an older epoch
    open: tuple[int, ...] = ()  # begun and not ended


class Reading(NamedTuple):
    """A call that has published a slab, and those who took part in it."""

    line: int
    sequence: int
    epoch: int
    members: tuple[int, ...]


class Slab(NamedTuple):
    """A piece of a rank's window."""

    content: tuple[int, int]  # line and call whose data it holds
    is_held: bool  # by its owner; otherwise free as soon as its readings are over
    readings: tuple[Reading, ...] = ()


class Agreed(NamedTuple):
    """A set of members that ranks have agreed on, or are about to."""

    attempt: int = 0
    members: tuple[int, ...] = ()
    calls: tuple[int, int] = (0, 0)  # the newest of each line


class Note(NamedTuple):
    """What a rank's board shows."""

    state: str  # "proposed", "settled" or "failed"
    proposal: Agreed
    settled: Agreed


class Rank(NamedTuple):
    """One process."""

    active: tuple[int, ...]  # the members that take part, this one included
    lines: tuple[Line, Line]
    mode: str = RUN
    program: int = 0  # 0: the first one; 1: that of those who go on after a death
    step: int = 0
    slabs: tuple[Slab, ...] = ()
    staged: tuple[tuple[int, int, int], ...] = ()  # line, call and slab of what this rank has published itself
    unheard: tuple[int, ...] = ()  # setups whose headers have not been compared
    tensor: int = -1  # the slab under a tensor that the user holds
    loans: tuple[tuple[int, int], ...] = ()  # line and call that published the tensor where it lies
    has_changed_loan: bool = False
    is_misread: bool = False  # a peer has read what the user had changed
    epoch: int = 0
    poison: tuple[int, int] = (-1, -1)  # epoch and finder of the cause, as this rank sees it
    untold: tuple[int, ...] = ()  # members to whom it has still to tell the cause
    note: Note | None = None
    mine: Agreed = Agreed()  # what it proposes now
    settled: Agreed = Agreed()
    failed: int = 0  # the last attempt to agree that has failed here
    num_tries: int = 0

    @property
    def is_poisoned(self) -> bool:
        """Whether a cause of this epoch stands."""
        return self.poison[0] >= self.epoch

    def with_line(self, line: int, **changes: Any) -> Rank:
        """This rank with another state of one line."""
        changed = self.lines[line]._replace(**changes)
        return self._replace(lines=(changed, self.lines[1]) if line == WHOLE else (self.lines[0], changed))

    def with_slab(self, index: int, slab: Slab) -> Rank:
        """This rank with another state of one slab, which may be new."""
        return self._replace(slabs=(*self.slabs[:index], slab, *self.slabs[index + 1 :]))


World = tuple[Rank, ...]


def with_rank(world: World, index: int, rank: Rank) -> World:
    """The world with another state of one rank."""
    return (*world[:index], rank, *world[index + 1 :])
