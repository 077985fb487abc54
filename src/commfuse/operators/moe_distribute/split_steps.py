"""The split path over the exchanges of a group: setup posts and returns, teardown receives and finishes.

Operations are matched in call order: every setup has a number, which its ``comm_cmd_info`` carries to its teardown. What is
posted for a peer is one message: how many rows for each of its experts, then the rows.
"""

from __future__ import annotations

import zlib
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ...agreement import Announcement, announce, hear, refuse
from . import accumulate, packing, plan, values
from .combine_steps import arrived, held_rows, travelling, wrong_counts
from .dispatch_steps import columns, expand_idx, fill_rows, routes

if TYPE_CHECKING:
    from ...call import Call
    from ...groups import Group

Outputs = tuple[torch.Tensor, ...]
DEPTH = 8  # setups without their teardown that a group may have
_KINDS = {"npu_moe_distribute_dispatch_setup": 1, "npu_moe_distribute_combine_setup": 2}


@dataclass(frozen=True, kw_only=True)
class InFlight:
    """A setup whose teardown has not come yet."""

    setup: Call
    announced: Announcement
    like: list[torch.Tensor]  # the columns that travel, without rows

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
    number = _post(call, members, sent.counts, like)
    outputs = call.outputs()
    _fill_y(call, outputs["y"], sent, like)
    outputs["expand_idx"].copy_(expand_idx(call))
    _fill_command(outputs["comm_cmd_info"], call, number)
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
    _fill_command(outputs["comm_cmd_info"], call, number)
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


def setup_values(check: Any) -> Any:
    """Add to ``check`` (a function call -> findings) that the group has room for one more setup."""

    def checked(call: Call) -> list[str]:
        if len(in_flight(call.group)) >= DEPTH:
            return [
                f"{DEPTH} setups of this group are under way: must have a teardown, the oldest one's first, before the next setup"
            ]
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
    number, *stamp = call["comm_cmd_info"][:3].tolist()
    if stamp[0] != _KINDS[setup]:
        return [f"comm_cmd_info[1] = {stamp[0]}: must be {_KINDS[setup]}, as {setup} returned it"]
    if stamp[1] != _mark(call.group):
        return [f"comm_cmd_info[2] = {stamp[1]}: must be {_mark(call.group)}, that of this group: the setup was in another one"]
    flying = in_flight(call.group)
    if number not in [one.number for one in flying]:
        return [f"comm_cmd_info[0] = {number}: must be that of a setup under way; each setup has one teardown"]
    oldest = flying[0]
    if number != oldest.number:
        first = oldest.setup.operator.name
        return [f"comm_cmd_info[0] = {number}: must be {oldest.number}, that of {first}: teardowns go in the order of the setups"]
    return _changed(call, oldest.setup)


def _changed(call: Call, setup: Call) -> list[str]:
    """Compare the arguments that both halves have; of tensors only what results depend on."""
    found = []
    for name in (name for name in setup.args if name in call.args):
        value, given = setup.args[name], call.args[name]
        if not isinstance(value, torch.Tensor):
            found += [f"{name} = {given!r}: must be {value!r}, as in {setup.operator.name}"] if given != value else []
        elif (given.shape, given.dtype) != (value.shape, value.dtype):
            found.append(f"{name} = {_kind(given)}: must be {_kind(value)}, as in {setup.operator.name}")
        elif name == "expert_ids" and not torch.equal(given, value):
            found.append(f"{name} = other values: must be those given to {setup.operator.name}")
    return found


def _kind(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _mark(group: Group) -> int:
    """A number that tells this group's operations from those of another, positive and within int32."""
    return zlib.crc32(group.name.encode()) >> 1


def _post(call: Call, members: Group, counts: plan.Ints, like: list[torch.Tensor]) -> int:
    """Post rows, by destination, with their ``counts`` [destination, local expert]; return the number of the operation."""
    rows = packing.pack(like).split([int(n) for n in counts.sum(1)])
    blocks = [
        torch.cat([torch.from_numpy(mine).view(torch.uint8), its.flatten()]) for mine, its in zip(counts, rows, strict=True)
    ]
    announced = announce(call, members, blocks)
    without_rows = [column.new_empty((0, *column.shape[1:])) for column in like]
    in_flight(call.group).append(InFlight(setup=call, announced=announced, like=without_rows))
    return announced.number


def _collect(flying: InFlight, waited_us: list[float]) -> tuple[plan.Ints, torch.Tensor]:
    """Return the counts [source, local expert] and the packed rows, by source, that were posted for this rank."""
    blocks = hear(flying.announced, waited_us)
    begin = flying.setup["e"] * torch.int64.itemsize
    counts = torch.stack([block[:begin].view(torch.int64) for block in blocks])
    width = packing.pack(flying.like).shape[1]
    return counts.numpy(), torch.cat([block[begin:].view(-1, width) for block in blocks])


def _fill_command(info: torch.Tensor, call: Call, number: int) -> None:
    info.zero_()
    info[0], info[1], info[2] = number, _KINDS[call.operator.name], _mark(call.group)


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
