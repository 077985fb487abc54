"""How the ranks of a group come to map each other's windows, once, over their process group."""

from __future__ import annotations

import os

from ... import _core, config
from ...errors import BackendError
from ...groups import Group
from . import host, slabs

DEPTH = 8  # calls that a rank may be ahead of the slowest
HEADER_BYTES = (_core.RECORD_BYTES + 17 + 127) // 128 * 128  # the core's part; refused or not, and a digest


def windows(members: Group, memory: slabs.Slabs) -> tuple[_core.Channel, list[int]]:
    """Swap windows with all members; return the channel and every member's process id.

    Every rank takes part in every step, so that none is left waiting when one fails.
    """
    first = members.gather_objects((os.urandom(8), os.urandom(_core.TOKEN_BYTES), host.identity()))
    _same_host(members, [identity for _, _, identity in first])
    group_id, token = int.from_bytes(first[0][0], "little"), first[0][1]
    door = _core.Door(memory.arena)
    control: int | str
    try:
        control = memory.arena.make_control(group_id, HEADER_BYTES, DEPTH)
    except _core.CoreError as error:
        control = str(error)
    there = members.gather_objects((door.name, control, os.getpid()))
    _all_fine(members, [found if isinstance(found, str) else "" for _, found, _ in there])
    try:
        peers = door.exchange(members.index, [name for name, _, _ in there], token, config.get("timeout"))
        channel: _core.Channel | None = _core.Channel(
            memory.arena, peers, [offset for _, offset, _ in there], members.index, group_id
        )
        problem = ""
    except _core.CoreError as error:
        channel, problem = None, str(error)
    _all_fine(members, members.gather_objects(problem))
    assert channel is not None
    return channel, [pid for _, _, pid in there]


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
