"""The split path over the exchanges of a group: setup posts and returns, teardown receives and finishes.

Operations are matched in call order: every setup has a number, which its ``comm_cmd_info`` carries to its teardown.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ...agreement import Announcement, announce, hear
from . import accumulate, packing, plan, values
from .combine_steps import arrived, everyones_verdict, held_rows, travelling, wrong_counts
from .dispatch_steps import columns, expand_idx, fill_rows, routes

if TYPE_CHECKING:
    from ...call import Call
    from ...groups import Group, Posted

Outputs = tuple[torch.Tensor, ...]
DEPTH = 8  # setups without their teardown that a group may have
_KINDS = {"npu_moe_distribute_dispatch_setup": 1, "npu_moe_distribute_combine_setup": 2}


@dataclass(frozen=True, kw_only=True)
class InFlight:
    """A setup whose teardown has not come yet."""

    setup: Call
    announced: Announcement
    posted: Sequence[Posted]
    counts: plan.Ints  # [destination, local expert] of the rows sent
    like: list[torch.Tensor]  # the columns that travel
    own: torch.Tensor  # the packed rows that stay here

    @property
    def number(self) -> int:
        """Its place among the calls of the group."""
        return self.announced.number


def in_flight(group: Group) -> deque[InFlight]:
    """The setups of a group without their teardown, oldest first."""
    flying: deque[InFlight] = group.shared.setdefault("in_flight", deque())
    return flying


def both_halves(call: Call) -> dict[str, Any]:
    """Return the arguments of a teardown together with those of its setup, which is still under way."""
    return {**in_flight(call.group)[0].setup.args, **call.args}


def dispatch_setup(call: Call, members: Group, waited_us: list[float]) -> Outputs:
    """Post this rank's rows for every other; wait for nobody."""
    sent = routes(call, members.index)
    like = columns(call, sent)
    number = _post(call, members, sent.counts, sent.per_rank(), like)
    outputs = call.outputs()
    _fill_y(call, outputs["y"], sent, like)
    outputs["expand_idx"].copy_(expand_idx(call))
    _fill_command(outputs["comm_cmd_info"], call, number)
    return tuple(outputs.values())


def dispatch_teardown(call: Call, members: Group, waited_us: list[float]) -> Outputs:
    """Receive the rows that the other ranks' setups have posted, and order them."""
    flying = in_flight(call.group).popleft()
    counts, packed = _collect(flying, members, waited_us)
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
    number = _post(call, members, wide, held.per_rank(), like)
    outputs = call.outputs()
    outputs["quant_expand_x"].zero_()
    _fill_command(outputs["comm_cmd_info"], call, number)
    return tuple(outputs.values())


def combine_teardown(call: Call, members: Group, waited_us: list[float]) -> Outputs:
    """Receive the rows of this rank's tokens and sum them."""
    flying = in_flight(call.group).popleft()
    returned, packed = _collect(flying, members, waited_us)
    sent = routes(call, members.index)
    everyones_verdict(call, members, wrong_counts(returned, sent))
    outputs = call.outputs()
    rows = arrived(packing.unpack(packed, flying.like))
    outputs["x"].copy_(accumulate.float32_sum(call, rows, sent))
    return tuple(outputs.values())


def setup_values(check: Any) -> Any:
    """Add to ``check`` (a function call -> findings) that the group has room for one more setup."""

    def checked(call: Call) -> list[str]:
        if len(in_flight(call.group)) >= DEPTH:
            return [f"{call.operator.name}: {DEPTH} setups of this group wait for their teardown; call the oldest one's first"]
        found: list[str] = check(call)
        return found

    return checked


def teardown_values(check: Any) -> Any:
    """Add to ``check`` that this is the oldest setup's teardown, with the same arguments."""

    def checked(call: Call) -> list[str]:
        found: list[str] = _order(call) or check(call)
        return found

    return checked


def _order(call: Call) -> list[str]:
    setup = call.operator.name.replace("teardown", "setup")
    if call["comm_cmd_info"].numel() < 2:
        return [f"comm_cmd_info has {call['comm_cmd_info'].numel()} entries: must be what {setup} returned"]
    number, kind = call["comm_cmd_info"][:2].tolist()
    if kind != _KINDS[setup]:
        return [f"comm_cmd_info[1] = {kind}: must be what {setup} returned"]
    flying = in_flight(call.group)
    if not flying:
        return [f"comm_cmd_info[0] = {number}: {setup} number {number} is not under way; each setup has one teardown"]
    oldest = flying[0]
    if number != oldest.number:
        first = oldest.setup.operator.name
        return [f"comm_cmd_info[0] = {number}: must be {oldest.number}, that of {first}: teardowns go in the order of the setups"]
    return [
        f"{name} = {call.args[name]!r}: must be {value!r}, as in {setup}"
        for name, value in oldest.setup.args.items()
        if not isinstance(value, torch.Tensor) and name in call.args and call.args[name] != value
    ]


def _post(call: Call, members: Group, counts: plan.Ints, per_rank: list[int], like: list[torch.Tensor]) -> int:
    announced = announce(call, members)
    blocks = list(packing.pack(like).split(per_rank))
    posted = [members.post(list(torch.from_numpy(counts)), announced.tag), members.post(blocks, announced.tag)]
    in_flight(call.group).append(
        InFlight(setup=call, announced=announced, posted=posted, counts=counts, like=like, own=blocks[members.index])
    )
    return announced.number


def _collect(flying: InFlight, members: Group, waited_us: list[float]) -> tuple[plan.Ints, torch.Tensor]:
    """Return the counts [source, local expert] and the packed rows, by source, that were posted for this rank."""
    hear(flying.announced, waited_us)
    tag = flying.announced.tag
    counts = torch.zeros((len(members.members), flying.counts.shape[1]), dtype=torch.int64)
    members.receive(list(counts), tag, waited_us)
    counts[members.index] = torch.from_numpy(flying.counts[members.index])
    per_rank = [int(n) for n in counts.sum(1)]
    packed = flying.own.new_empty((sum(per_rank), flying.own.shape[1]))
    parts = list(packed.split(per_rank))
    members.receive(parts, tag, waited_us)
    parts[members.index].copy_(flying.own)
    for posted in flying.posted:
        posted.wait()
    return counts.numpy(), packed


def _fill_command(info: torch.Tensor, call: Call, number: int) -> None:
    info.zero_()
    info[0], info[1] = number, _KINDS[call.operator.name]


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
