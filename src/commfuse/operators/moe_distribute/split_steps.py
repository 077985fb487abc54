"""The split path over the exchanges of a group: setup posts and returns, teardown receives and finishes.

What is posted for a peer is one message: how many rows for each of its experts, then the rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from ...agreement import Announcement, announce, hear, refuse
from . import accumulate, packing, plan, values
from .combine_steps import arrived, held_rows, travelling, wrong_counts
from .dispatch_steps import columns, expand_idx, fill_rows, routes
from .flights import InFlight, fill_command, in_flight

if TYPE_CHECKING:
    from ...call import Call
    from ...groups import Group

Outputs = tuple[torch.Tensor, ...]


@dataclass(frozen=True, kw_only=True)
class Posted(InFlight):
    """A setup that was announced to the peers."""

    announced: Announcement
    like: list[torch.Tensor]  # the columns that travel, without rows


def dispatch_setup(call: Call, members: Group, waited_us: list[float]) -> Outputs:
    """Post this rank's rows for every other; wait for nobody."""
    sent = routes(call, members.index)
    like = columns(call, sent)
    number = _post(call, members, sent.counts, like)
    outputs = call.outputs()
    _fill_y(call, outputs["y"], sent, like)
    outputs["expand_idx"].copy_(expand_idx(call))
    fill_command(outputs["comm_cmd_info"], call, number)
    return tuple(outputs.values())


def dispatch_teardown(call: Call, members: Group, waited_us: list[float]) -> Outputs:
    """Receive the rows that the other ranks' setups have posted, and order them."""
    flying = in_flight(call.group).popleft()
    counts, packed = _collect(flying, waited_us)
    top = values.topology(flying.setup)
    came = plan.arrivals(np.ascontiguousarray(counts[:, : top.local_experts(members.index)]))
    outputs = call.outputs()
    fill_rows(call, outputs, packed, flying.like, came)
    sums = torch.from_numpy(came.prefix_sums())
    assist = outputs["assist_info_for_combine"]
    assist[: len(sums)] = sums[: len(assist)]  # without a token anywhere there is no room, and nothing to say
    return tuple(outputs.values())


def combine_setup(call: Call, members: Group, waited_us: list[float]) -> Outputs:
    """Post the experts' rows for their owners; wait for nobody."""
    held = held_rows(call, members.index)
    like = travelling(call, call["expand_x"][: held.total], held)
    wide = np.zeros((values.topology(call).world, call["e"]), dtype=np.int64)
    wide[:, : held.counts.shape[1]] = held.counts
    number = _post(call, members, wide, like)
    outputs = call.outputs()
    outputs["quant_expand_x"].zero_()
    fill_command(outputs["comm_cmd_info"], call, number)
    return tuple(outputs.values())


def combine_teardown(call: Call, members: Group, waited_us: list[float]) -> Outputs:
    """Receive the rows of this rank's tokens and sum them.

    What does not fit raises on this rank alone: a peer may be further than this operation by now, or not as far.
    """
    flying = in_flight(call.group).popleft()
    returned, packed = _collect(flying, waited_us)
    sent = routes(call, members.index)
    refuse(call, wrong_counts(returned, sent, "assist_info_for_combine"))
    outputs = call.outputs()
    rows = arrived(packing.unpack(packed, flying.like))
    outputs["x"].copy_(accumulate.float32_sum(call, rows, sent))
    return tuple(outputs.values())


def _post(call: Call, members: Group, counts: plan.Ints, like: list[torch.Tensor]) -> int:
    """Post rows, by destination, with their ``counts`` [destination, local expert]; return the number of the operation."""
    rows = packing.pack(like).split([int(n) for n in counts.sum(1)])
    blocks = [
        torch.cat([torch.from_numpy(mine).view(torch.uint8), its.flatten()]) for mine, its in zip(counts, rows, strict=True)
    ]
    announced = announce(call, members, blocks)
    without_rows = [column.new_empty((0, *column.shape[1:])) for column in like]
    in_flight(call.group).append(Posted(setup=call, number=announced.number, announced=announced, like=without_rows))
    return announced.number


def _collect(flying: Posted, waited_us: list[float]) -> tuple[plan.Ints, torch.Tensor]:
    """Return the counts [source, local expert] and the packed rows, by source, that were posted for this rank."""
    blocks = hear(flying.announced, waited_us)
    begin = flying.setup["e"] * torch.int64.itemsize
    width = packing.pack(flying.like).shape[1]
    members = flying.announced.members
    for rank, block in zip(members.members, blocks, strict=True):
        rows = block[:begin].view(torch.int64) if len(block) >= begin else torch.tensor([-1])
        if min(rows, default=0) < 0 or len(block) != begin + int(rows.sum()) * width:
            members.unreadable(rank, f"a message of {len(block)} bytes with rows {rows.tolist()} of {width} bytes")
    counts = torch.stack([block[:begin].view(torch.int64) for block in blocks])
    return counts.numpy(), torch.cat([block[begin:].view(-1, width) for block in blocks])


def _fill_y(call: Call, y: torch.Tensor, sent: plan.Routes, like: list[torch.Tensor]) -> None:
    """Lay the rows out as the A3 operator does: pair f at row f, then the copies of shared experts; int8 rows with their factor."""
    token, slot = torch.from_numpy(sent.token), torch.from_numpy(sent.slot)
    top_k = call["K"]
    place = torch.where(slot < top_k, token * top_k + slot, call["BS"] * top_k + (slot - top_k) * _active_tokens(call) + token)
    y.zero_()
    rows, factors = like[0], like[1]
    y[place, : call["H"]] = rows
    if call["quant_mode"] == 2:
        begin = -(-call["H"] // 32) * 32
        y[place, begin : begin + 4] = factors[:, None].view(torch.int8)


def _active_tokens(call: Call) -> int:
    return int(values.active(call).any(1).sum())
