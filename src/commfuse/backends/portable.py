"""torch.distributed alone: runs on whatever backend the process group has, also across hosts. Slow and right."""

from __future__ import annotations

from ..agreement import accept, agree
from ..call import Call
from ..groups import Group
from .base import Outputs


class Portable:
    """Every operator through its ``steps``, over point-to-point exchanges of the group."""

    name = "portable"

    def why_not(self, group: Group) -> list[str]:
        """Nothing is needed beyond the process group itself."""
        return []

    def place(self) -> str:
        """See `Backend.place`: anywhere."""
        return ""

    def run(self, call: Call) -> Outputs:
        """See `Backend.run`."""
        members = call.group.among(call.operator.alive(call))
        waited_us = [0.0] * len(members.members)
        if call.operator.phase == "teardown":
            accept(call)
        elif call.operator.phase == "whole" or call.broken:
            agree(call, members, waited_us)
        return call.operator.steps(call, members, waited_us)
