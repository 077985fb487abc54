"""Combine: publish the experts' rows; every token's owner finds its rows in the windows and sums them in float32."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ... import _core
from ...agreement import verdict
from ...call import Call
from ...operators.moe_distribute import accumulate, combine_steps, dispatch_steps, values
from . import routing
from .routing import Routing
from .session import Session
from .staging import DTYPES, Staging

COUNTS, TAGS, ROWS, KEYS = range(4)  # segments; nobody else reads the keys
_Terms = npt.NDArray[Any]


def combine(call: Call, session: Session, waited_us: list[float]) -> tuple[torch.Tensor, ...]:
    """Carry out npu_moe_distribute_combine_v2."""
    route = routing.of(session, call)
    rows = call["expand_x"]
    if call.partner is not None:
        rows = combine_steps.own_rows(call, session.members, combine_steps.held_rows(call, route.me))
    sequence, offer = session.begin(call), session.offer(call)
    try:
        staging = _stage(call, session, route, rows, offer, sequence)
    except _core.CoreMemoryError as lack:
        session.refuse(call, sequence, str(lack))
    session.channel.publish(sequence, offer)
    error = session.meet(call, sequence, offer, waited_us)
    outputs: dict[str, torch.Tensor] = {}
    problem = ""
    if error is None:
        problem, terms = _plan(call, session, route, staging)
        session.channel.advance(_core.PROGRESS, 2 * sequence + bool(problem))
        outputs = call.outputs()
        if not problem:
            _sum(call, terms, outputs["x"])
    session.end(sequence)
    staging.release(sequence)
    if error is not None:
        raise error
    _hear_verdicts(call, session, sequence, problem)
    session.take_back()
    dispatch_steps.record_waits(call, session.members, waited_us)
    return tuple(outputs.values())


# --- publish -----------------------------------------------------------------------------------------------------------------


def _stage(call: Call, session: Session, route: Routing, rows: torch.Tensor, offer: _core.Offer, sequence: int) -> Staging:
    """Write what this rank publishes, and its own keys; rows that lie in the window already are published where they are."""
    sums = values.counts(call)
    used = route.top.world * route.local_experts
    total = int(sums[used - 1]) if len(sums) else 0
    row_bytes = call["H"] * rows.element_size()
    slab = session.slabs.holding(rows) if call["comm_quant_mode"] == 0 and rows.is_contiguous() else None
    in_place = slab is not None and total > 0
    tags = total if call["layout"] == "triplets" else 0
    sizes = used * 4, tags * 12, 0 if in_place else total * row_bytes, call["BS"] * route.width * 4
    staging = Staging(session, sizes)
    staging.fill(offer)
    if len(sums):
        staging.copy_in(COUNTS, sums[:used])
    else:
        staging.ints(COUNTS)[:] = 0
    if tags:
        staging.copy_in(TAGS, values.assist(call)[: 3 * total])
    if slab is not None and in_place:
        offer.set_segment(ROWS, rows.data_ptr(), total * row_bytes)
        slab.readers.append((session.channel, sequence))
        session.lend(rows, sequence)
    elif call["comm_quant_mode"] == 2:
        _round_trip(rows[:total].contiguous(), staging.address(ROWS))
    else:
        staging.copy_in(ROWS, rows[:total])
    route.check_keys(call, staging.address(KEYS))
    return staging


def _round_trip(rows: torch.Tensor, out: int) -> None:
    """Write the rows as they are after int8 blocks on the wire. Within a host nothing is saved by sending the blocks themselves."""
    num_rows, hidden = rows.shape
    blocks = torch.empty(num_rows, hidden, dtype=torch.int8)
    scales = torch.empty(num_rows, -(-hidden // 8), dtype=rows.dtype)
    dtype = DTYPES[rows.dtype]
    _core.pack_rows(dtype, rows.data_ptr(), num_rows, hidden, blocks.data_ptr(), scales.data_ptr())
    _core.unpack_rows(dtype, blocks.data_ptr(), scales.data_ptr(), num_rows, hidden, out)


# --- find the rows -----------------------------------------------------------------------------------------------------------


def _plan(call: Call, session: Session, route: Routing, staging: Staging) -> tuple[str, _Terms]:
    """Return what is wrong with the rows that the others hold for this rank, and the terms of every token's sum."""
    num_tokens, channel = call["BS"], session.channel
    columns = route.width + (call["shared_expert_x"] is not None)
    terms = route.term_array(num_tokens, columns)
    returned = _returned(session, route)
    if (returned != route.rows_sent(staging.ints(KEYS))).any():
        return _wrong_counts(call, route, returned), terms
    weights = call["expert_scales"].contiguous()
    row_bytes = call["H"] * call["expand_x"].element_size()
    fault = route.terms.run(
        staging.address(KEYS),
        num_tokens,
        weights.data_ptr(),
        channel.sources(COUNTS),
        channel.sources(TAGS) if call["layout"] == "triplets" else None,
        channel.sources(ROWS),
        row_bytes,
        row_bytes,
        terms.ctypes.data,
        columns,
    )
    if fault == _core.FAULT_TAG:
        return _wrong_places(call, session, route, returned), terms
    if fault:
        return f"fault {fault} at pair {route.terms.bad_pair} in the window of the rank with id {route.terms.bad_owner}", terms
    return "", terms


