"""How the ranks of a group come to map each other's windows, once, over their process group."""

from __future__ import annotations

import os

from ... import _core, config
from ...errors import BackendError
from ...groups import Group
from . import host, slabs

DEPTHS = 8, 64  # headers kept of whole calls and of halves, by so many may a rank be ahead; refused setups come on top of eight
NAME_BYTES = 64  # of an operator's name in a header
HEADER_BYTES = (
    (_core.RECORD_BYTES + 25 + NAME_BYTES + 127) // 128 * 128
)  # the core's part; refused or not, a digest, a number, a name


def windows(members: Group, memory: slabs.Slabs) -> tuple[list[_core.Channel], list[int]]:
    """Swap windows with all members; return a channel for each line of calls, and every member's process id.

    Every rank takes part in every step, so that none is left waiting when one fails.
    """
    first = members.gather_objects((os.urandom(8), os.urandom(_core.TOKEN_BYTES), host.identity()))
    _same_host(members, [identity for _, _, identity in first])
    group_id, token = int.from_bytes(first[0][0], "little"), first[0][1]
    door = _core.Door(memory.arena)
    control: list[int] | str
    try:
        control = [memory.arena.make_control(group_id, HEADER_BYTES, depth) for depth in DEPTHS]
    except _core.CoreError as error:
        control = str(error)
    there = members.gather_objects((door.name, control, os.getpid()))
    _all_fine(members, [found if isinstance(found, str) else "" for _, found, _ in there])
    try:
        peers = door.exchange(members.index, [name for name, _, _ in there], token, config.get("first_timeout"))
        channels = [
            _core.Channel(memory.arena, peers, [offsets[line] for _, offsets, _ in there], members.index, group_id)
            for line in range(len(DEPTHS))
        ]
        problem = ""
    except _core.CoreError as error:
        channels, problem = [], str(error)
    _all_fine(members, members.gather_objects(problem))
    return channels, [pid for _, _, pid in there]


def _same_host(members: Group, identities: list[str]) -> None:
    if len(set(identities)) > 1:
        lines = [f"  rank {rank}: {identity}" for rank, identity in zip(members.members, identities, strict=True)]
        raise BackendError(
            "\n".join([f"group {members.name!r}: its ranks are on different hosts (boot id, namespaces):", *lines])
        )


def _all_fine(members: Group, problems: list[str]) -> None:
    if any(problems):
        lines = [f"  rank {rank}: {text}" for rank, text in zip(members.members, problems, strict=True) if text]
        raise BackendError("\n".join([f"group {members.name!r}: its windows cannot be shared:", *lines]))
