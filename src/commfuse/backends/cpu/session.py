"""One group's windows: made by all its ranks together at first use, then one publication per call.

Every call has a number, the same on all ranks. A rank publishes the header of its call, with or without data, waits for those of the
others, reads their data straight from their windows, and says that it has done so. Headers that differ, or that refuse, are explained
over the process group; every rank then raises the same error and the group stays usable. A rank that has ended or does not come stops
the group for good: the first to find out writes down the cause, and every rank raises that.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch

from ... import _core, agreement, config
from ...call import Call
from ...errors import CommfuseError, ExchangeError, GroupError
from ...groups import Group
from . import host, slabs
from .join import DEPTH, windows

_TAG, _TAGS = 0x30000, 0x10000  # messages that explain a call carry its number
_SHORT_SPIN_NS = 4000  # where ranks outnumber cores, a spinning rank keeps its peer from running
_DEAD, _LATE, _LEFT = 1, 2, 3  # why a group is given up
_POISON_TEXT = 500


Path = Callable[[Call, "Session", list[float]], tuple[torch.Tensor, ...]]


@dataclass(frozen=True, slots=True)
class _Unheard:
    """A call of which this rank has told the others, without having looked at what they say."""

    call: Call
    sequence: int
    offer: _core.Offer


class Session:
    """See the module. One thread at a time."""

    def __init__(self, members: Group) -> None:
        self.members = members
        self.slabs = slabs.own()
        self.large_copy = host.large_copy()
        self.paths: dict[str, Path] = {}  # operators that move their rows through windows
        self.kept: dict[Any, Any] = {}  # what operators keep for the next call of the same shape
        self._sequence = 0
        self._offers: dict[Any, _core.Offer] = {}
        self._unheard: deque[_Unheard] = deque()
        self._lent: list[tuple[torch.Tensor, int, int]] = []  # alias, its version, the call that published it
        self._busy = threading.Lock()
        self._pid = os.getpid()
        self.channel, self._pids = windows(members, self.slabs)
        if len(members.members) > host.cores():
            self.channel.spin_ns = _SHORT_SPIN_NS

    # --- one call ----------------------------------------------------------------------------------------------------------

    @contextmanager
    def carrying_out(self, call: Call) -> Iterator[None]:
        """Around everything that a call does here; whatever breaks off a call half-way stops the group on all ranks.

        Raises:
            GroupError: another thread is in a call of this group, or the process has been forked since the group was joined.
        """
        if os.getpid() != self._pid:
            raise GroupError(
                f"{call.operator.name}: group {self.members.name!r} was joined before this process was forked; make a new one"
            )
        if not self._busy.acquire(blocking=False):
            raise GroupError(f"{call.operator.name}: another thread is in a call of group {self.members.name!r}; one at a time")
        try:
            yield
        except CommfuseError:
            raise
        except BaseException as error:
            text = self._about(call, f"rank {self.members.rank} broke off: {type(error).__name__}: {error}")
            self._stop(_LEFT, self.channel.index, text)
            if isinstance(error, _core.CoreError):
                raise ExchangeError(text) from error
            raise
        finally:
            self._busy.release()

    def begin(self, call: Call) -> int:
        """Return the number of this call, whose header may now be published."""
        if self.channel.poisoned:
            self._raise_cause(call)
        if self._lent:
            self._end_loans(call)
        sequence = self._sequence + 1
        if sequence > DEPTH:
            while self._unheard and self._unheard[0].sequence <= sequence - DEPTH:
                self._hear_one()
            self.wait(call, _core.CONSUMED, sequence - DEPTH)
        self._sequence = sequence
        return sequence

    def offer(self, call: Call) -> _core.Offer:
        """Return the header for ``call``, to which segments may be added; the same one for every call like it."""
        if call.broken:
            return _offer(True, self._stated(call))
        key = call.operator.name, call.product, tuple(call.agreed.values()), _batch(call)
        offer = self._offers.get(key)
        if offer is None:
            offer = self._offers[key] = _offer(False, self._stated(call))
        return offer

    def meet(self, call: Call, sequence: int, offer: _core.Offer, waited_us: list[float] | None = None) -> CommfuseError | None:
        """Wait until every rank has published this call; return what is wrong with it, if anything is, the same on all ranks."""
        before = self.channel.waited_ns if waited_us is not None else []
        while self._unheard and self._unheard[0].sequence < sequence:
            self._hear_one()
        self.wait(call, _core.PUBLISHED, sequence)
        for member, waited_ns in enumerate(self.channel.waited_ns if waited_us is not None else ()):
            assert waited_us is not None
            waited_us[member] += (waited_ns - before[member]) / 1000
        if self.channel.resolve(sequence, offer) == -1 and not call.broken:
            return None
        return self._explain(call, sequence)

    def end(self, sequence: int) -> None:
        """Say that this rank has read all it needs of this call's data."""
        self.channel.advance(_core.CONSUMED, sequence)

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

    def announce(self, call: Call) -> None:
        """Tell the others of this call and wait for nobody; `hear` compares it later."""
        sequence, offer = self.begin(call), self.offer(call)
        self.channel.publish(sequence, offer)
        self._unheard.append(_Unheard(call, sequence, offer))

    def hear(self) -> None:
        """Compare all that was announced and not yet compared."""
        while self._unheard:
            self._hear_one()

    def lend(self, tensor: torch.Tensor, sequence: int) -> None:
        """Note that call ``sequence`` has published ``tensor`` where it lies: it must stay as it is until every peer has read it."""
        alias = tensor.detach()
        self._lent.append((alias, alias._version, sequence))

    def take_back(self) -> None:
        """Forget the loans that every peer is known to have read: their tensors may change again."""
        self._lent = [loan for loan in self._lent if not self.channel.reached(_core.CONSUMED, loan[2])]

    def wait(self, call: Call, line: int, target: int) -> None:
        """Wait for a counter of every other rank.

        Raises:
            ExchangeError: a rank has ended, did not come in time, or has given the group up.
        """
        timeout = config.get("timeout")
        status = self.channel.wait(line, target, timeout)
        if status == _core.OK:
            return
        kind, member = status & 0xFF, status >> 8
        if kind == _core.POISONED:
            self._raise_cause(call)
        what = f"{self._who(member)} {'has ended' if kind == _core.DEAD else f'did not come within {timeout:g} s'}"
        progress = self.channel.counter(member, _core.PUBLISHED)
        text = self._about(
            call, f"{what}; awaited: {_AWAITED[line].format(target)}; it has entered {progress} calls of this group"
        )
        if self._stop(_DEAD if kind == _core.DEAD else _LATE, member, text):
            raise ExchangeError(text)
        self._raise_cause(call)

    # --- what goes wrong ---------------------------------------------------------------------------------------------------

    def _hear_one(self) -> None:
        unheard = self._unheard[0]
        self.wait(unheard.call, _core.PUBLISHED, unheard.sequence)
        self._unheard.popleft()
        differs = self.channel.resolve(unheard.sequence, unheard.offer) != -1
        error = self._explain(unheard.call, unheard.sequence) if differs else None
        self.end(unheard.sequence)
        if error is not None:  # its data is on the way already, and would be taken for that of a later call
            self._stop(_LEFT, self.channel.index, str(error))
            raise error

    def _explain(self, call: Call, sequence: int) -> CommfuseError:
        mine = {**self._stated(call), "call number": sequence}
        return agreement.explain(self.members, call.operator.name, call.product, call.broken, mine, _TAG + sequence % _TAGS)

    def _end_loans(self, call: Call) -> None:
        """Forget the tensors that every peer has read; raise if one was changed before that was certain."""
        for alias, version, sequence in self._lent:
            if alias._version != version:
                text = self._about(
                    call,
                    f"rank {self.members.rank} changed a tensor that call {sequence} of this group had published in place before "
                    "every rank was known to have read it: give combine a tensor that stays as it is until the group's next call",
                )
                self._stop(_LEFT, self.channel.index, text)
                raise ExchangeError(text)
        self.take_back()

    def _stop(self, code: int, member: int, text: str) -> bool:
        return self.channel.poison(code, member, text[:_POISON_TEXT])

    def _raise_cause(self, call: Call) -> NoReturn:
        _, _, _, finder, text = self.channel.cause()
        found = "" if finder == self.channel.index else f" (found by {self._who(finder)})"
        raise ExchangeError(self._about(call, f"the group has been given up{found}: {text}"))

    def _about(self, call: Call, text: str) -> str:
        members = self.members
        prefix = f"{call.operator.name}: group {members.name!r}, rank {members.rank} of {members.size}, call {self._sequence}: "
        return prefix + text

    def _who(self, member: int) -> str:
        return f"rank {self.members.members[member]} (pid {self._pids[member]})"

    def _stated(self, call: Call) -> dict[str, Any]:
        batch = _batch(call)
        return {"operator": call.operator.name, **call.agreed, **({} if batch is None else {"BS (global_bs is 0)": batch})}


_AWAITED = {
    _core.PUBLISHED: "its arguments and rows of call {}",
    _core.CONSUMED: "that it has read what was published by call {}",
    _core.PROGRESS: "its verdict on the rows (step {})",
}


def _batch(call: Call) -> int | None:
    """The number of tokens where it must be equal on all ranks, None elsewhere."""
    if call.broken or call.operator.name != "npu_moe_distribute_dispatch_v2" or call["global_bs"] != 0:
        return None
    batch: int = call["BS"]
    return batch


def _offer(refused: bool, stated: dict[str, Any]) -> _core.Offer:
    offer = _core.Offer()
    body = bytes([refused]) + hashlib.blake2b(repr(sorted(stated.items())).encode(), digest_size=16).digest()
    offer.set_body(body, len(body))
    return offer


def of(members: Group) -> Session:
    """Return the session of these ranks; collective where there is none yet.

    Raises:
        BackendError: the ranks cannot map each other's windows; says which and why.
    """
    sessions: dict[tuple[int, ...], Session] = members.shared.setdefault("windows", {})
    session = sessions.get(members.members)
    if session is None:
        session = sessions[members.members] = Session(members)
    return session
