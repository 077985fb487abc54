"""The whole way of a call: bind its arguments, find its group, take the group's backend, run."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import torch

from . import backends, groups, repeats
from .call import Call, bind
from .errors import ArgumentError, GroupError
from .observe.calls import ended
from .spec.model import Operator

listeners: list[Callable[[Call], None]] = []  # told of every call that is about to run, in order


def run(operator: Operator, args: dict[str, Any]) -> tuple[torch.Tensor | None, ...]:
    """Carry out one call of ``operator``; ``args`` holds every argument by name.

    Raises:
        CommfuseError: see `errors`; a wrong argument raises on every rank of the group, before any row is sent.
    """
    if not listeners:
        outputs = repeats.run(operator.name, args[operator.group], args)
        if outputs is not None:
            return outputs
    try:
        group = groups.resolve(args[operator.group])
    except GroupError as error:
        raise GroupError(f"{operator.name}: {operator.group}: {error}") from None
    call = bind(operator, args, group, groups.resolve)
    members = group.among(operator.alive(call))
    if group.rank not in members.members:  # its own elastic_info says so: nobody waits for it
        found = "".join(f"\n  {text}" for text in call.broken)
        raise ArgumentError(f"{operator.name}: refused on rank {group.rank} of {group.size}:{found}")
    for listener in listeners:
        listener(call)
    with_grad = torch.is_grad_enabled()
    begin = time.perf_counter_ns()
    torch._C._set_grad_enabled(False)  # torch.no_grad and, below, a range cost more than all checks of a repeated call
    try:
        backend = backends.of(members)
        if not torch.autograd._profiler_enabled():
            outputs = backend.run(call)
        else:
            with torch.profiler.record_function(f"commfuse::{operator.name}"):
                outputs = backend.run(call)
    except BaseException as error:
        ended(call, begin, error=error)
        raise
    finally:
        torch._C._set_grad_enabled(with_grad)
    ended(call, begin, backend.name)
    repeats.of(group, operator.name).learn(
        backend, call, args, functools.partial(bind, operator, group=group, partner_of=groups.resolve)
    )
    return outputs
