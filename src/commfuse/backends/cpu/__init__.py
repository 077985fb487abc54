"""Windows that all ranks of a host map: publish once, pull straight into place.

What has no window path yet runs over the process group, as the portable backend does it; its calls keep their place in the order of
all calls, and are compared, through the windows.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from ...agreement import accept
from ...call import Call
from ...groups import Group
from ..base import Outputs
from . import host

if TYPE_CHECKING:
    from .session import Session

_PATHS = {"npu_moe_distribute_dispatch_v2": "dispatch", "npu_moe_distribute_combine_v2": "combine"}


def window_operators() -> tuple[str, ...]:
    """Return the operators whose rows move through windows; all others move theirs over the process group."""
    return tuple(_PATHS)


class Cpu:
    """Ranks of one host, CPU tensors."""

    name = "cpu"

    def why_not(self, group: Group) -> list[str]:
        """See `Backend.why_not`. That the ranks share a host is found when they join (see `place`)."""
        return host.missing()

    def place(self) -> str:
        """Return where this process is; ranks of different places cannot use this backend together."""
        return host.identity()

    def run(self, call: Call) -> Outputs:
        """See `Backend.run`."""
        call = _on_cpu(call)
        members = call.group.among(call.operator.alive(call))
        session = members.shared.get("windows", {}).get(members.members) or _join(members)
        waited_us = [0.0] * len(members.members)
        with session.carrying_out(call):
            path = session.paths.get(call.operator.name)
            if path is not None and not call.broken and call.partner is None:
                return path(call, session, waited_us)
            if call.operator.phase == "teardown":
                accept(call)
                session.hear()
            elif call.operator.phase == "setup" and not call.broken:
                session.announce(call)
            else:
                session.agree(call, waited_us)
            if path is not None:
                return path(call, session, waited_us)
        return call.operator.steps(call, members, waited_us)


def _join(members: Group) -> Session:
    """Make the windows of these ranks known to each other; collective."""
    from . import combine, dispatch, session  # the core is loaded with the first call

    modules = {"dispatch": dispatch.dispatch, "combine": combine.combine}
    made = session.of(members)
    made.paths = {operator: modules[path] for operator, path in _PATHS.items()}
    return made


def _on_cpu(call: Call) -> Call:
    """Refuse tensors that are elsewhere: the core takes addresses."""
    found = [
        f"{name} is on {value.device}: must be on the CPU with the cpu backend"
        for name, value in call.args.items()
        if isinstance(value, torch.Tensor) and not value.is_cpu
    ]
    return replace(call, broken=(*call.broken, *found)) if found else call
