"""Two real processes over one channel: data, agreement, death, Ctrl-C."""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from .core import MIB, _core, in_child, status_of

GROUP_ID = 12345
TOKEN = b"k" * _core.TOKEN_BYTES
SECONDS = 20.0


@dataclass(frozen=True, kw_only=True)
class Rank:
    arena: _core.Arena
    channel: _core.Channel
    peers: list[_core.Peer | None]

    def publish_word(self, sequence: int, word: int, *, agreed: bytes = b"same") -> _core.Offer:
        where = self.arena.at(MIB, 8)
        ctypes.c_uint64.from_address(where).value = word
        offer = _core.Offer()
        offer.set_body(agreed + bytes([self.channel.index]), len(agreed))
        offer.set_segment(2, where, 8)
        self.channel.publish(sequence, offer)
        return offer

    def word_of(self, member: int) -> int:
        return ctypes.c_uint64.from_address(self.channel.sources(2).address(member)).value


class Pair:
    """Two ranks: this process, and children of it; what a store would carry goes through a pipe each way."""

    def __init__(self) -> None:
        self._to_child, self._to_parent = os.pipe(), os.pipe()

    def start(self, work: Callable[[Rank], None]) -> int:
        return in_child(lambda: work(self._join(1, self._to_parent[1], self._to_child[0])))

    def join(self) -> Rank:
        return self._join(0, self._to_child[1], self._to_parent[0])

    def _join(self, me: int, out: int, source: int) -> Rank:
        arena = _core.Arena(64 * MIB, MIB)
        arena.grow(8 * MIB)
        control, door = arena.make_control(GROUP_ID, 512, 4), _core.Door(arena)
        os.write(out, f"{door.name} {control}".encode())
        name, offset = os.read(source, 200).decode().split()
        names, offsets = ([door.name, name], [control, int(offset)]) if me == 0 else ([name, door.name], [int(offset), control])
        peers = door.exchange(me, names, TOKEN, SECONDS)
        return Rank(arena=arena, channel=_core.Channel(arena, peers, offsets, me, GROUP_ID), peers=peers)


def exchange_words(rank: Rank, *, agreed: bytes = b"same") -> list[int]:
    offer = rank.publish_word(1, 100 + rank.channel.index, agreed=agreed)
    assert rank.channel.wait(_core.PUBLISHED, 1, SECONDS) == _core.OK
    assert rank.channel.resolve(1, offer) == -1
    words = [rank.word_of(member) for member in range(2)]
    rank.channel.advance(_core.CONSUMED, 1)
    assert rank.channel.wait(_core.CONSUMED, 1, SECONDS) == _core.OK
    return words


def test_two_processes_read_each_others_words() -> None:
    pair = Pair()

    def other(rank: Rank) -> None:
        assert exchange_words(rank) == [100, 101]
        rank.channel.wait(_core.POSTED, 1)

    pid = pair.start(other)
    rank = pair.join()
    assert exchange_words(rank) == [100, 101]
    peer = rank.peers[1]
    assert peer is not None
    assert (peer.pid, peer.alive, rank.peers[0]) == (pid, True, None)
    assert memoryview(peer).readonly
    assert rank.channel.body(1, 1) == b"same\x01"
    rank.channel.post(1, b"bye")
    assert status_of(pid) == 0


def test_a_difference_names_the_member() -> None:
    pair = Pair()

    def other(rank: Rank) -> None:
        rank.publish_word(1, 0, agreed=b"SAME")
        rank.channel.wait(_core.POSTED, 1)

    pid = pair.start(other)
    rank = pair.join()
    offer = rank.publish_word(1, 0)
    assert rank.channel.wait(_core.PUBLISHED, 1, SECONDS) == _core.OK
    assert rank.channel.resolve(1, offer) == 1
    assert rank.channel.body(1, 1) == b"SAME\x01"
    rank.channel.post(1, b"")
    assert status_of(pid) == 0


