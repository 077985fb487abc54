"""What the members have published, read where it lies: as torch tensors, or copied from there straight into place.

Here, and nowhere else on the way of the matmul operators, addresses of windows become tensors. All of it is for use between a call's
`Session.meet` and its `Session.end`: after that the memory may be another call's.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence

import torch

from ... import _core
from ...observe.ranges import phase
from .session import Session


def tensor(session: Session, segment: int, member: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Return what ``member`` has published as ``segment``, without a copy. Only to be read: a peer's memory cannot be written.

    Raises:
        CoreError: it is not of this size.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    address = _address(session.channel.sources(segment), segment, member, num_bytes)
    if not num_bytes:
        return torch.empty(shape, dtype=dtype)
    memory = (ctypes.c_ubyte * num_bytes).from_address(address)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def tensors(session: Session, segment: int, shape: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    """Return what every member has published as ``segment``, in member order; see `tensor`."""
    return [tensor(session, segment, member, shape, dtype) for member in range(len(session.members.members))]


@phase("pull")
def pull(session: Session, segment: int, parts: Sequence[torch.Tensor]) -> None:
    """Copy what member i has published as ``segment`` to ``parts[i]``, which has no gaps.

    Raises:
        CoreError: a member's segment is not of the size of its part.
    """
    sizes = [part.nbytes for part in parts]
    sources, past_cache = session.channel.sources(segment), past_cache_from(session, sum(sizes))
    for member, (part, size) in enumerate(zip(parts, sizes, strict=True)):
        _core.copy(part.data_ptr(), _address(sources, segment, member, size), size, past_cache)


@phase("pull")
def pull_all(session: Session, segment: int, out: torch.Tensor) -> torch.Tensor:
    """Copy what the members have published as ``segment`` to ``out``, which has no gaps, one after the other; return it.

    Raises:
        CoreError: a member's segment is not of the size of its share, the same for all of them.
    """
    num_members, num_bytes, begin = len(session.members.members), out.nbytes, out.data_ptr()
    sources, past_cache, share = session.channel.sources(segment), past_cache_from(session, num_bytes), num_bytes // num_members
    for member in range(num_members):
        _core.copy(begin + member * share, _address(sources, segment, member, share), share, past_cache)
    return out


@phase("pull")
def pull_blocks(session: Session, segment: int, out: torch.Tensor, blocks: Sequence[Sequence[tuple[int, int, int]]]) -> None:
    """Copy blocks of rows from the members' ``segment`` into ``out`` [rows, width], which has no gaps.

    ``blocks[i]``: of member i, each block's first row there, its first row in ``out``, and its rows; they lie within both.
    """
    row_bytes = out.shape[1] * out.element_size()
    begin, past_cache = out.data_ptr(), past_cache_from(session, len(out) * row_bytes)
    sources = session.channel.sources(segment)
    for member, of_member in enumerate(blocks):
        address = sources.address(member)
        for there, here, rows in of_member:
            _core.copy(begin + here * row_bytes, address + there * row_bytes, rows * row_bytes, past_cache)


def check_size(session: Session, segment: int, member: int, num_bytes: int) -> None:
    """Raise CoreError unless ``member`` has published ``num_bytes`` as ``segment``."""
    _address(session.channel.sources(segment), segment, member, num_bytes)


def past_cache_from(session: Session, num_bytes: int) -> int:
    """Return from how many bytes on one of several copies goes past the cache, when they move ``num_bytes`` together; 0: never."""
    return 1 if 0 < session.large_copy <= num_bytes else 0


def _address(sources: _core.Sources, segment: int, member: int, num_bytes: int) -> int:
    if sources.num_bytes(member) != num_bytes:
        raise _core.CoreError(
            f"member {member} published {sources.num_bytes(member)} bytes as segment {segment}, expected {num_bytes}"
        )
    return sources.address(member)
