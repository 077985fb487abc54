"""How ranks agree anew on who takes part: after a death, when ``elastic_info`` leaves others out, or to start afresh.

Every rank shows its proposal on its board and waits until all whom it names show the same. Attempts are numbered: a rank that sees
a later number joins that attempt, one that sees an earlier number waits. When all agree, calls are numbered from a common start, the
older causes are no longer heeded, and what was lent to ranks that are gone is free. A rank that fails shows why until it has agreed
again, and all whom it needed fail alike, also those that come when it tries the next time. They are not in step then, and agree again
with their next call, whoever takes part in that.
Ranks that are left out although they live may still read what was published for them: that is waited for first.
The store and the process group are not needed.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, NoReturn

from ... import _core, config
from ...agreement import refusal
from ...errors import ArgumentError, CommfuseError, ExchangeError, MismatchError
from .board import FAILED, PROPOSED, SETTLED, Agreed, Note
from .leaving import LeftOut

if TYPE_CHECKING:
    from ...call import Call
    from ...groups import Group
    from .domain import Domain

_MEMBERS, _ALIVE = "members", "alive"  # what may be agreed on
_ERRORS: dict[str, type[CommfuseError]] = {kind.__name__: kind for kind in (ExchangeError, MismatchError, ArgumentError)}
_SLICE = 0.05  # seconds between two looks at everybody
_LAST_EPOCH = 0xFFFF


def agree(domain: Domain, subject: str, members: Group, refused: str = "") -> None:
    """Agree with ``members`` that they and nobody else take part from now on.

    ``refused``: why this rank will refuse the call that comes then, perhaps because of the table that names them; '' if it will not.

    Raises:
        MismatchError: a rank leaves out others; the text shows both sets.
        ArgumentError: a rank refuses its call; the text is its reason.
        ExchangeError: a rank has ended or did not come in time. Whatever is raised, the group is as it was before.
    """
    place = {rank: member for member, rank in enumerate(domain.home.members)}
    wanted = frozenset(place[rank] for rank in members.members)
    _let_read(domain, subject, domain.present - wanted)
    agreed = _Attempt(domain, subject, _MEMBERS, wanted, refused).run()
    if agreed.attempt > _LAST_EPOCH:
        raise ExchangeError(f"{subject}: group {domain.home.name!r} has agreed anew {_LAST_EPOCH} times; make a new group")
    domain.restart(agreed.attempt, agreed.members, agreed.calls)


def _let_read(domain: Domain, subject: str, leaving: frozenset[int]) -> None:
    """Wait until those who are ``leaving`` have read what they were sent in the calls that are over here; in a group that has been
    given up they read no more.
    """
    begin, timeout = time.monotonic(), config.get("timeout")
    for channel in (domain.whole.channel, domain.halves.channel):
        over = channel.counter(domain.home.index, _core.CONSUMED)
        for member in sorted(leaving):
            while channel.counter(member, _core.CONSUMED) < over and channel.alive(member) and not domain.is_given_up:
                channel.wait_member(member, _core.CONSUMED, over, min(_SLICE, timeout), False)
                if time.monotonic() - begin > timeout:
                    awaited = f"awaited: that it has read what was published by call {over}, before the others go on without it"
                    text = domain.about(subject, f"{domain.who(member)} did not come within {timeout:g} s; {awaited}")
                    domain.stop_late(member, text)
                    raise ExchangeError(text)


def survivors(domain: Domain, subject: str) -> tuple[int, ...]:
    """Return the ranks that live, the same on all of them; every living rank asks.

    Raises:
        ExchangeError: a living rank did not come in time.
    """
    everybody = frozenset(range(len(domain.home.members)))
    agreed = _Attempt(domain, subject, _ALIVE, everybody).run()
    return tuple(sorted(domain.home.members[member] for member in agreed.members))


def refuse(domain: Domain, call: Call) -> NoReturn:
    """Refuse ``call`` where no agreement can come about: the others, who may be about to go on without the dead, read it on the board."""
    text = refusal(call, domain.home)
    names_members = "elastic_info" in call.operator.names and call.args.get("elastic_info", ()) is not None
    will_agree = names_members or not domain.is_given_up  # who gives no table is told the cause, and does not come to agree
    needed = frozenset(range(len(domain.home.members) if will_agree else 0))
    _fail(domain, Agreed(attempt=domain.latest_attempt + 1, kind=_MEMBERS, members=needed), ArgumentError(text))
    raise ArgumentError(text)


def look(domain: Domain, call: Call, member: int, is_entering: bool) -> None:
    """Raise if ``member``, which this rank waits for in ``call``, cannot come, because of an agreement that needs this rank.

    ``is_entering``: it has not entered the call either, so that both may still agree and then meet in it.

    Raises:
        CommfuseError: the agreement has failed there.
        ArgumentError: they are about to agree, and one side refuses its call, whose table may be why they differ; both sides read it.
        MismatchError: they are about to agree on others than take part here; both sides read it.
        LeftOut: they are about to agree anew on those who take part here, since some were not in step.
    """
    note = domain.board.read(member)
    if note is None or domain.poisoned:  # meanwhile, and the other knows already: this wait ends with that cause
        return
    me, settled = domain.home.index, domain.board.mine.settled.attempt
    if me in note.failed.members and note.failed.attempt >= settled:
        failed = _error(note)
        _fail(domain, note.failed, failed)
        raise failed
    if note.state != PROPOSED or note.proposal.attempt <= settled or me not in note.proposal.members:
        return  # busy with others: it may come after that, or stop this group
    if call.broken:
        refused = ArgumentError(refusal(call, domain.home))
        _fail(domain, note.proposal, refused)
        raise refused
    if is_entering and (note.proposal.kind, note.proposal.members) == (_MEMBERS, domain.present):
        domain.lose_step()
        raise LeftOut(f"{domain.who(member)} is not in step")
    if note.refused:
        refused = ArgumentError(note.refused)
        _fail(domain, replace(note.proposal, members=domain.present), refused)
        raise refused
    error = MismatchError(
        f"{call.operator.name}: ranks of group {domain.home.name!r} disagree on who goes on:\n"
        f"  rank {domain.home.rank}: in a call of {_ranks(domain, domain.present)}\n"
        f"  rank {domain.home.members[member]}: {_wish(domain, note.proposal)}"
    )
    _fail(domain, replace(note.proposal, members=note.proposal.members | domain.present), error)
    raise error


class _Attempt:
    """One agreement, as this rank sees it."""

    def __init__(self, domain: Domain, subject: str, kind: str, wanted: frozenset[int], refused: str = "") -> None:
        self._domain, self._subject, self._refused = domain, subject, refused
        self._me = domain.home.index
        calls = domain.whole.published, domain.halves.published
        self._mine = Agreed(attempt=domain.latest_attempt + 1, kind=kind, members=wanted, calls=calls)
        self._first = domain.next_attempt  # that this rank has to hear of
        self._begin = time.monotonic()

    def run(self) -> Agreed:
        """Return what all have agreed on: the set, and the newest calls of any."""
        with self._failing_alike():
            self._propose()
            while True:
                self._look_for_deaths()
                notes = self._read()
                if notes is None:
                    continue
                settled = [note.settled for note in notes.values() if self._is_mine(note.settled)]
                if settled:  # others are through: what they have settled on holds
                    return self._settle(settled[0])
                missing = sorted(self._mine.members - {self._me} - notes.keys())
                if not missing:
                    calls = [
                        max(n) for n in zip(self._mine.calls, *(note.proposal.calls for note in notes.values()), strict=True)
                    ]
                    return self._settle(replace(self._mine, calls=(calls[0], calls[1])))
                self._wait(missing)

    def _read(self) -> dict[int, Note] | None:
        """Return the notes of those who agree; None if this rank has proposed anew because of what it read."""
        notes = {}
        for member in sorted(self._mine.members - {self._me}):
            note = self._domain.board.read(member)
            if note is None:
                continue
            if self._is_mine(note.settled):
                return {member: note}
            if self._has_failed(note):
                self._adopt(note.failed)
                raise _error(note)
            if note.state == FAILED or note.proposal.attempt < self._mine.attempt:
                continue
            newest = note.proposal.attempt + (note.state == SETTLED)
            if newest > self._mine.attempt:
                self._propose(attempt=newest)
                return None
            if (note.proposal.kind, note.proposal.members) == (self._mine.kind, self._mine.members):
                notes[member] = note
            elif not note.proposal.kind == self._mine.kind == _ALIVE:
                if self._me in note.proposal.members or self._domain.lost_a_rank:
                    self._differ(member, note)
                # otherwise it is busy with others, and may come to this agreement after that one
            elif not self._mine.members <= note.proposal.members:  # it has noticed a death before this rank did
                self._propose(members=self._mine.members & note.proposal.members)
                return None
        return notes

    def _adopt(self, failed: Agreed) -> None:
        """Fail in that attempt, not in a later one that was joined: that is the next. Who was needed there must hear of it here, too."""
        members = failed.members if self._refused else self._mine.members | failed.members
        self._mine = replace(self._mine, attempt=failed.attempt, members=members)

    def _has_failed(self, note: Note) -> bool:
        """Whether an attempt that needed this rank has failed where ``note`` comes from, though another may be under way there by now."""
        return note.failed.attempt >= self._first and self._me in note.failed.members

    def _is_mine(self, settled: Agreed) -> bool:
        if (settled.attempt, settled.kind) != (self._mine.attempt, self._mine.kind):
            return False
        return settled.members == self._mine.members or settled.kind == _ALIVE

    def _propose(self, **changes: object) -> None:
        self._mine = replace(self._mine, **changes)  # type: ignore[arg-type]
        self._domain.board.show(state=PROPOSED, proposal=self._mine, refused=self._refused)

    def _settle(self, agreed: Agreed) -> Agreed:
        self._domain.board.show(state=SETTLED, proposal=agreed, settled=agreed, failed=Agreed())
        return agreed

    def _differ(self, member: int, note: Note) -> NoReturn:
        if self._refused:  # its own table says nothing: those are concerned whom the other names
            self._mine = note.proposal
            raise ArgumentError(self._refused)
        if note.refused:
            raise ArgumentError(note.refused)
        lines = [f"{self._subject}: ranks of group {self._domain.home.name!r} disagree on who goes on:"]
        for one, agreed in sorted(((self._me, self._mine), (member, note.proposal)), key=lambda side: side[0]):
            lines.append(f"  rank {self._domain.home.members[one]}: {_wish(self._domain, agreed)}")
        raise MismatchError("\n".join(lines))

    def _look_for_deaths(self) -> None:
        """Before anything else: who joins a later attempt of others, who know of a death, with the dead in its own set only differs."""
        dead = [member for member in sorted(self._mine.members) if not self._domain.whole.channel.alive(member)]
        silent = [member for member in dead if self._has_not_answered(member)]
        if silent and self._mine.kind == _ALIVE:
            self._propose(members=self._mine.members - set(silent))
        elif silent:
            seconds = time.monotonic() - self._begin
            remedy = "Leave it out of elastic_info to go on without it."
            self._give_up(f"{self._domain.who(silent[0])} has ended; awaited for {seconds:.2f} s: {{}}. {remedy}")

    def _wait(self, missing: list[int]) -> None:
        domain, timeout = self._domain, config.get("timeout")
        late = missing[0]
        if time.monotonic() - self._begin > timeout:
            self._give_up(f"{domain.who(late)} did not come within {timeout:g} s; awaited: {{}}", domain.elsewhere(late))
        if time.monotonic() - self._begin > _SLICE:
            domain.tell_other_groups(self._subject, late)
        domain.board.wait(late, min(_SLICE, timeout))

    def _has_not_answered(self, member: int) -> bool:
        """Whether what it showed last, before it ended, is no answer."""
        note = self._domain.board.read(member)
        return note is None or note.state == FAILED or note.proposal != replace(self._mine, calls=note.proposal.calls)

    def _give_up(self, text: str, elsewhere: str = "") -> NoReturn:
        awaited = f"that it {_wish(self._domain, self._mine)}"
        raise ExchangeError(self._domain.about(self._subject, text.format(awaited) + elsewhere))

    @contextmanager
    def _failing_alike(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            _fail(self._domain, self._mine, error)
            if not isinstance(error, (CommfuseError, _core.CoreError)):
                self._domain.told = error
            raise


def _error(note: Note) -> CommfuseError:
    return _ERRORS.get(note.error, ExchangeError)(note.text)


def _fail(domain: Domain, failed: Agreed, error: BaseException) -> None:
    """Show the others why this attempt has failed here; who has heard of it is no longer in step."""
    domain.lose_step()
    told = isinstance(error, CommfuseError)
    text = str(error) if told else f"rank {domain.home.rank} broke off: {type(error).__name__}: {error}"
    kind = type(error).__name__ if told else ExchangeError.__name__
    domain.board.show(state=FAILED, proposal=failed, failed=failed, error=kind, text=text)


def _wish(domain: Domain, agreed: Agreed) -> str:
    return "asks who is alive" if agreed.kind == _ALIVE else f"goes on with {_ranks(domain, agreed.members)}"


def _ranks(domain: Domain, members: frozenset[int]) -> str:
    ranks = ", ".join(str(rank) for rank in sorted(domain.home.members[member] for member in members))
    return f"ranks {ranks}" if len(members) > 1 else f"rank {ranks} alone"
