"""Setups whose teardown has not come yet: their order, their numbers, and what a teardown must have in common with its setup.

Operations are matched in call order: every setup has a number, which its ``comm_cmd_info`` carries to its teardown.
"""

from __future__ import annotations

import zlib
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from ...call import Call
    from ...groups import Group

DEPTH = 8  # setups without their teardown that a group may have
_KINDS = {"npu_moe_distribute_dispatch_setup": 1, "npu_moe_distribute_combine_setup": 2}


@dataclass(frozen=True, kw_only=True)
class InFlight:
    """A setup whose teardown has not come yet, and its number among the calls of the group; backends add what they need."""

    setup: Call
    number: int


def in_flight(group: Group) -> deque[Any]:
    """The setups (`InFlight`) of a group without their teardown, oldest first."""
    flying: deque[Any] = group.shared.setdefault("in_flight", deque())
    return flying


def both_halves(call: Call) -> dict[str, Any]:
    """Return the arguments of a teardown together with those of its setup, which is still under way."""
    return {**in_flight(call.group)[0].setup.args, **call.args}


def fill_command(info: torch.Tensor, call: Call, number: int) -> None:
    """Write which operation this is into a setup's ``comm_cmd_info``."""
    info.zero_()
    info[0], info[1], info[2] = number, _KINDS[call.operator.name], _mark(call.group)


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
