"""Communication domains: from a name or a ProcessGroup to the ranks that take part, and the exchanges between them.

All exchanges are point-to-point within the process group, so they work on whatever backend it runs on, and also among a
part of its ranks (`Group.among`), which is what shrinking needs: ranks that are gone are simply not talked to.
"""

from __future__ import annotations

import pickle
import time
import weakref
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from . import config
from .errors import ExchangeError, GroupError
from .observe import ranges

_TAG = 0xC0F  # keeps these messages apart from a caller's own send and recv in the same group


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
        group = self._living()
        receive[self.index].copy_(send[self.index])
        ops, peers = [], []
        for step in range(1, len(self.members)):
            source = (self.index - step) % len(self.members)
            target = (self.index + step) % len(self.members)
            if receive[source].numel():
                ops.append(_op(dist.irecv, receive[source], self.members[source], group, tag))
                peers.append(source)
            if send[target].numel():
                ops.append(_op(dist.isend, send[target], self.members[target], group, tag))
                peers.append(target)
        self.finish(self._start(ops), peers, waited_us)

    def post(self, send: Sequence[torch.Tensor], tag: int) -> Posted:
        """Start to send ``send[i]`` to member i and return at once; what is for this rank itself does not travel."""
        group = self._living()
        others = [i for i, tensor in enumerate(send) if i != self.index and tensor.numel()]
        ops = [_op(dist.isend, send[i], self.members[i], group, tag) for i in others]
        return Posted(group=self, tensors=[op.tensor for op in ops], peers=others, works=self._start(ops))

    def receive(self, receive: Sequence[torch.Tensor], tag: int, waited_us: list[float] | None = None) -> None:
        """Fill ``receive[i]`` with what member i has posted under ``tag``; own and empty entries are left alone."""
        group = self._living()
        others = [i for i, tensor in enumerate(receive) if i != self.index and tensor.numel()]
        ops = [_op(dist.irecv, receive[i], self.members[i], group, tag) for i in others]
        self.finish(self._start(ops), others, waited_us)

    def gather(self, mine: torch.Tensor, waited_us: list[float] | None = None, tag: int = _TAG) -> torch.Tensor:
        """Return every member's ``mine`` (equal shapes and dtypes), stacked in member order."""
        out = mine.new_empty((len(self.members), *mine.shape))
        self.exchange([mine.contiguous()] * len(self.members), list(out), waited_us, tag)
        return out

    def gather_objects(self, mine: Any, tag: int = _TAG) -> list[Any]:
        """Return every member's ``mine``, any picklable object."""
        data = torch.frombuffer(bytearray(pickle.dumps(mine)), dtype=torch.uint8)
        sizes = self.gather(torch.tensor([data.numel()]), tag=tag).flatten().tolist()
        parts = [torch.empty(size, dtype=torch.uint8) for size in sizes]
        self.exchange([data] * len(self.members), parts, tag=tag)
        return [pickle.loads(part.numpy().tobytes()) for part in parts]

    def all_to_all(self, rows: torch.Tensor, send_counts: Sequence[int], receive_counts: Sequence[int]) -> torch.Tensor:
        """Send consecutive blocks of ``rows`` to the members in order; return the received blocks in member order."""
        out = rows.new_empty((sum(receive_counts), *rows.shape[1:]))
        self.exchange(list(rows.split(list(send_counts))), list(out.split(list(receive_counts))))
        return out

    def _living(self) -> dist.ProcessGroup:
        group = self.process_group()
        if group is None:
            raise GroupError(f"group {self.name!r}: its process group has been destroyed; make a new one")
        return group

    @ranges.phase("publish")
    def _start(self, ops: list[dist.P2POp]) -> list[Any]:
        """Start ``ops``: each for itself on the CPU, where no backend needs them together, so that an error names the peer."""
        works: list[Any] = []
        for batch in [[op] for op in ops] if ops and ops[0].tensor.is_cpu else filter(None, [ops]):
            try:
                works += dist.batch_isend_irecv(batch)
            except RuntimeError as error:
                self._fail(batch[0].group_peer, 0.0, error)
        return works

    def finish(self, works: Sequence[Any], peers: Sequence[int], waited_us: list[float] | None = None) -> None:
        """Wait until each of ``works`` with its peer is done.

        Raises:
            ExchangeError: a peer is gone or did not answer within ``COMMFUSE_TIMEOUT`` seconds.
        """
        limit = timedelta(seconds=config.get("timeout" if self.shared.get("backends") else "first_timeout"))
        total: dict[int, float] = self.shared.setdefault("exchange waits", defaultdict(float))
        named = list(peers) if len(works) == len(peers) else list(peers[:1]) * len(works)  # some backends coalesce
        for work, peer in zip(works, named, strict=True):
            begin = time.perf_counter()
            try:
                with ranges.waiting(self.members[peer]):
                    work.wait(limit)
            except RuntimeError as error:
                self._fail(self.members[peer], time.perf_counter() - begin, error)
            us = (time.perf_counter() - begin) * 1e6
            total[self.members[peer]] += us
            if waited_us is not None:
                waited_us[peer] += us

    def _fail(self, peer: int, seconds: float, error: RuntimeError) -> NoReturn:
        raise ExchangeError(
            f"group {self.name!r}, rank {self.rank} of {self.size}: exchange with rank {peer} "
            f"failed after {seconds:.1f} s: {str(error).splitlines()[0]}"
        ) from error


@dataclass(eq=False, kw_only=True)
class Posted:
    """Messages on their way; holds their tensors until `wait`."""

    group: Group
    tensors: list[torch.Tensor]
    peers: list[int]
    works: list[Any]

    def wait(self) -> None:
        """Wait until every peer has taken its message."""
        self.group.finish(self.works, self.peers)
        self.tensors.clear()


def _op(kind: Any, tensor: torch.Tensor, peer: int, group: dist.ProcessGroup, tag: int = _TAG) -> dist.P2POp:
    return dist.P2POp(kind, tensor, group=group, group_peer=peer, tag=tag)


_known: dict[str, Group] = {}


def resolve(group: str | dist.ProcessGroup) -> Group:
    """Return the domain of a name (torch's ``group.group_name``) or of a ProcessGroup object.

    Raises:
        GroupError: there is no such group in this process; the message lists those there are.
    """
    known = _known.get(group) if isinstance(group, str) else None
    if known is not None and known.process_group() in c10d._world.pg_map:
        return known
    found = _by_name(group) if isinstance(group, str) else group
    if not isinstance(found, dist.ProcessGroup):
        raise GroupError(f"group must be a name or a ProcessGroup, got {type(group).__name__}")
    if found not in c10d._world.pg_map:
        raise GroupError(f"group {found.group_name!r} has been destroyed; make a new one")
    known = _known.get(found.group_name)
    if known is not None and known.process_group() is found:
        return known
    for name in [name for name, old in _known.items() if old.process_group() is None]:
        del _known[name]
    made = Group(
        name=found.group_name,
        size=found.size(),
        rank=found.rank(),
        members=tuple(range(found.size())),
        process_group=weakref.ref(found),
    )
    _known[made.name] = made
    return made


def _by_name(name: str) -> dist.ProcessGroup:
    try:
        return c10d._resolve_process_group(name)  # type: ignore[arg-type]
    except (RuntimeError, LookupError, ValueError):
        there = ", ".join(sorted(repr(n) for n in c10d._world.pg_names.values())) or "none (init_process_group was not called)"
        raise GroupError(f"no group named {name!r} in this process; there are {there}") from None
