"""The golden as a backend: gathers every rank's inputs, runs the formula over all of them, returns this rank's outputs.

For checks and debugging: it moves everything to everybody.
"""

from __future__ import annotations

from typing import Any

from ..agreement import accept, agree
from ..call import Call
from ..errors import ArgumentError
from ..groups import Group
from .base import Outputs
from .portable import Portable


class Reference(Portable):
    """The published formula, over all ranks at once."""

    name = "reference"

    def _run(self, call: Call) -> Outputs:
        if call.operator.phase == "setup":  # it must not wait, so it posts as portable does
            return super()._run(call)
        if call.operator.phase == "teardown":
            accept(call)
            args = call.operator.golden_args(call)
            super()._run(call)  # takes the peers' messages off the line and finds what does not match
        members = call.group.among(call.operator.alive(call))
        if call.operator.phase == "whole":
            agree(call, members)
            args = call.operator.golden_args(call)
        return self._golden(call, members, args)

    def _golden(self, call: Call, members: Group, args: dict[str, Any]) -> Outputs:
        everybody, mine = _gather(call, members, args)
        try:
            results = call.operator.golden(everybody, call)
        except ValueError as error:
            raise ArgumentError(f"{call.operator.name}: {error}") from error
        return tuple(tensor for tensor, _ in results[mine])


def _gather(call: Call, members: Group, args: dict[str, Any]) -> tuple[list[dict[str, Any]], int]:
    """Return the arguments of all ranks, and which of them are this rank's."""
    rows = members.gather_objects(args)
    if call.partner is None:
        return rows, members.index
    halves = call.partner.gather_objects(rows)
    return [args for half in halves for args in half], call.partner.index * len(rows) + members.index
