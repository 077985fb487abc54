"""Who the ranks of a group are: a card of each, handed round once, with which messages name a peer and find out whether it has ended."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from . import config

_STATE, _FLAGS, _STARTED = 0, 6, 19  # fields of /proc/PID/stat behind the name
_EXITING = 0x4  # of the flags: set before the process's connections close


@dataclass(frozen=True, kw_only=True)
class Card:
    """One rank's process. ``place`` is equal on ranks that see each other's processes; ``started``: when it did, in the kernel's ticks."""

    pid: int
    host: str
    place: str
    started: int

    def __str__(self) -> str:
        """``pid 71``, with the host if that is not this one."""
        return f"pid {self.pid}" + (f" on {self.host}" if self.host != socket.gethostname() else "")

    def has_ended(self, place: str) -> bool:
        """Whether the process is known to have ended, by one that is at ``place``."""
        if place != self.place or not self.started:
            return False
        fields = _stat(self.pid)
        if not fields:
            return True
        exiting = fields[_STATE] in "ZX" or bool(int(fields[_FLAGS]) & _EXITING)
        return exiting or int(fields[_STARTED]) != self.started


class Peers:
    """The cards that this rank has been given; none before the ranks of its group have met."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._cards: dict[int, Card] = {}

    def meet(self, ranks: Sequence[int], cards: Sequence[Card]) -> None:
        """Keep the cards of ``ranks``, this one's among them."""
        self._cards.update(zip(ranks, cards, strict=True))

    @property
    def have_met(self) -> bool:
        """Whether any cards have been given."""
        return bool(self._cards)

    def who(self, rank: int) -> str:
        """Name a rank for a message."""
        card = self._cards.get(rank)
        return f"rank {rank}" + (f" ({card})" if card else "")

    def has_ended(self, rank: int) -> bool:
        """Whether the process of a rank is known to have ended."""
        own, card = self._cards.get(self._rank), self._cards.get(rank)
        return bool(own and card and card.has_ended(own.place))


def own() -> Card:
    """Return this process's card."""
    fields = _stat(os.getpid())
    return Card(pid=os.getpid(), host=socket.gethostname(), place=place(), started=int(fields[_STARTED]) if fields else 0)


def place() -> str:
    """Return a text that is equal in two processes only if they see each other and can map each other's windows.

    The kernel that runs now, the namespaces in which processes and sockets are found, and ``COMMFUSE_HOST`` where that is set: ranks
    with different values of it are taken to be on different hosts.
    """
    parts = [_read("/proc/sys/kernel/random/boot_id"), _link("/proc/self/ns/pid"), _link("/proc/self/ns/net")]
    return " ".join([*parts, config.get("host")]).strip()


def _stat(pid: int) -> list[str]:
    """What the kernel says about a process; nothing where it says nothing (not Linux, or there is no such process)."""
    return _read(f"/proc/{pid}/stat").rpartition(") ")[2].split()


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace").strip()
    except OSError:
        return ""


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""
