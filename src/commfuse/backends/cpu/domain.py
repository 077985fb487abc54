"""One group's windows, made by all its ranks together at first use: who takes part now, and what stops the group.

Calls go over two sessions. In ``whole`` every call is over when it returns; in ``halves`` setups wait for their teardowns, so that
what they have published stays while whole calls come and go. Every call has a number, counted over both.

A rank that has ended or does not come stops the group for good: the first to find out writes down the cause, and every rank raises
that, until the ranks that are left agree to go on without it (see `align`) or all start afresh.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from ... import _core, agreement
from ...call import Call
from ...errors import CommfuseError, ExchangeError, GroupError
from ...groups import Group
from ...operators.moe_distribute.flights import in_flight
from . import align, host, slabs
from .board import Board
from .join import DEPTHS, windows
from .leaving import LeftOut
from .session import Session

_DEAD, _LATE, _BROKEN, _LEFT_OUT = 1, 2, 3, 4  # why a group is given up
_SHORT_SPIN_NS = 4000  # where ranks outnumber cores, a spinning rank keeps its peer from running
_POISON_TEXT = 500


class Domain:
    """See the module. One thread at a time."""

    def __init__(self, members: Group) -> None:
        self.home = members  # all that have joined: member i of a channel is rank home.members[i]
        self.members = members  # those that take part now, in the order of their ids in the call
        self.slabs = slabs.own()
        self.told: BaseException | None = None  # what has broken off an agreement: who was needed knows, nothing was under way
        self._in_step = True  # whether those who take part are known to be before the same call
        self.turns = _core.Turnstile()
        channels, self.pids = windows(members, self.slabs)
        self.whole, self.halves = (Session(self, channel, depth) for channel, depth in zip(channels, DEPTHS, strict=True))
        self.board = Board(channels[0])
        members.shared.setdefault("waits", []).append(self.waited_us)
        _of_process[:] = [*(one for one in _of_process if one() is not None), weakref.ref(self)]
        for channel in channels if len(members.members) > host.cores() else ():
            channel.spin_ns = _SHORT_SPIN_NS

    @property
    def number(self) -> int:
        """The number of the present call, counted over both sessions."""
        return self.turns.calls

    @property
    def next_attempt(self) -> int:
        """The number of the next agreement on who takes part, as far as this rank has come."""
        return max(self.board.mine.settled.attempt, self.board.mine.failed.attempt) + 1

    @property
    def latest_attempt(self) -> int:
        """The number of the last agreement that has come about among any of the ranks, or failed here."""
        notes = [self.board.read(member) for member in range(len(self.home.members)) if member != self.home.index]
        return max([self.next_attempt - 1, *(note.settled.attempt for note in notes if note is not None)])

    @property
    def present(self) -> frozenset[int]:
        """The members that take part now."""
        return frozenset(self.whole.channel.active)

    @property
    def poisoned(self) -> bool:
        """Whether the group has been given up."""
        return self.whole.channel.poisoned

    def waited_us(self) -> dict[int, float]:
        """Return the microseconds that this rank has waited for each rank's counters."""
        both = zip(self.home.members, self.whole.channel.waited_ns, self.halves.channel.waited_ns, strict=True)
        return {rank: (whole + halves) / 1000 for rank, whole, halves in both}

    def tell_other_groups(self, subject: str, member: int) -> None:
        """Show in all other groups of this process that it waits here for ``member``; until the next call that must not wait so long."""
        text = f"it has last been seen in group {self.home.name!r}, waiting for {self.who(member)} in {subject}"
        self._show_in_other_groups(text)

    def _show_in_other_groups(self, text: str) -> None:
        self.turns.has_told_others = bool(text)
        for other in [one() for one in list(_of_process)]:
            if other is not None and other is not self and other.turns.here and other.board.mine.elsewhere != text:
                other.board.show(elsewhere=text)

    def elsewhere(self, member: int) -> str:
        """Return where ``member``, which does not come, has shown to be instead; '' if it has not."""
        note = self.board.read(member)
        return f"; {note.elsewhere}" if note is not None and note.elsewhere else ""

    @contextmanager
    def carrying_out(self, subject: str) -> Iterator[None]:
        """Around everything that a call does here; whatever breaks off a call half-way stops the group on all ranks.

        Raises:
            GroupError: another thread is in a call of this group, or the process has been forked since the group was joined.
        """
        if not self.turns.enter():
            name = self.home.name
            if not self.turns.here:
                raise GroupError(f"{subject}: group {name!r} was joined before this process was forked; make a new one")
            raise GroupError(f"{subject}: another thread is in a call of group {name!r}; one at a time")
        try:
            yield
        except BaseException as error:
            self.broke_off(subject, error)
            raise
        finally:
            self.turns.leave()

    def broke_off(self, subject: str, error: BaseException) -> None:
        """Stop the group on all ranks if ``error``, which has ended a call, is none that those whom it concerns know of.

        Raises:
            ExchangeError: it is one of the core.
        """
        told, self.told = self.told, None
        if isinstance(error, CommfuseError) or error is told:
            return
        text = self.about(subject, f"rank {self.home.rank} broke off: {type(error).__name__}: {error}")
        self.stop_here(text)
        if isinstance(error, _core.CoreError):
            raise ExchangeError(text) from error

    def attend(self, call: Call, members: Group) -> None:
        """Make sure that ``members`` take part, in their order; together with them where those have been others before.

        Raises:
            CommfuseError: see `align.agree`; the same on all of them.
        """
        if self.turns.has_told_others:
            self._show_in_other_groups("")
        if call.broken and self.poisoned and not (self._was_left_out() and self._all_live()):
            align.refuse(self, call)
        if self._names_the_dead_by_mistake(call, members):
            members = self.members
        changes = set(members.members) != set(self.members.members) or self._was_left_out()
        if call.operator.phase == "teardown":  # nobody waits for it, so nobody would agree with it
            if changes:
                raise LeftOut("others take part since then")
        elif changes or not (self._in_step or self.poisoned):
            align.agree(self, call.operator.name, members, agreement.refusal(call, call.group) if call.broken else "")
        if members.members != self.members.members:
            self.seat(members)

    def _names_the_dead_by_mistake(self, call: Call, members: Group) -> bool:
        """Whether a refused call leaves nobody out only because its table cannot be believed: it is refused among those that are left."""
        return bool(call.broken) and members.members == call.group.members and not (self._was_left_out() or self._all_live())

    def _all_live(self) -> bool:
        return all(self.whole.channel.alive(member) for member in range(len(self.home.members)))

    @property
    def lost_a_rank(self) -> bool:
        """Whether the group has been given up because a rank has ended."""
        return self.poisoned and self.whole.channel.cause()[1] == _DEAD

    @property
    def is_given_up(self) -> bool:
        """Whether the group can go on only after an agreement, and not because the others have gone on without this rank."""
        return self.poisoned and not self._was_left_out()

    def _was_left_out(self) -> bool:
        """Whether the others have gone on without this rank, which they now may take in again."""
        return self.poisoned and self.whole.channel.cause()[1] == _LEFT_OUT

    def lose_step(self) -> None:
        """Let the next call agree anew, whoever takes part in it; the short ways of calls, which would not, end."""
        self._in_step = False
        self.turns.seating += 1

    def seat(self, members: Group) -> None:
        """Let ``members``, which the others have agreed to, take part in their order."""
        place = {rank: member for member, rank in enumerate(self.home.members)}
        for session in (self.whole, self.halves):
            session.seat([place[rank] for rank in members.members])
        self.members = members
        self.turns.seating += 1

    def restart(self, epoch: int, members: frozenset[int], calls: tuple[int, int]) -> None:
        """Begin anew with ``members`` behind ``calls``, the newest of each session; older causes, setups and loans are forgotten."""
        self._tell_left_out(self.present - members)
        self.turns.calls, self._in_step = 0, True
        in_flight(self.home).clear()
        for session, newest in zip((self.whole, self.halves), calls, strict=True):
            session.restart(
                epoch, newest + 1
            )  # a place is left free: place and number are never those of a call of another epoch

    def _tell_left_out(self, members: frozenset[int]) -> None:
        """Stop those of ``members`` that live from calling as if nothing had happened."""
        if any(self.whole.channel.alive(member) for member in members):
            names = ", ".join(self.who(member) for member in sorted(members))
            text = self.about("elastic_info", f"ranks of this group go on without {names}")
            self._stop(_LEFT_OUT, self.home.index, text)

    # --- what goes wrong ---------------------------------------------------------------------------------------------------

    def stop_dead(self, member: int, text: str) -> bool:
        """Give the group up on all ranks because ``member`` has ended; the first cause stays, True if it is this one."""
        return self._stop(_DEAD, member, text)

    def stop_late(self, member: int, text: str) -> bool:
        """As `stop_dead`, because ``member`` did not come in time."""
        return self._stop(_LATE, member, text)

    def stop_here(self, text: str) -> bool:
        """As `stop_dead`, because of what this rank has done or met."""
        return self._stop(_BROKEN, self.home.index, text)

    def _stop(self, code: int, member: int, text: str) -> bool:
        first = self.whole.channel.poison(code, member, text[:_POISON_TEXT])
        self.halves.channel.poison(code, member, "see the other line")
        return first

    def raise_cause(self, subject: str) -> NoReturn:
        """Raise what the group has been given up for."""
        _, code, _, finder, text = self.whole.channel.cause()
        if code == _LEFT_OUT:
            raise LeftOut(text)
        found = "" if finder == self.home.index else f" (found by {self.who(finder)})"
        raise ExchangeError(self.about(subject, f"the group has been given up{found}: {text}"))

    def about(self, subject: str, text: str) -> str:
        """Begin a message with where it comes from."""
        return f"{subject}: group {self.home.name!r}, rank {self.home.rank} of {self.home.size}, call {self.number}: {text}"

    def who(self, member: int) -> str:
        """Name a member for a message."""
        return f"rank {self.home.members[member]} (pid {self.pids[member]})"


_of_process: list[weakref.ref[Domain]] = []


def of(members: Group) -> Domain:
    """Return the domain that these ranks belong to; collective where there is none yet.

    Raises:
        BackendError: the ranks cannot map each other's windows; says which and why.
    """
    domains: list[Domain] = members.shared.setdefault("windows", [])
    who = set(members.members)
    for domain in domains:  # the first: all ranks have joined those that hold all of them, one after the other
        if who <= set(domain.home.members):
            return domain
    domains.append(Domain(members.among(sorted(who))))  # in one order, even if the ranks do not agree on theirs
    return domains[-1]
