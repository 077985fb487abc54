"""Combine: publish the experts' rows; every token's owner finds its rows in the windows and sums them in float32."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ... import _core
from ...agreement import verdict
from ...call import Call
from ...operators.moe_distribute import accumulate, combine_steps, dispatch_steps, plan, values
from . import routing
from .routing import Routing
from .session import Session
from .staging import DTYPES, Staging

COUNTS, TAGS, ROWS = range(3)  # segments; then what only this rank reads
KEYS = 3


def combine(call: Call, session: Session, waited_us: list[float]) -> tuple[torch.Tensor, ...]:
    """Carry out npu_moe_distribute_combine_v2."""
    route = routing.of(session, call)
    held = _Held(call, route)
    rows = held.rows if call.partner is None else combine_steps._own_rows(call, session.members, held.arrivals())
    sequence, offer = session.begin(call), session.offer(call)
    staging = _stage(call, session, route, held, rows)
    staging.fill(offer)
    if staging.in_place:
        _publish_in_place(session, offer, rows, sequence)
    session.channel.publish(sequence, offer)
    error = session.meet(call, sequence, offer, waited_us)
    if error is None:
        problem, terms = _plan(call, session, route, staging)
        _tell(session, sequence, problem)
        outputs = call.outputs()
        if not problem:
            _sum(call, terms, outputs["x"])
    session.end(sequence)
    staging.release(sequence)
    if error is not None:
        raise error
    _hear(call, session, sequence, problem)
    dispatch_steps.record_waits(call, session.members, waited_us)
    return tuple(outputs.values())
