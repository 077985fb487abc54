"""One line of calls of a group: each is published with a header, met by those of the others, read in place, and ended.

Headers that differ, or that refuse, are explained over the process group; every rank then raises the same error and the group stays
usable. A setup is published and not met: it is heard, with all before it, when this rank next waits for the others.
"""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from ... import _core, agreement, config
from ...call import Call
from ...errors import CommfuseError, ExchangeError
from ...groups import Group
from ...observe import ranges
from . import align, host
from .join import NAME_BYTES

if TYPE_CHECKING:
    from .domain import Domain

_TAG, _TAGS = 0x30000, 0x10000  # messages that explain a call carry its number
SLICE = 0.05  # seconds between two looks at what the others do instead of coming
REFUSED_AND_DIGEST, NUMBER = 17, 8  # bytes at the beginning of a header's body, equal on all ranks; the operator's name follows

Path = Callable[[Call, "Session", list[float]], tuple[torch.Tensor | None, ...]]


@dataclass(eq=False, kw_only=True, slots=True)
class Posted:
    """A call of which this rank has told the others; ``error`` once they have been heard."""

    call: Call
    number: int
    sequence: int
    offer: _core.Offer
    error: CommfuseError | None = None


@dataclass(eq=False)
class _Form:
    """What stands in the place of a `call.Form` there: hashable, as that is."""

    agreed: dict[str, Any]


def subject(name: str, members: Group) -> Any:
    """Return what stands in the place of a `Call` when ranks do something together that is no operator."""
    operator = SimpleNamespace(name=name, phase="whole")
    form = _Form(agreed={})
    return SimpleNamespace(
        operator=operator, group=members, partner=None, product=config.PORTABLE, broken=(), agreed=form.agreed, form=form
    )


