"""The golden as a backend: gathers every rank's inputs, runs the formula over all of them, returns this rank's outputs.

For checks and debugging: it moves everything to everybody.
"""

from __future__ import annotations

from typing import Any

from ..agreement import agree
from ..call import Call
from ..errors import ArgumentError
from ..groups import Group
from .base import Outputs


class Reference:
    """The published formula, over all ranks at once."""

    name = "reference"

    def why_not(self, group: Group) -> list[str]:
        """Nothing is needed beyond the process group itself."""
        return []

    def run(self, call: Call) -> Outputs:
        """See `Backend.run`."""
        members = call.group.among(None if call.broken else call.operator.alive(call))
        agree(call, members)
        everybody, mine = _gather(call, members)
        try:
            results = call.operator.golden(everybody, call)
        except ValueError as error:
            raise ArgumentError(f"{call.operator.name}: {error}") from error
        return tuple(tensor for tensor, _ in results[mine])


def _gather(call: Call, members: Group) -> tuple[list[dict[str, Any]], int]:
    """Return the arguments of all ranks, and which of them are this rank's."""
    rows = members.gather_objects(dict(call.args))
    if call.partner is None:
        return rows, members.index
    halves = call.partner.gather_objects(rows)
    return [args for half in halves for args in half], call.partner.index * len(rows) + members.index
