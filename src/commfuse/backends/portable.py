"""torch.distributed alone: runs on whatever backend the process group has, also across hosts. Slow and right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..agreement import accept, agree, agree_on
from ..call import Call
from ..causes import REMEDY, giving_up
from ..errors import BackendError
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
        """See `Backend.run`. After an exchange that failed or was broken off, the group repeats why: messages may be under way."""
        with giving_up(call.group, call.operator.name, call.partner):
            return self._run(call)

    def _run(self, call: Call) -> Outputs:
        members = call.group.among(call.operator.alive(call))
        waited_us = [0.0] * len(members.members)
        if call.operator.phase == "teardown":
            accept(call)
        elif call.operator.phase == "whole" or call.broken:
            agree(call, members, waited_us)
        return call.operator.steps(call, members, waited_us)

    def repeat(self, call: Call, args: dict[str, Any], bind: Callable[[dict[str, Any]], Call]) -> None:
        """See `Backend.repeat`: the exchanges take far longer than the checks."""

    def agree_on(self, members: Group, subject: str) -> None:
        """See `Backend.agree_on`."""
        agree_on(members, subject)

    def survivors(self, group: Group) -> tuple[int, ...]:
        """See `Backend.survivors`: not without the dead, since the exchanges of a process group do not outlive a peer."""
        raise BackendError(f"group {group.name!r} runs on {self.name}, which cannot go on without a rank: {REMEDY}")

    def reset(self, group: Group) -> None:
        """See `Backend.reset`: not after an exchange has failed."""
        raise BackendError(f"group {group.name!r} runs on {self.name}, which cannot start afresh: {REMEDY}")
