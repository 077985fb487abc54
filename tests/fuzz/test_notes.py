"""What a rank reads from its peers' boards and headers is theirs to spoil: any bytes are a note, or none, and never an exception."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

pytest.importorskip("commfuse._core")

from commfuse import _core
from commfuse.backends.cpu.board import FAILED, PROPOSED, SETTLED, Agreed, Note
from commfuse.backends.cpu.session import Session

SEEDED = settings(derandomize=True, database=None, deadline=None, max_examples=200)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
AGREED = st.builds(
    Agreed,
    attempt=st.integers(0, 1 << 40),
    kind=st.text(max_size=20),
    members=st.frozensets(st.integers(0, 200), max_size=20),
    calls=st.tuples(st.integers(0, 1 << 60), st.integers(0, 1 << 60)),
)
NOTES = st.builds(
    Note,
    state=st.sampled_from([PROPOSED, SETTLED, FAILED]),
    proposal=AGREED,
    settled=AGREED,
    failed=AGREED,
    error=st.sampled_from(["", "ExchangeError", "MismatchError"]),
    text=st.text(max_size=40),
    refused=st.text(max_size=10),
    elsewhere=st.text(max_size=10),
)


def plain(note: Note) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(note.pack())
    return content


def put(content: Any, path: list[str], value: Any) -> bytes:
    """``content`` with ``value`` at ``path``, as bytes."""
    inner = content
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = value
    return json.dumps(content).encode()


@SEEDED
@given(st.binary(max_size=1024))
def test_any_bytes_are_a_note_or_none(data: bytes) -> None:
    assert Note.unpack(data) is None


def test_a_note_deeper_than_python_follows_is_none() -> None:
    """Outside hypothesis, which lets Python follow deeper."""
    assert Note.unpack(b"[" * _core.POST_BYTES) is None
    assert Note.unpack(b'{"a":' * 200 + b"1" + b"}" * 24) is None


PATHS = [["state"], ["text"], ["refused"], ["elsewhere"], ["proposal"], ["settled"]]
PATHS += [["proposal", name] for name in ("attempt", "kind", "members", "calls")]


@SEEDED
@given(NOTES, st.sampled_from(PATHS), JSON)
@example(Note(state=SETTLED, proposal=Agreed(), settled=Agreed()), ["proposal", "attempt"], float("inf"))
@example(Note(state=SETTLED, proposal=Agreed(), settled=Agreed()), ["proposal", "members"], "-1")
@example(Note(state=SETTLED, proposal=Agreed(), settled=Agreed()), ["proposal", "members"], "f" * 800)
def test_a_spoilt_note_is_a_note_or_none(note: Note, path: list[str], value: Any) -> None:
    found = Note.unpack(put(plain(note), path, value))
    if found is not None:
        assert all(member >= 0 for member in found.proposal.members)
        assert isinstance(found.proposal.attempt, int)
        assert isinstance(found.text, str)


@SEEDED
@given(NOTES, st.integers(0, 40))
def test_a_note_is_read_as_it_was_shown(note: Note, padding: int) -> None:
    assert Note.unpack(note.pack() + b"\0" * padding) == note


@SEEDED
@given(NOTES, st.integers(0, 300), st.integers(0, 255))
def test_a_note_with_one_changed_byte(note: Note, place: int, value: int) -> None:
    data = bytearray(note.pack())
    data[place % len(data)] = value
    found = Note.unpack(bytes(data))
    assert found is None or isinstance(found, Note)


@SEEDED
@given(NOTES, st.text(max_size=900), st.text(max_size=300))
@example(Note(state=FAILED, proposal=Agreed(), settled=Agreed()), "ä" * 600, "")  # longer in bytes than in characters
@example(Note(state=FAILED, proposal=Agreed(), settled=Agreed()), "\0" * 600, "")  # six bytes each
@example(Note(state=FAILED, proposal=Agreed(), settled=Agreed()), "file \udcff", "")  # a file name that is not UTF-8, in an error
def test_a_note_with_any_texts_fits_on_the_board(note: Note, text: str, refused: str) -> None:
    data = replace(note, text=text, refused=refused, elsewhere=refused).pack()
    assert len(data) <= _core.POST_BYTES
    assert Note.unpack(data) is not None


@SEEDED
@given(st.binary(max_size=112), st.integers(1, 1 << 60))
def test_any_header_can_be_told_of(body: bytes, number: int) -> None:
    """`Session` reads a peer's header for messages, and to see whether it has passed a call on the other line."""
    channel = SimpleNamespace(
        body=lambda member, newest: body, sequence_in_slot=lambda member, newest: newest, counter=lambda member, line: 5
    )
    other: Any = SimpleNamespace(channel=channel, _eldest=0)
    session: Any = SimpleNamespace(channel=channel, _eldest=0, domain=SimpleNamespace(halves=other, whole=None))
    assert Session._latest(session, 1, 5).startswith(", the last one")
    session.domain.whole = session
    assert Session._is_elsewhere(session, 1, 6, number) == (int.from_bytes(body[17:25], "little") >= number)
