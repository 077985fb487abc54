"""Dispatch over the exchanges of a group: the portable way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from . import packing, plan, quantise, values

if TYPE_CHECKING:
    from ...call import Call
    from ...groups import Group
from ...observe.ranges import phase

Named = dict[str, torch.Tensor]


def dispatch(call: Call, members: Group, waited_us: list[float]) -> tuple[torch.Tensor, ...]:
    """Carry out npu_moe_distribute_dispatch and _v2: counts, then rows, then the order of the receiver."""
    top = values.topology(call)
    sent = routes(call, members.index)
    most = max(call["global_bs"], call["BS"] * top.world) * (call["K"] + call["shared_expert_num"])
    counts = members.gather_counts(torch.from_numpy(sent.counts), most).numpy()  # [source, destination, local expert]
    came = plan.arrivals(counts[:, members.index, : top.local_experts(members.index)])
    like = columns(call, sent)
    packed = members.all_to_all(packing.pack(like), sent.per_rank(), came.per_rank())
    outputs = call.outputs()
    received = fill_rows(call, outputs, packed, like, came)
    _fill_counts(call, outputs, came, members.index)
    if call.partner is not None:
        share_with_partner(call, outputs, received, came)
    record_waits(call, members, waited_us)
    return tuple(outputs.values())


def routes(call: Call, rank: int) -> plan.Routes:
    """Return the rows that this rank, ``rank`` in local ids, sends."""
    scales = call["scales"] if "scales" in call.args else None
    return plan.routes(
        values.ids(call),
        values.active(call),
        values.topology(call),
        rank,
        split_shared=call["split_shared"],
        first_factor=None if scales is None else len(scales) - call["moe_expert_num"],
    )


def columns(call: Call, sent: plan.Routes) -> list[torch.Tensor]:
    """Return what travels with each row: the row, its factor or nothing, its weight or nothing, token, slot."""
    token = torch.from_numpy(sent.token)
    rows, factors = call["x"][token], torch.empty(len(token), 0)
    if call["quant_mode"] == 2:
        smooth = None if call["scales"] is None else _smooth_rows(call, sent)
        rows, factors = quantise.per_row(rows, smooth)
    weights = torch.empty(len(token), 0)
    if call["expert_scales"] is not None:
        slot = torch.from_numpy(sent.slot)
        weights = torch.where(slot < call["K"], call["expert_scales"][token, slot.clamp(max=call["K"] - 1)], 0.0)
    place = torch.from_numpy(np.stack([sent.token, sent.slot], 1).astype(np.int32))
    return [rows, factors, weights, place]


def _smooth_rows(call: Call, sent: plan.Routes) -> torch.Tensor:
    """The smooth factors of each copy; a table without rows for shared experts leaves their copies as they are."""
    smooth: torch.Tensor = call["scales"][torch.from_numpy(sent.factor_row)]
    if len(call["scales"]) == call["moe_expert_num"]:
        smooth[torch.from_numpy(sent.slot) >= call["K"]] = 1
    return smooth


@phase("pull")
def fill_rows(
    call: Call, outputs: Named, packed: torch.Tensor, like: Sequence[torch.Tensor], came: plan.Arrivals
) -> list[torch.Tensor]:
    """Put the received rows, by source in ``packed``, in their order into ``outputs``; return their columns."""
    received = packing.unpack(packed[torch.from_numpy(came.order)], like)
    rows, factors, weights, place = received
    total = came.total
    outputs["expand_x"][:total] = rows
    if call["quant_mode"] == 2:
        outputs["dynamic_scales"][:total] = factors
    if call["expert_scales"] is not None:
        outputs["expand_scales"][:total] = weights
    if call["layout"] == "triplets":
        source = np.repeat(np.arange(len(came.counts)), came.per_rank())[came.order]
        triplets = torch.cat([torch.from_numpy(source.astype(np.int32))[:, None], place], 1)
        outputs["assist_info_for_combine"][: 3 * total] = triplets.flatten()
    fill_nums(call, outputs, came.per_expert())
    return received


def fill_nums(call: Call, outputs: Named, per_expert: plan.Ints) -> None:
    """Fill expert_token_nums with counts or prefix sums."""
    counted = per_expert if call["expert_token_nums_type"] == 1 else np.cumsum(per_expert)
    outputs["expert_token_nums"][: len(counted)] = torch.from_numpy(counted)


def expand_idx(call: Call) -> torch.Tensor:
    """Return, for each pair, how many earlier pairs of this rank have the same expert."""
    return torch.from_numpy(plan.expand_idx(values.ids(call), values.active(call), call["moe_expert_num"]))


def record_waits(call: Call, members: Group, waited_us: list[float]) -> None:
    """Add the microseconds waited for each rank to performance_info, at least one each."""
    info = call["performance_info"]
    if info is not None:
        waits = torch.tensor([int(np.ceil(us)) for us in waited_us], dtype=torch.int64)
        info[torch.tensor(members.members)] += waits.clamp(min=1)


def _fill_counts(call: Call, outputs: Named, came: plan.Arrivals, rank: int) -> None:
    if call["layout"] == "index":
        index = expand_idx(call)
        (outputs["expand_idx"] if "expand_idx" in outputs else outputs["assist_info_for_combine"])[: len(index)] = index
    shown = plan.booked(came, values.topology(call), rank) if call["split_shared"] else came.counts
    outputs["ep_recv_counts"][: shown.size] = torch.from_numpy(plan.prefix_sums(shown))
    if call["tp_world_size"] == 1:
        outputs["tp_recv_counts"][0] = came.total


def share_with_partner(call: Call, outputs: Named, received: Sequence[torch.Tensor], came: plan.Arrivals) -> None:
    """Append the tensor-parallel partner's rows to the own ones."""
    partner = call.partner
    assert partner is not None
    other = 1 - partner.index
    own_sums = outputs["ep_recv_counts"][: came.counts.size]
    both = partner.gather(torch.from_numpy(came.counts))
    totals = [int(n) for n in both.sum((1, 2))]
    theirs = swap(partner, packing.pack(received[:2]), totals[other])
    rows, factors = packing.unpack(theirs, received[:2])
    own, end = came.total, came.total + totals[other]
    outputs["expand_x"][own:end] = rows
    if call["quant_mode"] == 2:
        outputs["dynamic_scales"][own:end] = factors
    outputs["ep_recv_counts"][came.counts.size : 2 * came.counts.size] = partner.gather(own_sums)[other]
    outputs["tp_recv_counts"][:] = torch.tensor(totals)
    fill_nums(call, outputs, both.sum((0, 1)).numpy())


def swap(partner: Group, mine: torch.Tensor, rows: int) -> torch.Tensor:
    """Give the partner ``mine`` and return its tensor, which has ``rows`` rows."""
    own, other = partner.index, 1 - partner.index
    nothing = mine.new_empty((0, *mine.shape[1:]))
    send, receive = [nothing, nothing], [nothing, nothing]
    send[other], receive[other] = mine, mine.new_empty((rows, *mine.shape[1:]))
    send[own] = receive[own] = nothing
    partner.exchange(send, receive)
    return receive[other]
