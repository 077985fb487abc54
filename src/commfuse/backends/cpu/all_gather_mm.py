"""Matmul and a collective through windows: torch multiplies tensors that lie in them, this rank's and its peers'.

Nothing is cut into chunks that overlap: every core computes, so no engine is free to copy beside it, and smaller products are slower.
"""

from __future__ import annotations

import math

import torch

from ...call import Call
from ...observe.ranges import phase
from ...operators.all_gather_mm import steps
from ...operators.products import product
from ..base import Outputs
from . import views
from .outputs import outputs, scratch
from .publication import Publication, staged_bytes
from .session import Session

IN_PLACE_ROWS = 256  # rows a rank; with fewer, one product of all ranks' rows gains more than gathering them costs
SHARDS, SCALES = range(2)  # segments of all_gather_base_mm
TERMS, SUMS = range(2)  # segments of the others


def all_gather_base_mm(call: Call, session: Session, waited_us: list[float]) -> Outputs:
    """Carry out npu_all_gather_base_mm: publish the shard, multiply the peers' shards in place or gathered."""
    rows, scale = call["input"], call["x1_scale"]
    sizes = staged_bytes(session, rows), 0 if scale is None else scale.numel() * scale.element_size()
    publication = Publication(call, session, sizes)
    publication.put(SHARDS, rows)
    if scale is not None:
        publication.staging.copy_in(SCALES, scale)
    publication.publish()
    publication.meet()
    made = outputs(call, session)
    if _pays_in_place(call):
        _multiply_in_place(call, session, made["output"])
        publication.close()
    else:
        gathered, scales = _gather(call, session, made["gather_out"])
        publication.close()
        steps.multiply(call, gathered, scales, made["output"])
    return (made["output"], made["gather_out"])


def mm_reduce_scatter_base(call: Call, session: Session, waited_us: list[float]) -> Outputs:
    """Carry out npu_mm_reduce_scatter_base: product into the window; each rank sums its rows of all products."""
    shape = call["m"], call["n"]
    publication = Publication(call, session, (math.prod(shape) * 4,))
    steps.scaled_product(call, call["input"], call["x1_scale"], publication.staging.view(TERMS, shape, torch.float32))
    publication.publish()
    output = outputs(call, session)["output"]
    publication.meet()
    output.copy_(_sum_of_share(session, shape))
    publication.close()
    return (output,)


def mm_all_reduce_base(call: Call, session: Session, waited_us: list[float]) -> Outputs:
    """Carry out npu_mm_all_reduce_base: as reduce-scatter; then the rounded sums are published, and every rank copies all of them."""
    shape = call["rows"], call["n"]
    output = outputs(call, session)["output"]
    parts = output.view(shape).tensor_split(len(session.members.members))
    mine = parts[session.members.index]
    publication = Publication(call, session, (math.prod(shape) * 4, mine.numel() * mine.element_size()))
    steps.reduced_term(call, publication.staging.view(TERMS, shape, torch.float32))
    publication.publish()
    publication.meet()
    publication.staging.view(SUMS, tuple(mine.shape), mine.dtype).copy_(_sum_of_share(session, shape))
    publication.publish_again()
    views.pull(session, SUMS, parts)
    publication.close()
    return (output,)


def distribute_barrier(call: Call, session: Session, waited_us: list[float]) -> Outputs:
    """Carry out _npu_distribute_barrier: a publication without data."""
    session.agree(call, waited_us)
    session.take_back()
    return steps.distribute_barrier(call, session.members, waited_us)


def _pays_in_place(call: Call) -> bool:
    """Whether products that read the peers' windows are faster than one product of gathered rows.

    They are not where the rows are converted first, since the weight would be converted with each.
    """
    converted = call["input"].dtype == torch.float16 or not steps.is_plain(call)
    return not call["gather_output"] and not converted and call["m"] >= IN_PLACE_ROWS


def _multiply_in_place(call: Call, session: Session, output: torch.Tensor) -> None:
    rows = call["input"]
    shards = views.tensors(session, SHARDS, tuple(rows.shape), rows.dtype)
    for shard, result in zip(shards, output.split(call["m"]), strict=True):
        product(shard, call["x2"], result)


def _gather(call: Call, session: Session, gather_out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return all ranks' rows, in ``gather_out`` if they are asked for, and their scales."""
    world_size, m, k = call["world_size"], call["m"], call["k"]
    gathered = gather_out if call["gather_output"] else scratch(session, (m * world_size, k), gather_out.dtype)
    views.pull_all(session, SHARDS, gathered)
    if call["x1_scale"] is None:
        return gathered, None
    return gathered, views.pull_all(session, SCALES, torch.empty(m * world_size, 1))


@phase("sum")
def _sum_of_share(session: Session, shape: tuple[int, int]) -> torch.Tensor:
    """Return the sum over ranks, in their order, of this rank's rows of the terms; float32."""
    members = session.members
    terms = views.tensors(session, TERMS, shape, torch.float32)
    return steps.sum_in_order([term.tensor_split(len(members.members))[members.index] for term in terms])
