"""Windows that all ranks of a host map: publish once, pull straight into place."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeVar

from ...agreement import accept
from ...call import Call
from ...errors import ExchangeError
from ...groups import Group
from ..base import Outputs
from . import host
from .leaving import LeftOut

if TYPE_CHECKING:
    from .domain import Domain
    from .repeat import Repeat
    from .session import Path

_PATHS = {  # module and function, loaded with the first call: they need the core
    "npu_moe_distribute_dispatch_v2": ("dispatch", "dispatch"),
    "npu_moe_distribute_combine_v2": ("combine", "combine"),
    "npu_moe_distribute_combine_add_rms_norm": ("combine", "combine_add_rms_norm"),
    "npu_moe_distribute_dispatch_setup": ("halves", "dispatch_setup"),
    "npu_moe_distribute_dispatch_teardown": ("halves", "dispatch_teardown"),
    "npu_moe_distribute_combine_setup": ("halves", "combine_setup"),
    "npu_moe_distribute_combine_teardown": ("halves", "combine_teardown"),
    "npu_moe_distribute_dispatch": ("dispatch", "dispatch"),
    "npu_moe_distribute_combine": ("combine", "combine"),
    "npu_gmm_alltoallv": ("gmm_alltoallv", "gmm_alltoallv"),
    "npu_alltoallv_gmm": ("gmm_alltoallv", "alltoallv_gmm"),
    "npu_all_gather_base_mm": ("all_gather_mm", "all_gather_base_mm"),
    "npu_mm_reduce_scatter_base": ("all_gather_mm", "mm_reduce_scatter_base"),
    "npu_mm_all_reduce_base": ("all_gather_mm", "mm_all_reduce_base"),
    "_npu_distribute_barrier": ("all_gather_mm", "distribute_barrier"),
}
_paths: dict[str, Path] = {}
_T = TypeVar("_T")


def window_operators() -> tuple[str, ...]:
    """Return the operators whose rows move through windows."""
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
        phase = call.operator.phase
        if phase == "teardown":
            accept(call)
        members = call.group.among(call.operator.alive(call))
        domain = _domain(members)
        waited_us = [0.0] * len(members.members)
        session = domain.whole if phase == "whole" else domain.halves

        def carry_out() -> Outputs:
            if call.broken or call.partner is not None:
                session.agree(call, waited_us)
            return _path(call.operator.name)(call, session, waited_us)

        with domain.carrying_out(call.operator.name):
            return _with(domain, call, members, carry_out)

    def repeat(self, call: Call, args: dict[str, Any], bind: Callable[[dict[str, Any]], Call]) -> Repeat | None:
        """See `Backend.repeat`."""
        from . import repeat

        return repeat.make(call, bind, args)

    def agree_on(self, members: Group, subject: str) -> None:
        """See `Backend.agree_on`."""
        from . import session

        domain = _domain(members)
        with domain.carrying_out(subject):
            call = session.subject(subject, members)
            _with(domain, call, members, lambda: domain.whole.agree(call))

    def survivors(self, group: Group) -> tuple[int, ...]:
        """See `Backend.survivors`."""
        from . import align

        domain = _domain(group)
        with domain.carrying_out("commfuse.alive"):
            return align.survivors(domain, "commfuse.alive")

    def reset(self, group: Group) -> None:
        """See `Backend.reset`."""
        from . import align

        domain = _domain(group)
        with domain.carrying_out("commfuse.reset"):
            align.agree(domain, "commfuse.reset", group)
            domain.seat(group)


def _with(domain: Domain, call: Call, members: Group, carry_out: Callable[[], _T]) -> _T:
    """Carry out what ``members`` do together; once more, when others had gone on without this rank and take it in again."""
    while True:
        try:
            domain.attend(call, members)
            return carry_out()
        except LeftOut as found:
            if call.operator.phase == "teardown":
                raise ExchangeError(domain.about(call.operator.name, f"its setup is void: {found}")) from None


def _domain(members: Group) -> Domain:
    """Return the windows of these ranks; collective where they have not joined yet."""
    from . import domain

    return domain.of(members)


def _path(operator: str) -> Path:
    path = _paths.get(operator)
    if path is None:
        module, function = _PATHS[operator]
        path = _paths[operator] = getattr(import_module(f".{module}", __package__), function)
    return path
