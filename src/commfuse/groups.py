"""From a name or a ProcessGroup to the communication domain."""

from __future__ import annotations

import weakref

import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from .errors import GroupError
from .exchanges import Group, Posted

__all__ = ["Group", "Posted", "resolve"]

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
