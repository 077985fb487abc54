"""Small messages of each rank that the others read: agreements outside calls, without the process group and its store."""

from __future__ import annotations

import json
import threading
from dataclasses import asdict, dataclass, replace
from typing import Any

from ... import _core

PROPOSED, SETTLED, FAILED = "proposed", "settled", "failed"  # where its rank is with an agreement
_LENGTHS = 512, 256, 64, 0  # characters of a text, each of up to six bytes; the rest is for sets of members
_AGREEMENTS = ("proposal", "settled", "failed")
_TEXTS = ("state", "error", "text", "refused", "elsewhere")


@dataclass(frozen=True, kw_only=True, slots=True)
class Agreed:
    """What ranks have agreed on. ``attempt`` numbers the agreements of a group; ``calls``: the newest call of each session."""

    attempt: int = 0
    kind: str = ""
    members: frozenset[int] = frozenset()
    calls: tuple[int, int] = (0, 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Note:
    """What one rank shows: its ``proposal``; the last one on which it has agreed with the others; the last one that has ``failed``
    since then, and why: the class of the error and its ``text``.

    ``refused``: why it will refuse the call for which it proposes; ``elsewhere``: where else its process waits. In words, '' if not.
    """

    state: str
    proposal: Agreed
    settled: Agreed
    failed: Agreed = Agreed()
    error: str = ""
    text: str = ""
    refused: str = ""
    elsewhere: str = ""

    def pack(self) -> bytes:
        """As bytes; the texts are cut to what fits."""
        packed = (self._pack(length) for length in _LENGTHS)
        return next((data for data in packed if len(data) <= _core.POST_BYTES), b"")

    def _pack(self, length: int) -> bytes:
        content: dict[str, Any] = {name: _plain(getattr(self, name)) for name in _AGREEMENTS}
        content |= {"state": self.state, "error": self.error, "elsewhere": _cut(self.elsewhere, length // 3)}
        content |= {"text": _cut(self.text, length), "refused": _cut(self.refused, length)}
        return json.dumps(content, ensure_ascii=False).encode(errors="replace")

    @classmethod
    def unpack(cls, data: bytes) -> Note | None:
        """The other way; None for bytes that are no note."""
        try:
            content = json.loads(data.rstrip(b"\0"))
            made: dict[str, Any] = {name: _agreed(content[name]) for name in _AGREEMENTS}
            return cls(**made | {name: str(content[name]) for name in _TEXTS})
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            return None


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: max(length - 4, 0)] + " ..."[:length]


def _plain(agreed: Agreed) -> dict[str, Any]:
    return {**asdict(agreed), "members": f"{sum(1 << member for member in agreed.members):x}"}


def _agreed(content: dict[str, Any]) -> Agreed:
    bits = int(content["members"], 16)
    members = frozenset(member for member in range(bits.bit_length()) if bits >> member & 1)
    whole, halves = content["calls"]
    return Agreed(attempt=int(content["attempt"]), kind=str(content["kind"]), members=members, calls=(int(whole), int(halves)))


class Board:
    """The boards of all members, through one channel."""

    def __init__(self, channel: _core.Channel) -> None:
        self._channel = channel
        self.mine = Note(state=SETTLED, proposal=Agreed(), settled=Agreed())  # what this rank shows, once it has shown anything
        self._posts = 0
        self._posting = threading.Lock()  # a thread that waits in another group shows that here
        self._seen = [0] * channel.num_members  # the number of what was read last

    def show(self, **changes: Any) -> None:
        """Put this rank's note on its board, with fields changed, in the place of the one before."""
        with self._posting:
            self.mine = replace(self.mine, **changes)
            self._posts += 1
            self._channel.post(self._posts, self.mine.pack())

    def read(self, member: int) -> Note | None:
        """Return what ``member`` shows now; None if nothing yet."""
        while True:
            number = self._seen[member] = self._channel.counter(member, _core.POSTED)
            if number == 0:
                return None
            data = self._channel.posted(member, number)
            if self._channel.counter(member, _core.POSTED) == number:  # its place is not being written again
                return Note.unpack(data)

    def wait(self, member: int, timeout_s: float) -> None:
        """Wait a little for ``member`` to show something newer than was read last."""
        self._channel.wait_member(member, _core.POSTED, self._seen[member] + 1, timeout_s, False)
