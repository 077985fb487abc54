"""The faults as a table: what happens, where in a round of calls, to how many ranks.

`PLACES` says which function stands for a place; the fault is put before or after one of its calls in the victim's process. `CASES` is
every combination that makes sense; `chosen` draws from them by a seed.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass

_CPU = "commfuse.backends.cpu"


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What happens to the victim.

    ``ends``: it never calls again. ``late``: it goes on when all others have given up waiting. ``in_calls``: this can happen within a
    call too, not only in the user's own code.
    """

    name: str
    ends: bool = False
    late: bool = False
    in_calls: bool = True


KINDS = {
    kind.name: kind
    for kind in (
        Kind(name="kill", ends=True),  # SIGKILL
        Kind(name="stop", late=False),  # SIGSTOP, and SIGCONT within the deadline
        Kind(name="stop-long", late=True),  # SIGCONT after the deadline
        Kind(name="delay", late=False),
        Kind(name="delay-long", late=True),
        Kind(name="exception", ends=True, in_calls=False),  # the process ends with a traceback
        Kind(name="exit", ends=True, in_calls=False),
        Kind(name="interrupt"),  # Ctrl-C, which the program catches; in a call that stops the group, between calls it is late
    )
}


@dataclass(frozen=True, kw_only=True)
class Place:
    """Before or ``after`` call number ``nth`` of the function ``target``, 'module:name'; ``own``: it is the user's code."""

    name: str
    target: str
    nth: int = 1
    after: bool = False
    own: bool = False
    first: bool = False  # nothing has been called before


def _own(name: str, nth: int = 1, first: bool = False) -> Place:
    return Place(name=name, target="tests.faults.work:user_code", nth=nth, own=True, first=first)


def _in(name: str, target: str, nth: int = 1, after: bool = False) -> Place:
    module, colon, attribute = target.rpartition(":")
    return Place(name=name, target=f"{_CPU}.{module}{colon}{attribute}", nth=nth, after=after)


_EVERYWHERE = (
    _own("before-the-first-call", first=True),
    _own("between-calls"),
    Place(name="before-publish", target="commfuse._core:Channel.publish"),
    _in("before-end", "session:Session.end"),
)
_MET = _in("before-pull", "session:Session.meet", after=True)
_VERDICT = _in("before-the-verdict", "combine:hear_verdicts")
_DISPATCH = (
    *_EVERYWHERE,
    _MET,
    _own("between-dispatch-and-combine", nth=2),
    _in("between-ids-and-rows", "staging:Staging.copy_in"),
    _in("inside-pull", "dispatch:_place_rows", after=True),
)
PLACES: dict[str, tuple[Place, ...]] = {
    "v2": (*_DISPATCH, _in("inside-sum", "combine:add_up"), _VERDICT),
    "v1": (*_DISPATCH, _VERDICT),
    "norm": (
        *_EVERYWHERE,
        _MET,
        _own("between-dispatch-and-combine", nth=2),
        _in("between-counts-and-tags", "staging:Staging.copy_first", nth=2),
        _in("inside-sum", "combine:add_up"),
        _VERDICT,
    ),
    "split": (
        *_EVERYWHERE,
        _own("between-setup-and-teardown", nth=2),
        _own("between-combine-setup-and-teardown", nth=3),
        _in("between-ids-and-rows", "staging:Staging.copy_in"),
        _in("before-pull", "halves:_meet", after=True),
        _in("inside-pull", "dispatch:_place_rows", after=True),
        _in("inside-teardown", "halves:_land"),
        _in("inside-combine-teardown", "halves:_land", nth=2),
    ),
    "gmm": (
        *_EVERYWHERE,
        _MET,
        _in("before-counts", "staging:Staging.copy_in"),
        _in("inside-pull", "views:pull_blocks"),
        _in("inside-second-pull", "views:pull_blocks", nth=2),
    ),
    "gather": (*_EVERYWHERE, _MET, _in("before-rows", "publication:Publication.put"), _in("inside-pull", "views:pull_all")),
    "reduce": (
        *_EVERYWHERE,
        _MET,
        _in("before-terms", "staging:Staging.view"),
        _in("inside-sum", "all_gather_mm:_sum_of_share", after=True),
        _in("before-second-publish", "publication:Publication.publish_again"),
        _in("inside-second-pull", "views:pull"),
    ),
    "barrier": (*_EVERYWHERE, _MET),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One fault: ``kind`` at ``place`` of a round of ``family`` on rank ``victim`` of ``world_size``."""

    family: str
    kind: Kind
    place: Place
    world_size: int
    victim: int

    @property
    def id(self) -> str:
        """A name for pytest."""
        return f"{self.family}-{self.kind.name}-{self.place.name}-{self.victim}of{self.world_size}"

    @property
    def late(self) -> bool:
        """Whether the others give up waiting for a victim that lives and goes on after that."""
        return self.kind.late or (self.kind.name == "interrupt" and self.place.own)

    @property
    def harmless(self) -> bool:
        """Whether every result must be right, on the victim too."""
        return self.kind.name in ("stop", "delay")


def _all() -> list[Case]:
    return [
        Case(family=family, kind=kind, place=place, world_size=world_size, victim=(turn + world_size) % world_size)
        for family, places in PLACES.items()
        for turn, place in enumerate(places)
        for kind in KINDS.values()
        if place.own or kind.in_calls
        for world_size in (2, 4, 8)
    ]


CASES = _all()


def chosen(seed: int, number: int) -> list[Case]:
    """Return ``number`` of all cases, drawn by ``seed`` so that families, kinds, places and sizes come about equally often."""
    generator = random.Random(seed)
    left = [(case, _traits(case)) for case in generator.sample(CASES, len(CASES))]
    seen, found = Counter[str](), []
    for _ in range(min(number, len(left))):
        best = min(left, key=lambda one: sum(map(seen.__getitem__, one[1])))
        left.remove(best)
        found.append(best[0])
        seen.update(best[1])
    return found


def _traits(case: Case) -> tuple[str, ...]:
    return case.family, case.kind.name, f"{case.family} {case.place.name}", f"{case.world_size} ranks"