class Session:
    """See the module."""

    def __init__(self, domain: Domain, channel: _core.Channel, depth: int) -> None:
        self.domain, self.channel, self.depth = domain, channel, depth
        self.slabs = domain.slabs
        self.large_copy = host.large_copy(len(domain.home.members))
        self.kept: dict[Any, Any] = {}  # what operators keep for the next call of the same shape
        self.calls = _core.Calls(channel, domain.turns, self.slabs.core, depth)
        self._eldest = 0  # what was published up to here is of an older epoch
        self._offers: dict[Any, tuple[_core.Offer, bytes, bytes]] = {}
        self._unheard: deque[Posted] = deque()

    @property
    def members(self) -> Group:
        """The ranks that take part, in the order of their ids."""
        return self.domain.members

    @property
    def published(self) -> int:
        """The newest call that this rank has published."""
        return self.channel.counter(self.channel.index, _core.PUBLISHED)

    @property
    def newest(self) -> int:
        """The newest call that this rank has begun."""
        return self.calls.newest

    def restart(self, epoch: int, newest: int) -> None:
        """Begin anew behind call ``newest``: see `Domain.restart`."""
        for line, value in ((_core.PUBLISHED, newest), (_core.CONSUMED, newest), (_core.PROGRESS, 2 * newest)):
            self.channel.advance(line, max(value, self.channel.counter(self.channel.index, line)))
        self.calls.restart(newest)
        self.channel.epoch = epoch
        self._eldest = newest
        self._unheard.clear()
        self._count_unheard()

    def seat(self, present: list[int]) -> None:
        """See `Domain.seat`."""
        self.calls.seat(present)

    # --- one call ----------------------------------------------------------------------------------------------------------

    def begin(self, call: Call) -> int:
        """Return the place of this call on the line, whose header may now be published."""
        if self.domain.poisoned:
            self.domain.raise_cause(call.operator.name)
        self._end_loans(call)
        if overwritten := self.calls.in_the_way:
            self.hear(overwritten)
            self.wait(call, _core.CONSUMED, overwritten)
        return self.calls.begin()

    def offer(self, call: Call) -> _core.Offer:
        """Return the header for ``call``, which has begun, to which segments may be added.

        Whole calls that are alike share one; a setup's is its own, since it is compared later.
        """
        number = self.domain.number.to_bytes(NUMBER, "little")
        if call.broken or self is self.domain.halves:
            return _offer(_core.Offer(), *self.body(call), number)
        key: Any = call.form if call.agreed is call.form.agreed else (call.form, tuple(call.agreed.values()))
        made = self._offers.get(key)
        if made is None:
            if len(self._offers) > 256:
                self._offers.clear()
            made = self._offers[key] = (_core.Offer(), *self.body(call))
        return _offer(*made, number)

    def body(self, call: Call) -> tuple[bytes, bytes]:
        """Return what stands before and behind the number of ``call`` in its header."""
        stated = repr(sorted(self._stated(call).items())).encode()
        digest = hashlib.blake2b(stated, digest_size=REFUSED_AND_DIGEST - 1).digest()
        return bytes([bool(call.broken)]) + digest, call.operator.name.encode()[:NAME_BYTES]

    def meet(self, call: Call, sequence: int, offer: _core.Offer, waited_us: list[float] | None = None) -> CommfuseError | None:
        """Wait until every rank has published this call; return what is wrong with it, if anything is, the same on all ranks."""
        before = self.channel.waited_ns if waited_us is not None else []
        self.domain.halves.hear(sequence - 1 if self is self.domain.halves else None)
        self.wait(call, _core.PUBLISHED, sequence)
        self.take_back()  # who is here has read what earlier calls lent
        if waited_us is not None:
            after = self.channel.waited_ns
            for position, member in enumerate(self.channel.active):
                waited_us[position] += (after[member] - before[member]) / 1000
        if self.channel.resolve(sequence, offer) == -1 and not call.broken:
            return None
        if self.domain.poisoned:  # what has been met is no call of those who take part here
            self.domain.raise_cause(call.operator.name)
        return self._explain(call, self.domain.number)

    def end(self, sequence: int) -> None:
        """Say that this rank has read all it needs of this call's data."""
        self.calls.end(sequence)

    def agree(self, call: Call, waited_us: list[float] | None = None) -> None:
        """Make sure that every rank is in this call and accepts it; a call of its own, without data. Raises as `agreement.hear`."""
        sequence, offer = self.begin(call), self.offer(call)
        self.channel.publish(sequence, offer)
        error = self.meet(call, sequence, offer, waited_us)
        self.end(sequence)
        if call.partner is not None:
            error = agreement.ask_partner(call.partner, error)
        if error is not None:
            raise error

    def refuse(self, call: Call, sequence: int, problem: str) -> NoReturn:
        """Tell the others that this rank cannot carry out call ``sequence``, and raise with them."""
        refused = replace(call, broken=(problem,))
        offer = self.offer(refused)
        self.channel.publish(sequence, offer)
        error = self.meet(refused, sequence, offer)
        self.end(sequence)
        assert error is not None
        raise error

    # --- setups ------------------------------------------------------------------------------------------------------------

    def post(self, call: Call, sequence: int, offer: _core.Offer) -> Posted:
        """Publish a call and wait for nobody; `hear` compares it later."""
        self.channel.publish(sequence, offer)
        posted = Posted(call=call, number=self.domain.number, sequence=sequence, offer=offer)
        self._unheard.append(posted)
        self._count_unheard()
        return posted

    def hear(self, upto: int | None = None) -> None:
        """Compare what was posted, up to call ``upto``, and has not been compared."""
        while self._unheard and (upto is None or self._unheard[0].sequence <= upto):
            posted = self._unheard[0]
            self.wait(posted.call, _core.PUBLISHED, posted.sequence, posted.number)
            self._unheard.popleft()
            self._count_unheard()
            if self.channel.resolve(posted.sequence, posted.offer) != -1:
                if self.domain.poisoned:
                    self.domain.raise_cause(posted.call.operator.name)
                posted.error = self._explain(posted.call, posted.number)

    def _count_unheard(self) -> None:
        self.domain.turns.unheard = len(self._unheard)

    # --- loans -------------------------------------------------------------------------------------------------------------

    def reading(self, sequence: int) -> _core.Reading:
        """Return what keeps a slab from being used again: that call ``sequence`` has published it."""
        return self.calls.reading(sequence)

    def lend(self, tensor: torch.Tensor, sequence: int) -> None:
        """Note that call ``sequence`` has published ``tensor`` where it lies: it must stay as it is until every peer has read it."""
        self.calls.lend(tensor, sequence)

    def take_back(self) -> None:
        """Forget the loans that every peer is known to have read: their tensors may change again."""
        self.calls.take_back()

    def _end_loans(self, call: Call) -> None:
        """Raise if a tensor was changed before it was certain that every peer has read it; see `take_back`."""
        if sequence := self.calls.changed_loan:
            domain = self.domain
            text = domain.about(
                call.operator.name,
                f"rank {domain.home.rank} changed a tensor that call {sequence} of this group had published in place before "
                "every rank was known to have read it: give combine a tensor that stays as it is until the group's next call",
            )
            domain.stop_here(text)
            raise ExchangeError(text)
        self.take_back()

    # --- waiting -----------------------------------------------------------------------------------------------------------

    def wait(self, call: Call, line: int, target: int, number: int = 0) -> None:
        """Wait for a counter of every other rank; ``number`` of the call if it is not the present one.

        Raises:
            MismatchError: a rank is in another call, or goes on with other ranks.
            ExchangeError: a rank has ended, did not come in time, or has given the group up.
        """
        timeout = config.get("timeout" if self.domain.number > 1 else "first_timeout")
        if ranges.active():
            self._wait_in_ranges(call, line, target, number, timeout)
        else:
            self._wait(call, line, target, number, timeout)

    def _wait_in_ranges(self, call: Call, line: int, target: int, number: int, timeout: float) -> None:
        """Wait for one after the other, each in a range of its own; who takes long gets the rest of the wait."""
        for member in self.channel.active:
            if member == self.channel.index:
                continue
            with ranges.waiting(self.domain.home.members[member]):
                if self.channel.wait_member(member, line, target, min(SLICE, timeout)) != _core.OK:
                    return self._wait(call, line, target, number, timeout)
        return None

    def _wait(self, call: Call, line: int, target: int, number: int, timeout: float) -> None:
        status = self.channel.wait(line, target, min(SLICE, timeout))
        if status == _core.OK:
            return
        begin = time.monotonic() - SLICE
        while status & 0xFF == _core.DEADLINE and (left := begin + timeout - time.monotonic()) > 0:
            self._look_around(call, line, target, number or self.domain.number)
            status = self.channel.wait(line, target, min(SLICE, left))
        if status != _core.OK:
            self._give_up(call, line, target, status, time.monotonic() - begin)

    def _look_around(self, call: Call, line: int, target: int, number: int) -> None:
        missing = [member for member in self.channel.active if self.channel.counter(member, line) < target]
        self._count(missing)
        late = [member for member in missing if member != self.channel.index]
        if late:
            self.domain.tell_other_groups(call.operator.name, late[0])
        for member in late:
            align.look(self.domain, call, member, line == _core.PUBLISHED)
            if line == _core.PUBLISHED and self._is_elsewhere(member, target, number):
                raise self._part(call, number)

    def _count(self, missing: list[int]) -> None:
        """Add the slice that is over to the waiting times of those who have not come."""
        waited = self.channel.waited_ns
        for member in missing:
            waited[member] += int(SLICE * 1e9)
        self.channel.waited_ns = waited

    def _is_elsewhere(self, member: int, target: int, number: int) -> bool:
        """Whether ``member`` has passed call ``number`` over on the other line."""
        other = self.domain.halves if self is self.domain.whole else self.domain.whole
        newest = other.channel.counter(member, _core.PUBLISHED)
        if newest <= other._eldest or other.channel.sequence_in_slot(member, newest) != newest:
            return False
        body = other.channel.body(member, newest)[REFUSED_AND_DIGEST : REFUSED_AND_DIGEST + NUMBER]
        passed = int.from_bytes(body, "little") >= number
        return passed and self.channel.counter(member, _core.PUBLISHED) < target

    def _part(self, call: Call, number: int) -> CommfuseError:
        """Return the error of a call to which others have not come, on all ranks, and begin anew with them."""
        error = self._explain(call, number)
        align.agree(self.domain, call.operator.name, self.members)
        return error

    def _give_up(self, call: Call, line: int, target: int, status: int, seconds: float) -> NoReturn:
        """Stop the group because of what ended a wait, and raise."""
        kind, member, domain = status & 0xFF, status >> 8, self.domain
        if kind == _core.POISONED:
            domain.raise_cause(call.operator.name)
        what = "has ended" if kind == _core.DEAD else "did not come in time"
        entered = self.channel.counter(member, _core.PUBLISHED)
        text = domain.about(
            call.operator.name,
            f"{domain.who(member)} {what}; awaited for {seconds:.2f} s: {_AWAITED[line].format(target)}; "
            f"it has entered {entered} calls of this group{self._latest(member, entered)}{domain.elsewhere(member)}",
        )
        if domain.stop_dead(member, text) if kind == _core.DEAD else domain.stop_late(member, text):
            raise ExchangeError(text)
        domain.raise_cause(call.operator.name)

    def _latest(self, member: int, newest: int) -> str:
        if newest <= self._eldest or self.channel.sequence_in_slot(member, newest) != newest:
            return ""
        name = self.channel.body(member, newest)[REFUSED_AND_DIGEST + NUMBER :].rstrip(b"\0")
        return f", the last one {name.decode(errors='replace')}"

    # --- what is wrong with a call -------------------------------------------------------------------------------------------

    def _explain(self, call: Call, number: int) -> CommfuseError:
        mine = {**self._stated(call), "call number": number}
        tag = _TAG + (self.channel.epoch * 257 + number) % _TAGS
        try:
            return agreement.explain(self.members, call.operator.name, call.product, call.broken, mine, tag)
        except ExchangeError as error:
            self.domain.stop_here(str(error))
            raise

    def _stated(self, call: Call) -> dict[str, Any]:
        batch = _batch(call)
        return {"operator": call.operator.name, **call.agreed, **({} if batch is None else {"BS (global_bs is 0)": batch})}


_AWAITED = {
    _core.PUBLISHED: "its arguments and rows of call {}",
    _core.CONSUMED: "that it has read what was published by call {}",
    _core.PROGRESS: "its verdict on the rows (step {})",
}
_WITH_BATCH = ("npu_moe_distribute_dispatch_v2", "npu_moe_distribute_dispatch", "npu_moe_distribute_dispatch_setup")


def _batch(call: Call) -> int | None:
    """The number of tokens where it must be equal on all ranks, None elsewhere."""
    if call.broken or call.operator.name not in _WITH_BATCH or call["global_bs"] != 0:
        return None
    batch: int = call["BS"]
    return batch


def _offer(offer: _core.Offer, head: bytes, name: bytes, number: bytes) -> _core.Offer:
    offer.set_body(head + number + name, REFUSED_AND_DIGEST + NUMBER)
    return offer
