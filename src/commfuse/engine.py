"""The whole way of a call: bind its arguments, find its group, take the group's backend, run."""

from __future__ import annotations

from typing import Any

import torch

from . import backends, groups
from .call import bind
from .spec.model import Operator


def run(operator: Operator, args: dict[str, Any]) -> tuple[torch.Tensor | None, ...]:
    """Carry out one call of ``operator``; ``args`` holds every argument by name.

    Raises:
        CommfuseError: see `errors`; a wrong argument raises on every rank of the group, before any row is sent.
    """
    group = groups.resolve(args[operator.group])
    call = bind(operator, args, group, groups.resolve)
    members = group.among(None if call.broken else operator.alive(call))
    with torch.no_grad(), torch.profiler.record_function(f"commfuse::{operator.name}"):
        return backends.of(members).run(call)
