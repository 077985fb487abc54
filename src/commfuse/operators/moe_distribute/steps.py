"""Dispatch and combine over the exchanges of a group: the portable way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from ... import config
from ...agreement import verdict
from . import accumulate, packing, plan, quantise, values

if TYPE_CHECKING:
    from ...call import Call
    from ...groups import Group


def dispatch_v2(call: Call, members: Group, waited_us: list[float]) -> tuple[torch.Tensor, ...]:
    """Carry out npu_moe_distribute_dispatch_v2: counts, then rows, then the order of the receiver."""
    top = values.topology(call)
    sent = plan.routes(values.ids(call), values.active(call), top, members.index)
    came = _counts_for_me(sent, top, members)
    like = _columns(call, sent)
    packed = members.all_to_all(packing.pack(like), sent.per_rank(), came.per_rank())
    kept = packed[torch.from_numpy(came.order)]
    columns = packing.unpack(kept, like)
    outputs = call.outputs()
    _fill(call, outputs, columns, came, top)
    if call.partner is not None:
        _share_with_partner(call, outputs, columns, came)
    _record_waits(call, members, waited_us)
    return tuple(outputs)


def combine_v2(call: Call, members: Group, waited_us: list[float]) -> tuple[torch.Tensor, ...]:
    """Carry out npu_moe_distribute_combine_v2: the experts' rows go back the way they came, the tokens' owners sum them."""
    top = values.topology(call)
    held = plan.arrivals_from_prefix_sums(call["ep_send_counts"].tolist(), top.world, top.local_experts(members.index))
    sent = plan.routes(values.ids(call), values.active(call), top, members.index)
    rows = _own_rows(call, members, held)
    came = _return_rows(call, members, held, sent, rows, top)
    outputs = call.outputs()
    accumulate.sum_rows(call, came, sent, outputs[0])
    _record_waits(call, members, waited_us)
    return tuple(outputs)


def _counts_for_me(sent: plan.Routes, top: plan.Topology, members: Group) -> plan.Arrivals:
    everyone = members.gather(torch.from_numpy(sent.counts)).numpy()  # [source, destination, local expert]
    return plan.arrivals(everyone[:, members.index, : top.local_experts(members.index)])


def _columns(call: Call, sent: plan.Routes) -> list[torch.Tensor]:
    """What travels with each row: the row, its factor or nothing, its weight or nothing, token, slot."""
    token = torch.from_numpy(sent.token)
    rows, factors = call["x"][token], torch.empty(len(token), 0)
    if call["quant_mode"] == 2:
        smooth = None if call["scales"] is None else call["scales"][torch.from_numpy(sent.factor_row)]
        rows, factors = quantise.per_row(rows, smooth)
    weights = torch.empty(len(token), 0)
    if call["expert_scales"] is not None:
        slot = torch.from_numpy(sent.slot)
        weights = torch.where(slot < call["K"], call["expert_scales"][token, slot.clamp(max=call["K"] - 1)], 0.0)
    place = torch.from_numpy(np.stack([sent.token, sent.slot], 1).astype(np.int32))
    return [rows, factors, weights, place]


def _fill(
    call: Call, outputs: list[torch.Tensor], columns: Sequence[torch.Tensor], came: plan.Arrivals, top: plan.Topology
) -> None:
    rows, factors, weights, place = columns
    expand_x, dynamic_scales, assist, nums, ep_counts, tp_counts, expand_scales = outputs
    total = came.total
    expand_x[:total] = rows
    if call["quant_mode"] == 2:
        dynamic_scales[:total] = factors
    if call["expert_scales"] is not None:
        expand_scales[:total] = weights
    if call.product == config.A2:
        first = plan.expand_idx(values.ids(call), values.active(call), top.first_special)
        assist[: len(first)] = torch.from_numpy(first)
    else:
        source = np.repeat(np.arange(top.world), came.per_rank())[came.order]
        triplets = torch.cat([torch.from_numpy(source.astype(np.int32))[:, None], place], 1)
        assist[: 3 * total] = triplets.flatten()
    per_expert = came.per_expert()
    _fill_nums(call, nums, per_expert)
    ep_counts[: came.counts.size] = torch.from_numpy(came.prefix_sums())
    if call["tp_world_size"] == 1:
        tp_counts[0] = total


def _fill_nums(call: Call, nums: torch.Tensor, per_expert: plan.Ints) -> None:
    counted = per_expert if call["expert_token_nums_type"] == 1 else np.cumsum(per_expert)
    nums[: len(counted)] = torch.from_numpy(counted)


def _share_with_partner(call: Call, outputs: list[torch.Tensor], columns: Sequence[torch.Tensor], came: plan.Arrivals) -> None:
    """Append the tensor-parallel partner's rows to the own ones."""
    partner = call.partner
    assert partner is not None
    other = 1 - partner.index
    expand_x, dynamic_scales, _, nums, ep_counts, tp_counts, _ = outputs
    both = partner.gather(torch.from_numpy(came.counts))
    totals = [int(n) for n in both.sum((1, 2))]
    theirs = _swap(partner, packing.pack(columns[:2]), totals[other])
    rows, factors = packing.unpack(theirs, columns[:2])
    own, end = came.total, came.total + totals[other]
    expand_x[own:end] = rows
    if call["quant_mode"] == 2:
        dynamic_scales[own:end] = factors
    ep_counts[came.counts.size : 2 * came.counts.size] = torch.from_numpy(plan.arrivals(both[other].numpy()).prefix_sums())
    tp_counts[:] = torch.tensor(totals)
    _fill_nums(call, nums, both.sum((0, 1)).numpy())


