"""Combine over the exchanges of a group: the portable way."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from ...agreement import verdict
from . import accumulate, packing, plan, quantise, values
from .dispatch_steps import record_waits, routes, swap

if TYPE_CHECKING:
    from ...call import Call
    from ...groups import Group


def combine(call: Call, members: Group, waited_us: list[float]) -> tuple[torch.Tensor, ...]:
    """Carry out npu_moe_distribute_combine and _v2: the experts' rows go back the way they came, the tokens' owners sum them."""
    sent, came = _bring_back(call, members)
    outputs = call.outputs()
    outputs["x"].copy_(accumulate.float32_sum(call, came, sent))
    record_waits(call, members, waited_us)
    return tuple(outputs.values())


def combine_add_rms_norm(call: Call, members: Group, waited_us: list[float]) -> tuple[torch.Tensor, ...]:
    """Carry out npu_moe_distribute_combine_add_rms_norm: combine, add the residual, normalise."""
    sent, came = _bring_back(call, members)
    outputs = call.outputs()
    accumulate.add_rms_norm(call, accumulate.float32_sum(call, came, sent), outputs)
    return tuple(outputs.values())


def _bring_back(call: Call, members: Group) -> tuple[plan.Routes, torch.Tensor]:
    """Return the routes of this rank's copies and, in the same order, the experts' rows for them."""
    held = held_rows(call, members.index)
    sent = routes(call, members.index)
    rows = own_rows(call, members, held)
    like = travelling(call, rows, held)
    returned = members.gather(torch.from_numpy(wide_counts(held, sent))).numpy()[:, members.index]  # [expert side, local expert]
    packed = members.all_to_all(packing.pack(like), held.per_rank(), [int(n) for n in returned.sum(1)])
    columns = packing.unpack(packed, like)
    problem = wrong_counts(returned, sent, "ep_send_counts") or wrong_places(columns[-1], sent, members.index)
    everyones_verdict(call, members, problem)
    return sent, arrived(columns)


def held_rows(call: Call, rank: int) -> plan.Arrivals:
    """Return the order of the rows that this rank holds for others, from the counts that dispatch returned."""
    top = values.topology(call)
    counts = plan.counts_from_prefix_sums(values.counts(call).tolist(), top.world, top.local_experts(rank))
    return plan.arrivals(plan.unbooked(counts, top, rank) if call["split_shared"] else counts)


def travelling(call: Call, rows: torch.Tensor, held: plan.Arrivals) -> list[torch.Tensor]:
    """Return the columns that go back, by destination: rows (or int8 blocks and scales), and their triplets or nothing."""
    back = torch.from_numpy(np.argsort(held.order, kind="stable"))
    place = torch.empty(held.total, 0, dtype=torch.int32)
    if call["layout"] == "triplets":
        place = values.assist(call)[: 3 * held.total].view(-1, 3)[back]
    moved = rows[back]
    return [*(quantise.per_block(moved) if call["comm_quant_mode"] == 2 else (moved,)), place]


def arrived(columns: list[torch.Tensor]) -> torch.Tensor:
    """Return the rows that `travelling` described."""
    return columns[0] if len(columns) == 2 else quantise.from_blocks(columns[0], columns[1])


def wide_counts(held: plan.Arrivals, sent: plan.Routes) -> plan.Ints:
    """Return the counts [destination, local expert] of the rows to return, as wide on every rank."""
    wide = np.zeros_like(sent.counts)
    wide[:, : held.counts.shape[1]] = held.counts
    return wide


def wrong_counts(returned: plan.Ints, sent: plan.Routes, name: str) -> str:
    """Compare what the expert side returns, [rank, local expert], with what this rank's ids and mask announce."""
    wrong = np.argwhere(returned != sent.counts)
    if not len(wrong):
        return ""
    rank, expert = (int(i) for i in wrong[0])
    return (
        f"{name} of the rank with id {rank} returns {returned[rank, expert]} rows of its local expert {expert}, but "
        f"expert_ids and x_active_mask here announce {sent.counts[rank, expert]}: all must be those of one dispatch"
    )


def everyones_verdict(call: Call, members: Group, problem: str) -> None:
    """Raise on every rank of both domains if any rank reports a ``problem``."""
    if call.partner is None:
        verdict(call, members, problem)
        return
    problems = [text for text in members.gather_objects(problem) if text]
    verdict(call, call.partner, problems[0] if problems else "")


def own_rows(call: Call, members: Group, held: plan.Arrivals) -> torch.Tensor:
    """The rows to return; with tensor parallelism both partners' parts of them added up."""
    expand_x: torch.Tensor = call["expand_x"]
    rows = expand_x[: held.total]
    if call.partner is None:
        return rows
    counts = call["tp_send_counts"].tolist()
    everyones_verdict(call, members, _disagreeing_counts(call, counts))
    theirs = expand_x[held.total : held.total + counts[1 - call["tp_rank_id"]]]
    (back,) = packing.unpack(swap(call.partner, packing.pack([theirs]), held.total), [rows])
    total = rows.float() + back.float()
    return ties_away(total, rows.dtype) if call["split_shared"] else total.to(rows.dtype)


def ties_away(rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Round float32 to ``dtype``; to bfloat16 with ties away from zero, as the first version of combine adds partners' rows."""
    if dtype != torch.bfloat16:
        return rows.to(dtype)
    rounded = ((rows.view(torch.int32).long() + 0x8000) & ~0xFFFF).to(torch.int32).view(torch.float32)
    return torch.where(rows.isfinite(), rounded, rows).to(dtype)


def _disagreeing_counts(call: Call, counts: list[int]) -> str:
    assert call.partner is not None
    both = call.partner.gather(torch.tensor(counts)).tolist()
    if both[0] == both[1]:
        return ""
    return f"tp_send_counts = {counts}: must be equal on both partners, which hold {both[0]} and {both[1]}"


def wrong_places(triplets: torch.Tensor, sent: plan.Routes, me: int) -> str:
    """Compare the triplets that came with the rows with the pairs that this rank, ``me``, waits for; '' if they are those."""
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
        f"assist_info_for_combine of the rank with id {rank} says (rank, token, slot) = {tuple(triplets[i].tolist())} for a row that "
        f"is {tuple(int(v) for v in expected[i])}: it must be that of the same dispatch, unchanged"
    )
