"""How calls are carried out: one backend per way, and the choice between them.

A group's backend is chosen once, by all its ranks together, at the group's first call.
"""

from __future__ import annotations

from dataclasses import dataclass

from .. import causes, config, peers
from ..agreement import agree_on
from ..errors import BackendError
from ..groups import Group
from .base import Backend
from .cpu import Cpu
from .portable import Portable
from .reference import Reference

BACKENDS: dict[str, Backend] = {backend.name: backend for backend in (Cpu(), Portable(), Reference())}
AUTOMATIC = ("cpu", "portable")  # in order of preference; the others only by name


@dataclass(eq=False, kw_only=True, slots=True)
class _Choice:
    """What some ranks of a group have asked for last, what runs it, and all that they have found by name."""

    asked: str
    backend: Backend
    found: dict[str, Backend]


def of(members: Group) -> Backend:
    """Return the backend of a group (of those of its ranks that take part), choosing it together if there is none yet.

    ``config.backend`` is read at that moment, and again whenever it has changed in this process.

    Raises:
        BackendError: no backend can run on every rank, or ranks ask for different ones; lists every rank's reasons.
    """
    asked = config.get("backend")
    latest: dict[tuple[int, ...], _Choice] = members.shared.setdefault("backend", {})  # in whatever order the ranks stand
    choice = latest.get(members.members)
    if choice is None or choice.asked != asked:
        choice = latest[members.members] = _chosen(members, asked)
    return choice.backend


def _chosen(members: Group, asked: str) -> _Choice:
    """Choose for ``asked`` what runs the calls of ``members``.

    All of it rests on what every one of them knows: the choices of those sets of ranks that hold them all. A change goes through what
    ran their calls before, where a rank that alone makes it is found out by those that carry on.
    """
    choices: dict[frozenset[int], _Choice] = members.shared.setdefault("backends", {})  # the latest is the last
    who = frozenset(members.members)
    known = [choice for ranks, choice in choices.items() if who <= ranks]
    before = choices.get(who) or (known[-1] if known else None)
    if before is not None and before.asked != asked:
        before.backend.agree_on(members, _subject(asked))
    backend = next((choice.found[asked] for choice in known if asked in choice.found), None) or _choose(members, asked)
    mine = choices.pop(who, None) or _Choice(asked=asked, backend=backend, found={})
    mine.asked, mine.backend, mine.found[asked] = asked, backend, backend
    choices[who] = mine
    return mine


def _subject(asked: str) -> str:
    return f"choice of a backend for {asked!r}"


def _choose(members: Group, asked: str) -> Backend:
    names = AUTOMATIC if asked == "auto" else (asked,)
    offer = {name: BACKENDS[name].why_not(members) if name in BACKENDS else [_unknown(name)] for name in names}
    places = {name: BACKENDS[name].place() if name in BACKENDS else "" for name in names}
    with causes.giving_up(members, _subject(asked)):
        agree_on(members, _subject(asked))
        stated = members.gather_objects((offer, places, peers.own()))
    members.peers.meet(members.members, [card for _, _, card in stated])
    offers = [theirs for theirs, _, _ in stated]
    for name in names:
        where = [there[name] for _, there, _ in stated]
        if len(set(where)) > 1:
            for theirs, place in zip(offers, where, strict=True):
                theirs[name].append(f"the ranks are on different hosts; this one is on {place!r}")
        if all(theirs[name] == [] for theirs in offers):
            return BACKENDS[name]
    lines = [f"group {members.name!r}: no backend can run its calls on all {len(members.members)} ranks:"]
    for rank, theirs in zip(members.members, offers, strict=True):
        for name, reasons in theirs.items():
            lines += [f"  rank {rank}, {name}: {'; '.join(reasons) or 'can run'}"]
    raise BackendError("\n".join(lines))


def _unknown(name: str) -> str:
    return f"there is no such backend; there are {', '.join(BACKENDS)}"
