"""Large tensors in the window, where memory that has been used stays mapped and warm.

malloc maps every block of 32 MiB and more anew and unmaps it when it is freed, so each of its pages faults in every call: for the
output of a product with few columns inside, that takes a third of the product's time.
"""

from __future__ import annotations

import math

import torch

from ... import _core, config
from ...call import Call
from .session import Session

LARGE = (32 << 20) - 4096  # bytes; glibc's threshold for mapping, its own few bytes included, grows to 32 MiB and no further
KEPT = 2 << 30  # bytes; a window that holds more has no room for these, since it keeps what it has held until others need it
_LINE = 64


def outputs(call: Call, session: Session) -> dict[str, torch.Tensor]:
    """Return what `Call.outputs` does, in the window what is large."""
    made = call.outputs()
    for name, tensor in made.items():
        if tensor.nbytes >= LARGE and (warm := _in_window(session, tuple(tensor.shape), tensor.dtype)) is not None:
            made[name] = warm.copy_(tensor) if config.get("poison") else warm
    return made


def scratch(session: Session, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor for what a call needs besides its outputs."""
    is_large = math.prod(shape) * dtype.itemsize >= LARGE
    warm = _in_window(session, shape, dtype) if is_large else None
    return torch.empty(shape, dtype=dtype) if warm is None else warm


def _in_window(session: Session, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor | None:
    """Return a tensor in the window, whose memory comes back with its last alias; None where there is no room for it.

    It begins a line behind its slab: no call takes it for a tensor that its owner has put there to be read in place, and that must not
    change until it has been. Whoever gets a result may do with it what he likes.
    """
    num_bytes = _LINE + math.prod(shape) * dtype.itemsize
    slabs = session.slabs
    try:
        slab = slabs.core.take(num_bytes)
    except _core.CoreMemoryError:
        return None
    try:
        held = slabs.arena.allocated_bytes() + max(num_bytes - slab.used, 0)
        if held > min(slabs.arena.limit_bytes // 2, KEPT):
            raise _core.CoreMemoryError("there may be calls that cannot do without the rest")
        slabs.core.populate(slab, num_bytes)
    except _core.CoreMemoryError:
        slabs.give(slab)
        return None
    slabs.arena.show_to_children(slab.offset, slab.num_bytes)  # as any result; they share it, though, instead of having a copy
    memory = slabs.tensor(slab, (num_bytes,), torch.uint8).untyped_storage()
    made = torch.empty(0, dtype=dtype)  # no view, of which autograd would know that it was made without gradients
    made.set_(memory, _LINE // dtype.itemsize, shape)  # type: ignore[call-overload]  # strides are optional
    return made