def _swap(partner: Group, mine: torch.Tensor, rows: int) -> torch.Tensor:
    """Give the partner ``mine`` and return its tensor, which has ``rows`` rows."""
    own, other = partner.index, 1 - partner.index
    parts = [mine.new_empty((0, *mine.shape[1:]))] * 2
    send, receive = list(parts), list(parts)
    send[other] = mine
    receive[other] = mine.new_empty((rows, *mine.shape[1:]))
    send[own] = receive[own] = parts[0]
    partner.exchange(send, receive)
    return receive[other]


def _own_rows(call: Call, members: Group, held: plan.Arrivals) -> torch.Tensor:
    """The rows to return; with tensor parallelism both partners' parts of them added up."""
    expand_x: torch.Tensor = call["expand_x"]
    rows = expand_x[: held.total]
    if call.partner is None:
        return rows
    counts = call["tp_send_counts"].tolist()
    _everyones_verdict(call, members, _disagreeing_counts(call, counts))
    theirs = expand_x[held.total : held.total + counts[1 - call["tp_rank_id"]]]
    (back,) = packing.unpack(_swap(call.partner, packing.pack([theirs]), held.total), [rows])
    return (rows.float() + back.float()).to(rows.dtype)


def _disagreeing_counts(call: Call, counts: list[int]) -> str:
    assert call.partner is not None
    both = call.partner.gather(torch.tensor(counts)).tolist()
    if both[0] == both[1]:
        return ""
    return f"tp_send_counts = {counts}: must be equal on both partners, which hold {both[0]} and {both[1]}"


def _return_rows(
    call: Call, members: Group, held: plan.Arrivals, sent: plan.Routes, rows: torch.Tensor, top: plan.Topology
) -> torch.Tensor:
    """Send each row back to its owner; return the rows of this rank's tokens in the order of ``sent``."""
    back = torch.from_numpy(np.argsort(held.order, kind="stable"))
    place = call["assist_info_for_combine"][: 3 * held.total]
    triplets = place.view(-1, 3)[back] if call.product != config.A2 else place.new_empty(held.total, 0)
    like = [*_on_the_wire(call, rows[back]), triplets]
    padded = np.zeros((top.world, sent.counts.shape[1]), dtype=np.int64)
    padded[:, : held.counts.shape[1]] = held.counts
    returned = members.gather(torch.from_numpy(padded)).numpy()[:, members.index]  # [expert side, local expert]
    packed = members.all_to_all(packing.pack(like), held.per_rank(), [int(n) for n in returned.sum(1)])
    columns = packing.unpack(packed, like)
    problem = _wrong_counts(returned, sent) or _wrong_places(columns[-1], sent, members.index)
    _everyones_verdict(call, members, problem)
    return columns[0] if len(columns) == 2 else quantise.from_blocks(columns[0], columns[1])


def _everyones_verdict(call: Call, members: Group, problem: str) -> None:
    if call.partner is None:
        verdict(call, members, problem)
        return
    problems = [text for text in members.gather_objects(problem) if text]
    verdict(call, call.partner, problems[0] if problems else "")


def _on_the_wire(call: Call, rows: torch.Tensor) -> list[torch.Tensor]:
    return list(quantise.per_block(rows)) if call["comm_quant_mode"] == 2 else [rows]


def _wrong_counts(returned: plan.Ints, sent: plan.Routes) -> str:
    wrong = np.argwhere(returned != sent.counts)
    if not len(wrong):
        return ""
    rank, expert = (int(i) for i in wrong[0])
    return (
        f"ep_send_counts of the rank with id {rank} returns {returned[rank, expert]} rows of its local expert {expert}, but expert_ids "
        f"and x_active_mask here announce {sent.counts[rank, expert]}: both must be those of one dispatch"
    )


def _wrong_places(triplets: torch.Tensor, sent: plan.Routes, me: int) -> str:
    if triplets.shape[1] == 0:
        return ""
    source = np.full_like(sent.token, me)
    expected = np.stack([source, sent.token, sent.slot], 1)
    wrong = np.nonzero((triplets.numpy() != expected).any(1))[0]
    if not len(wrong):
        return ""
    i = int(wrong[0])
    rank = int(np.searchsorted(np.cumsum(sent.per_rank()), i, side="right"))
    return (
        f"assist_info_for_combine of the rank with id {rank} says (rank, token, slot) = {tuple(triplets[i].tolist())} for a row that is "
        f"{tuple(int(v) for v in expected[i])}: it must be that of the same dispatch, unchanged"
    )


def _record_waits(call: Call, members: Group, waited_us: list[float]) -> None:
    info = call["performance_info"]
    if info is not None:
        waits = torch.tensor([int(np.ceil(us)) for us in waited_us], dtype=torch.int64)
        info[torch.tensor(members.members)] += waits.clamp(min=1)