def test_a_killed_peer_ends_the_wait() -> None:
    pair = Pair()
    pid = pair.start(lambda rank: time.sleep(60))
    rank = pair.join()
    killer = threading.Timer(0.1, os.kill, (pid, signal.SIGKILL))
    killer.start()
    start = time.monotonic()
    status = rank.channel.wait(_core.PUBLISHED, 1, SECONDS)
    assert (status & 0xFF, status >> 8) == (_core.DEAD, 1)
    assert time.monotonic() - start < 5
    assert not rank.channel.alive(1)
    assert rank.channel.poison(7, 1, "rank 1 died")
    assert rank.channel.poisoned
    assert rank.channel.cause() == (0, 7, 1, 0, "rank 1 died")
    assert rank.channel.wait(_core.PUBLISHED, 1) & 0xFF == _core.POISONED
    killer.join()
    assert status_of(pid) == -signal.SIGKILL


@pytest.fixture
def lonely() -> Rank:
    """A rank whose only peer, another arena of this very process, never publishes."""
    arena, other = _core.Arena(64 * MIB, MIB), _core.Arena(64 * MIB, MIB)
    offsets = [one.make_control(GROUP_ID, 512, 4) for one in (arena, other)]
    return Rank(arena=arena, channel=_core.Channel(arena, [None, other], offsets, 0, GROUP_ID), peers=[None, None])


def test_ctrl_c_ends_a_wait_at_once(lonely: Rank) -> None:
    at: list[float] = []

    def interrupt() -> None:
        at.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    timer = threading.Timer(0.2, interrupt)  # runs although this thread waits: the GIL is free
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        lonely.channel.wait(_core.PUBLISHED, 1, SECONDS)
    assert time.monotonic() - at[0] < 1
    timer.join()


def test_a_deadline_names_the_missing_member_and_counts_the_time(lonely: Rank) -> None:
    assert lonely.channel.wait(_core.PUBLISHED, 1, 0.05) == _core.DEADLINE | 1 << 8
    assert lonely.channel.wait(_core.PUBLISHED, 0) == _core.OK
    assert lonely.channel.waited_ns == [0, 0]  # nothing has arrived after a wait yet
    lonely.channel.active = [0]
    assert lonely.channel.wait(_core.PUBLISHED, 1) == _core.OK
    with pytest.raises(_core.CoreError, match="must contain this one"):
        lonely.channel.active = [1]
    with pytest.raises(_core.CoreError, match="counter 9"):
        lonely.channel.wait(9, 1)


def test_a_wrong_group_or_block_is_refused() -> None:
    arena, other = _core.Arena(64 * MIB, MIB), _core.Arena(64 * MIB, MIB)
    mine, theirs = arena.make_control(GROUP_ID, 512, 4), other.make_control(GROUP_ID, 512, 8)
    with pytest.raises(_core.CoreError, match="headers of another size"):
        _core.Channel(arena, [None, other], [mine, theirs], 0, GROUP_ID)
    with pytest.raises(_core.CoreError, match="no control block of this group"):
        _core.Channel(arena, [None], [mine], 0, GROUP_ID + 1)
    with pytest.raises(_core.CoreError, match="no control block"):
        _core.Channel(arena, [None], [MIB], 0, GROUP_ID)
    with pytest.raises(_core.CoreError, match="needs a peer"):
        _core.Channel(arena, [None, None], [mine, theirs], 0, GROUP_ID)


def test_a_cause_is_cut_in_the_middle_of_a_letter() -> None:
    arena = _core.Arena(64 * MIB, MIB)
    channel = _core.Channel(arena, [None], [arena.make_control(GROUP_ID, 512, 4)], 0, GROUP_ID)
    assert channel.poison(7, 0, "x" + "\u00e4" * 300)  # 601 bytes, of which 511 stay
    assert channel.cause()[4] == "x" + "\u00e4" * 255
    channel.epoch = 1
    assert channel.poison(7, 0, "\u00e4" * 300)
    assert channel.cause()[4] == "\u00e4" * 255 + "\ufffd"


def test_an_exchange_that_nobody_joins_names_the_ranks() -> None:
    door = _core.Door(_core.Arena(64 * MIB, MIB))
    with pytest.raises(_core.CoreError, match="rank 1 2 did not connect in time"):
        door.exchange(0, [door.name, "a", "b"], TOKEN, 0.1)
    with pytest.raises(_core.CoreError, match="32 bytes"):
        door.exchange(0, [door.name], b"short", 0.1)


def test_ctrl_c_ends_an_exchange() -> None:
    door = _core.Door(_core.Arena(64 * MIB, MIB))
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        door.exchange(0, [door.name, "nobody"], TOKEN, SECONDS)
    timer.join()
