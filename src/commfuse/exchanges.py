"""Communication domains: the ranks that take part in a call, and the exchanges between them.

All exchanges are point-to-point within the process group, so they work on whatever backend it runs on, and also among a
part of its ranks (`Group.among`), which is what shrinking needs: ranks that are gone are simply not talked to.
"""

from __future__ import annotations

import pickle
import weakref
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from . import config, notes, works
from .errors import ExchangeError, GroupError
from .observe import ranges
from .peers import Peers

_TAG = 0xC0F  # keeps these messages apart from a caller's own send and recv in the same group


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """A message on its way from or to member ``peer``; ``awaited`` says what the wait for it is for."""

    work: Any
    peer: int
    awaited: str


@dataclass(eq=False, kw_only=True)
class Group:
    """The ranks of one communication domain that take part in a call.

    ``members`` are their ranks in the process group, in the order of the ranks' ids in this call; ``index`` is this process's
    position among them.
    """

    name: str
    size: int
    rank: int
    members: tuple[int, ...]
    process_group: weakref.ref[dist.ProcessGroup]
    shared: dict[str, Any] = field(default_factory=dict)  # per domain, the same object for every part of it

    @property
    def index(self) -> int:
        """This process's position among the members."""
        return self.members.index(self.rank)

    def among(self, alive: Sequence[int] | None) -> Group:
        """Return the domain restricted to ``alive`` ranks (None: all)."""
        if alive is None or tuple(alive) == self.members:
            return self
        return Group(
            name=self.name,
            size=self.size,
            rank=self.rank,
            members=tuple(alive),
            process_group=self.process_group,
            shared=self.shared,
        )

    def waited_us(self) -> dict[int, float]:
        """Return the microseconds that this process has waited for each rank of the domain, in all its calls so far."""
        total = dict(self.shared.get("exchange waits", {}))
        for waits in self.shared.get("waits", ()):  # of backends that do not wait in exchanges
            for rank, waited in waits().items():
                total[rank] = total.get(rank, 0.0) + waited
        return total

    def exchange(
        self,
        send: Sequence[torch.Tensor],
        receive: Sequence[torch.Tensor],
        waited_us: list[float] | None = None,
        tag: int = _TAG,
    ) -> None:
        """Send ``send[i]`` to member i and fill ``receive[i]`` from it; both sides know the sizes, empty ones do not travel.

        ``waited_us[i]`` grows by the microseconds spent waiting for member i. Messages of different tags do not meet.

        Raises:
            ExchangeError: a peer is gone or did not answer within ``COMMFUSE_TIMEOUT`` seconds.
        """
        self._living()
        receive[self.index].copy_(send[self.index])
        messages = []
        for step in range(1, len(self.members)):
            source, target = ((self.index + way * step) % len(self.members) for way in (-1, 1))
            messages += self._start(dist.irecv, receive, [source], tag)
            messages += self._start(dist.isend, send, [target], tag)
        self.finish(messages, waited_us)

    def post(self, send: Sequence[torch.Tensor], tag: int, what: str = "") -> Posted:
        """Start to send ``send[i]`` to member i and return at once; what is for this rank itself does not travel.

        ``what`` it is, for messages.
        """
        others = [i for i in range(len(send)) if i != self.index]
        return Posted(group=self, tensors=list(send), messages=self._start(dist.isend, send, others, tag, what))

    def receive(self, receive: Sequence[torch.Tensor], tag: int, waited_us: list[float] | None = None, what: str = "") -> None:
        """Fill ``receive[i]`` with what member i has posted under ``tag``; own and empty entries are left alone."""
        others = [i for i in range(len(receive)) if i != self.index]
        self.finish(self._start(dist.irecv, receive, others, tag, what), waited_us)

    def gather(self, mine: torch.Tensor, waited_us: list[float] | None = None, tag: int = _TAG) -> torch.Tensor:
        """Return every member's ``mine`` (equal shapes and dtypes), stacked in member order."""
        out = mine.new_empty((len(self.members), *mine.shape))
        self.exchange([mine.contiguous()] * len(self.members), list(out), waited_us, tag)
        return out

    def gather_objects(self, mine: Any, tag: int = _TAG) -> list[Any]:
        """Return every member's ``mine``, any picklable object; tuples have as many entries on all.

        Raises:
            ExchangeError: as `exchange`, or a rank has sent what cannot be read.
        """
        data = torch.frombuffer(bytearray(pickle.dumps(mine)), dtype=torch.uint8)
        parts = self.room(self.gather(torch.tensor([data.numel()]), tag=tag).flatten().tolist())
        self.exchange([data] * len(self.members), parts, tag=tag)
        return [self._unpickled(rank, part, mine) for rank, part in zip(self.members, parts, strict=True)]

    def gather_counts(self, mine: torch.Tensor, most: int) -> torch.Tensor:
        """As `gather`, for numbers of rows, each from 0 to ``most``.

        Raises:
            ExchangeError: as `exchange`, or a rank has sent something else.
        """
        counts = self.gather(mine)
        for rank, theirs in zip(self.members, counts, strict=True):
            wrong = theirs[(theirs < 0) | (theirs > most)].tolist()
            if wrong:
                self.unreadable(rank, f"{wrong[0]} as a number of rows")
        return counts

    def all_to_all(self, rows: torch.Tensor, send_counts: Sequence[int], receive_counts: Sequence[int]) -> torch.Tensor:
        """Send consecutive blocks of ``rows`` to the members in order; return the received blocks in member order."""
        width = rows.element_size() * rows.shape[1:].numel()
        self.room([count * width for count in receive_counts])  # only to find out whose is too much
        out = rows.new_empty((sum(receive_counts), *rows.shape[1:]))
        self.exchange(list(rows.split(list(send_counts))), list(out.split(list(receive_counts))))
        return out

    def room(self, sizes: Sequence[int]) -> list[torch.Tensor]:
        """Return room for as many bytes as each member says that it will send.

        Raises:
            ExchangeError: there cannot be so many.
        """
        made = []
        for rank, size in zip(self.members, sizes, strict=True):
            try:
                made.append(torch.empty(size, dtype=torch.uint8))
            except (RuntimeError, TypeError, MemoryError):  # below 0, or more than memory
                self.unreadable(rank, f"{size} as the bytes of a message")
        return made

    def unreadable(self, rank: int, what: str) -> NoReturn:
        """Raise ExchangeError because of ``what`` a rank has sent."""
        raise ExchangeError(self.about(f"{self.peers.who(rank)} has sent {what}, which cannot be"))

    def _unpickled(self, rank: int, part: torch.Tensor, like: Any) -> Any:
        try:
            found = pickle.loads(part.numpy().tobytes())
        except Exception as error:  # a spoilt pickle may raise anything
            self.unreadable(rank, f"a message of {part.numel()} bytes that is no object ({type(error).__name__}: {error})")
        if isinstance(like, tuple) and not (isinstance(found, tuple) and len(found) == len(like)):
            self.unreadable(rank, f"{type(found).__name__} in the place of a tuple of {len(like)}")
        return found

    def _living(self) -> dist.ProcessGroup:
        group = self.process_group()
        if group is None:
            raise GroupError(f"group {self.name!r}: its process group has been destroyed; make a new one")
        return group

    @ranges.phase("publish")
    def _start(self, kind: Any, tensors: Sequence[torch.Tensor], peers: Sequence[int], tag: int, what: str = "") -> list[Message]:
        """Start to send to or receive from ``peers`` their entry of ``tensors``; empty ones do not travel."""
        group, started = self._living(), []
        what = what or f"data of call {self.shared.get('number', 0)}"
        awaited = f"its {what}" if kind is dist.irecv else f"that it takes the {what}"
        for peer in peers:
            if not tensors[peer].numel():
                continue
            op = dist.P2POp(kind, tensors[peer], group=group, group_peer=self.members[peer], tag=tag)
            try:
                (work,) = dist.batch_isend_irecv([op])  # each for itself, so that an error names the peer
            except RuntimeError as error:
                self._fail(Message(work=None, peer=peer, awaited=awaited), 0.0, error)
            started.append(Message(work=work, peer=peer, awaited=awaited))
        return started

    def finish(self, messages: Sequence[Message], waited_us: list[float] | None = None) -> None:
        """Wait until each of ``messages`` has come or been taken.

        Raises:
            ExchangeError: a peer is gone or did not answer within ``COMMFUSE_TIMEOUT`` seconds.
        """
        total: dict[int, float] = self.shared.setdefault("exchange waits", defaultdict(float))
        for part in [[message] for message in messages] if ranges.active() else filter(None, [messages]):
            with ranges.waiting(self.members[part[0].peer]):
                times = self._wait(part)
            for message, seconds in zip(part, times, strict=True):
                total[self.members[message.peer]] += seconds * 1e6
                if waited_us is not None:
                    waited_us[message.peer] += seconds * 1e6

    def _wait(self, messages: Sequence[Message]) -> list[float]:
        limit = config.get("timeout" if self.shared.get("backends") else "first_timeout")
        listening = notes.Listening(self._living())
        seen: list[int] = []

        def look(index: int, seconds: float) -> None:
            """What a peer had sent before it ended comes within the time between two looks."""
            if listening.heard():
                raise ExchangeError(self.about("the group has been given up"))
            if self.peers.has_ended(self.members[messages[index].peer]):
                if index in seen:
                    self._fail(messages[index], seconds)
                seen.append(index)

        try:
            return works.wait([message.work for message in messages], limit, look, self.close)
        except works.StuckError as stuck:
            self._fail(messages[stuck.index], stuck.seconds, stuck.error)

    def _fail(self, message: Message, seconds: float, error: BaseException | None = None) -> NoReturn:
        """Raise what has happened: above all that a rank has ended, of which its peers may have heard through another one."""
        rank = self.members[message.peer]
        ended = next(filter(self.peers.has_ended, (rank, *self.members)), None)
        whose = "" if ended in (rank, None) else f"{self.peers.who(rank)}, "
        if ended is not None:
            what = f"{self.peers.who(ended)} has ended"
        elif error is None:
            what = f"{self.peers.who(rank)} did not come in time"
        else:
            what = f"exchange with {self.peers.who(rank)} failed ({str(error).splitlines()[0]})"
        raise ExchangeError(self.about(f"{what}; awaited for {seconds:.2f} s: {whose}{message.awaited}")) from error

    def about(self, text: str) -> str:
        """Begin a message with where it comes from: what this rank is doing in the group."""
        subject, number = self.shared.get("subject", "commfuse"), self.shared.get("number", 0)
        return f"{subject}: group {self.name!r}, rank {self.rank} of {self.size}, call {number}: {text}"

    @property
    def peers(self) -> Peers:
        """What is known of the processes of the domain."""
        known: Peers = self.shared.setdefault("peers", Peers(self.rank))
        return known

    def close(self) -> None:
        """Close the connections of the process group, if it is gloo's: whoever waits for this rank in it is told at once."""
        group = self.process_group()
        if group is not None and group in c10d._world.pg_map:
            works.close(group)


@dataclass(eq=False, kw_only=True)
class Posted:
    """Messages on their way; holds their tensors until `wait`."""

    group: Group
    tensors: list[torch.Tensor]
    messages: list[Message]

    def wait(self) -> None:
        """Wait until every peer has taken its message."""
        self.group.finish(self.messages)
        self.tensors.clear()
