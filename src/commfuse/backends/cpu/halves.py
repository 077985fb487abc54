"""The split path through windows: a setup publishes and returns, its teardown waits for the others and reads their windows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ... import _core
from ...agreement import refuse
from ...call import Call
from ...operators.moe_distribute import dispatch_steps
from ...operators.moe_distribute.flights import InFlight, fill_command, in_flight
from . import combine, dispatch, routing
from .routing import Routing
from .session import Posted, Session
from .staging import Staging

Outputs = tuple[torch.Tensor, ...]


@dataclass(frozen=True, kw_only=True)
class Published(InFlight):
    """A setup whose publication stays until its teardown."""

    posted: Posted
    staging: Staging


def dispatch_setup(call: Call, session: Session, waited_us: list[float]) -> Outputs:
    """Publish this rank's rows; wait for nobody."""
    route = routing.of(session, call)
    sequence, offer = session.begin(call), session.offer(call)
    try:
        staging = dispatch.stage(call, session, route)
    except _core.CoreMemoryError as lack:
        session.refuse(call, sequence, str(lack))
    staging.fill(offer)
    outputs = call.outputs()
    _fill_y(call, outputs["y"], route, staging)
    outputs["expand_idx"].copy_(dispatch_steps.expand_idx(call))
    fill_command(outputs["comm_cmd_info"], call, _fly(call, session, sequence, offer, staging))
    return tuple(outputs.values())


def dispatch_teardown(call: Call, session: Session, waited_us: list[float]) -> Outputs:
    """Take the rows that the others have published for this rank, in their order."""
    flying: Published = in_flight(call.group).popleft()
    try:
        _meet(flying, session)
        route = routing.of(session, flying.setup)
        outputs = dispatch.pull(call, flying.setup, session, route)
    finally:
        _land(flying, session)
    sums = np.empty(route.sort.num_counts, np.int32)
    route.sort.write_running_counts(sums.ctypes.data)
    assist = outputs["assist_info_for_combine"]
    assist[: len(sums)] = torch.from_numpy(sums)[: len(assist)]  # without a token anywhere there is no room, and nothing to say
    return tuple(outputs.values())


def combine_setup(call: Call, session: Session, waited_us: list[float]) -> Outputs:
    """Publish the experts' rows, where they lie if that is in the window; wait for nobody."""
    route = routing.of(session, call)
    sequence, offer = session.begin(call), session.offer(call)
    try:
        staging = combine.stage(call, session, route, call["expand_x"], offer, sequence)
    except _core.CoreMemoryError as lack:
        session.refuse(call, sequence, str(lack))
    outputs = call.outputs()
    outputs["quant_expand_x"].zero_()
    fill_command(outputs["comm_cmd_info"], call, _fly(call, session, sequence, offer, staging))
    return tuple(outputs.values())


def combine_teardown(call: Call, session: Session, waited_us: list[float]) -> Outputs:
    """Sum the rows of this rank's tokens from where they lie.

    What does not fit raises on this rank alone: a peer may be further than this operation by now, or not as far.
    """
    flying: Published = in_flight(call.group).popleft()
    outputs = call.outputs()
    route = routing.of(session, call)
    keys = np.empty((call["BS"], route.width), np.int32)
    try:
        _meet(flying, session)
        route.check_keys(call, keys.ctypes.data)
        problem, terms = combine.find(call, session, route, keys.ctypes.data)
        if not problem:
            combine.add_up(call, terms, outputs["x"])
    finally:
        _land(flying, session)
    refuse(call, problem)
    return tuple(outputs.values())


def _fly(call: Call, session: Session, sequence: int, offer: _core.Offer, staging: Staging) -> int:
    """Publish, note what the teardown needs, and return the number of the operation."""
    posted = session.post(call, sequence, offer)
    in_flight(call.group).append(Published(setup=call, number=posted.number, posted=posted, staging=staging))
    return posted.number


def _meet(flying: Published, session: Session) -> None:
    """Make sure that every rank has published this operation, and accepts it; its segments can be read then."""
    posted = flying.posted
    session.hear(posted.sequence)
    if posted.error is not None:
        raise posted.error
    session.channel.resolve(posted.sequence, posted.offer)


def _land(flying: Published, session: Session) -> None:
    """Say that this rank has read what it needs, unless the group has begun anew meanwhile; give back what it published."""
    session.end(flying.posted.sequence)
    flying.staging.release(flying.posted.sequence)
    session.take_back()


def _fill_y(call: Call, y: torch.Tensor, route: Routing, staging: Staging) -> None:
    """Lay the rows out as the A3 operator does: pair f at row f, then the copies of shared experts; int8 rows with their factor."""
    num_tokens, hidden, top_k = call["BS"], call["H"], call["K"]
    keys = staging.ints(dispatch.KEYS).reshape(num_tokens, route.width)
    token, column = np.nonzero(keys >= 0)
    active = int((keys >= 0).any(1).sum())
    place = torch.from_numpy(
        np.where(column < top_k, token * top_k + column, num_tokens * top_k + (column - top_k) * active + token)
    )
    copies = route.width if call["scales"] is not None else 1
    row = torch.from_numpy(token * copies + (column if copies > 1 else 0))
    y.zero_()
    y[place, :hidden] = staging.view(dispatch.ROWS, (num_tokens * copies, hidden), y.dtype)[row]
    if call["quant_mode"] == 2:
        begin = -(-hidden // 32) * 32
        factors = staging.view(dispatch.FACTORS, (num_tokens * copies,), torch.float32)[row]
        y[place, begin : begin + 4] = factors[:, None].view(torch.int8)