def _returned(session: Session, route: Routing) -> npt.NDArray[np.int32]:
    """Return how many rows each key's owner holds for this rank, by owner and key: shared-expert ranks, then MoE experts."""
    sources, world = session.channel.sources(COUNTS), route.top.world
    sums = np.empty((route.num_keys, world), np.int32)
    begin = sums.ctypes.data
    for owner in range(world):
        num_bytes = sources.num_bytes(owner)
        if num_bytes != route.top.local_experts(owner) * world * 4:
            raise _core.CoreError(f"the rank with id {owner} published {num_bytes} bytes of counts")
        _core.copy(begin, sources.address(owner), num_bytes)
        begin += num_bytes
    if route.me:
        before = sums[:, route.me - 1]
    else:
        before = np.concatenate([sums[:1, -1], sums[:-1, -1]])
        before[route.first_rows] = 0
    return np.subtract(sums[:, route.me], before)


def _wrong_counts(call: Call, route: Routing, returned: npt.NDArray[np.int32]) -> str:
    sent = dispatch_steps.routes(call, route.me)
    wide = np.zeros_like(sent.counts)
    shared = route.top.shared_ranks
    wide[:shared, :1] = returned[:shared, None]
    wide[shared:] = returned[shared:].reshape(-1, sent.counts.shape[1])
    return combine_steps.wrong_counts(wide, sent, values.counts_name(call))


def _wrong_places(call: Call, session: Session, route: Routing, returned: npt.NDArray[np.int32]) -> str:
    """Say which row's triplet is not that of a row which this rank has sent."""
    counts, tags = session.channel.sources(COUNTS), session.channel.sources(TAGS)
    found, row, world = [np.empty((0, 3), np.int32)], 0, route.top.world
    for owner in range(world):
        sums, triplets = _ints(counts, owner), _ints(tags, owner).reshape(-1, 3)
        for local in range(route.top.local_experts(owner)):
            stop = int(sums[local * world + route.me])
            found.append(triplets[stop - int(returned[row]) : stop])
            row += 1
    sent = dispatch_steps.routes(call, route.me)
    return combine_steps.wrong_places(torch.from_numpy(np.concatenate(found)), sent, route.me)


def _ints(sources: _core.Sources, owner: int) -> npt.NDArray[np.int32]:
    return np.frombuffer(ctypes.string_at(sources.address(owner), sources.num_bytes(owner)), dtype=np.int32)


def _hear_verdicts(call: Call, session: Session, sequence: int, problem: str) -> None:
    """Raise on every rank if any has found rows that are not those of one dispatch."""
    channel = session.channel
    session.wait(call, _core.PROGRESS, 2 * sequence)
    if call.partner is not None:
        combine_steps.everyones_verdict(call, session.members, problem)
    elif any(channel.counter(member, _core.PROGRESS) == 2 * sequence + 1 for member in range(channel.num_members)):
        verdict(call, session.members, problem)


# --- sum ---------------------------------------------------------------------------------------------------------------------


def _sum(call: Call, terms: _Terms, out: torch.Tensor) -> None:
    keep = _add_special(call, terms)
    if call["shared_expert_x"] is not None:
        keep += _add_shared(call, terms)
    num_tokens, hidden = out.shape
    row_bytes = hidden * out.element_size()
    _core.combine_rows(DTYPES[out.dtype], False, terms.ctypes.data, num_tokens, terms.shape[1], hidden, out.data_ptr(), row_bytes)
    del keep


def _add_special(call: Call, terms: _Terms) -> list[torch.Tensor]:
    """Fill in what copy and constant experts contribute; return the tensors that the terms point into."""
    if call["copy_expert_num"] + call["const_expert_num"] == 0:
        return []
    ids, active = values.ids(call), values.active(call)
    first_copy = call["moe_expert_num"] + call["zero_expert_num"]
    first_const = first_copy + call["copy_expert_num"]
    weights = call["expert_scales"].contiguous().numpy()
    x = call["ori_x"].contiguous()
    token, k = np.nonzero(active & (np.where(active, ids, 0) >= first_copy) & (np.where(active, ids, 0) < first_const))
    _fill(terms, token, k, x, token, weights[token, k], _core.TERM_ROW)
    token, k = np.nonzero(active & (np.where(active, ids, 0) >= first_const))
    if not len(token):
        return [x]
    rows = accumulate.const_rows(call, torch.from_numpy(token), torch.from_numpy(ids[token, k] - first_const)).contiguous()
    _fill(terms, token, k, rows, np.arange(len(token)), weights[token, k], _core.TERM_F32_ROW)
    return [x, rows]


def _add_shared(call: Call, terms: _Terms) -> list[torch.Tensor]:
    """Fill in the rows of shared_expert_x, without weight, behind all others."""
    x = call["shared_expert_x"].reshape(call["BS"], call["H"]).contiguous()
    terms["kind"][:, -1] = _core.TERM_NOTHING
    token = np.nonzero(values.active(call).any(1))[0]
    _fill(terms, token, np.full_like(token, terms.shape[1] - 1), x, token, np.float32(1), _core.TERM_ROW)
    return [x]


def _fill(terms: _Terms, token: Any, column: Any, rows: torch.Tensor, row: Any, weight: Any, kind: int) -> None:
    terms["address"][token, column] = rows.data_ptr() + row.astype(np.uint64) * np.uint64(rows.shape[1] * rows.element_size())
    terms["weight"][token, column] = weight
    terms["kind"][token, column] = kind
