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
from ...observe.ranges import phase
from ...operators.moe_distribute import accumulate, combine_steps, dispatch_steps, plan, values
from . import routing
from .routing import Routing, Terms
from .session import Session
from .staging import DTYPES, Staging

COUNTS, TAGS, ROWS, KEYS = range(4)  # segments; nobody else reads the keys
_NO_KEYS = np.empty(0, np.int32)


def combine(call: Call, session: Session, waited_us: list[float]) -> tuple[torch.Tensor, ...]:
    """Carry out npu_moe_distribute_combine and _v2."""
    outputs = call.outputs()
    _bring_back(call, session, waited_us, outputs["x"])
    dispatch_steps.record_waits(call, session.members, waited_us)
    return tuple(outputs.values())


def combine_add_rms_norm(call: Call, session: Session, waited_us: list[float]) -> tuple[torch.Tensor, ...]:
    """Carry out npu_moe_distribute_combine_add_rms_norm: combine before it is rounded, add the residual, normalise."""
    outputs = call.outputs()
    total = torch.empty(call["BS"], call["H"], dtype=torch.float32)
    _bring_back(call, session, waited_us, total)
    accumulate.add_rms_norm(call, total, outputs)
    return tuple(outputs.values())


def _bring_back(call: Call, session: Session, waited_us: list[float], out: torch.Tensor) -> None:
    """Fill ``out`` [BS, H] with the sums of the experts' rows."""
    route = routing.of(session, call)
    rows = call["expand_x"]
    if call.partner is not None:
        rows = combine_steps.own_rows(call, session.members, combine_steps.held_rows(call, route.me))
    sequence, offer = session.begin(call), session.offer(call)
    try:
        staging = stage(call, session, route, rows, offer, sequence)
    except _core.CoreMemoryError as lack:
        session.refuse(call, sequence, str(lack))
    session.channel.publish(sequence, offer)
    error = session.meet(call, sequence, offer, waited_us)
    problem = ""
    if error is None:
        problem, terms = find(call, session, route, staging.address(KEYS))
        session.channel.advance(_core.PROGRESS, 2 * sequence + bool(problem))
        if not problem:
            add_up(call, terms, out)
    session.end(sequence)
    staging.release(sequence)
    if error is not None:
        raise error
    hear_verdicts(call, session, sequence, problem)
    session.take_back()


# --- publish -----------------------------------------------------------------------------------------------------------------


@phase("publish")
def stage(call: Call, session: Session, route: Routing, rows: torch.Tensor, offer: _core.Offer, sequence: int) -> Staging:
    """Write what this rank publishes, and its own keys; rows that lie in the window already are published where they are.

    Raises:
        CoreMemoryError: there is not enough memory; nothing has been touched.
    """
    used = route.top.world * route.local_experts
    sums = _true_sums(call, route, values.counts(call))
    total = _last(sums, used)
    row_bytes = call["H"] * rows.element_size()
    slab = session.slabs.holding(rows) if call["comm_quant_mode"] == 0 and rows.is_contiguous() else None
    in_place = slab is not None and total > 0
    tags = total if call["layout"] == "triplets" else 0
    sizes = used * 4, tags * 12, 0 if in_place else total * row_bytes, call["BS"] * route.width * 4
    staging = Staging(session, sizes)
    staging.fill(offer)
    if sums.shape[0]:
        staging.copy_first(COUNTS, sums)
    else:
        staging.ints(COUNTS)[:] = 0
    if tags:
        staging.copy_first(TAGS, values.assist(call))
    if slab is not None and in_place:
        offer.set_segment(ROWS, rows.data_ptr(), total * row_bytes)
        slab.add_reader(session.reading(sequence))
        session.lend(rows, sequence)
    elif call["comm_quant_mode"] == 2:
        _round_trip(rows[:total].contiguous(), staging.address(ROWS))
    else:
        staging.copy_first(ROWS, rows)
    if call.operator.phase == "whole":
        route.check_keys(call, staging.address(KEYS))
    return staging


def _last(sums: torch.Tensor, used: int) -> int:
    """Return the last of the first ``used`` sums, which have been checked; 0 where none are given."""
    if not sums.is_contiguous():
        return int(sums[used - 1])
    return _core.last_sum(sums.data_ptr(), used) if sums.shape[0] else 0


def _true_sums(call: Call, route: Routing, sums: torch.Tensor) -> torch.Tensor:
    """Return the prefix sums of the rows that are there, which the first version of the operators shows otherwise."""
    if not call["split_shared"] or route.me >= route.top.shared_ranks or not len(sums):
        return sums
    counts = plan.counts_from_prefix_sums(sums.tolist(), route.top.world, 1)
    return torch.from_numpy(plan.prefix_sums(plan.unbooked(counts, route.top, route.me)).astype(np.int32))


def _round_trip(rows: torch.Tensor, out: int) -> None:
    """Write the rows as they are after int8 blocks on the wire. Within a host nothing is saved by sending the blocks themselves."""
    num_rows, hidden = rows.shape
    blocks = torch.empty(num_rows, hidden, dtype=torch.int8)
    scales = torch.empty(num_rows, -(-hidden // 8), dtype=rows.dtype)
    dtype = DTYPES[rows.dtype]
    _core.pack_rows(dtype, rows.data_ptr(), num_rows, hidden, blocks.data_ptr(), scales.data_ptr())
    _core.unpack_rows(dtype, blocks.data_ptr(), scales.data_ptr(), num_rows, hidden, out)


# --- find the rows -----------------------------------------------------------------------------------------------------------


def find(call: Call, session: Session, route: Routing, keys: int) -> tuple[str, Terms]:
    """Return what is wrong with the rows that the others hold for this rank, and the terms of every token's sum.

    ``keys``: address of this rank's keys, as `Routing.check_keys` wrote them.
    """
    num_tokens, channel = call["BS"], session.channel
    columns = route.width + (call["shared_expert_x"] is not None)
    terms = route.term_array(num_tokens, columns)
    weights = call["expert_scales"].contiguous()
    row_bytes = call["H"] * call["expand_x"].element_size()
    fault = route.terms.run(
        keys,
        num_tokens,
        weights.data_ptr(),
        channel.sources(COUNTS),
        channel.sources(TAGS) if call["layout"] == "triplets" else None,
        channel.sources(ROWS),
        row_bytes,
        row_bytes,
        terms.address,
        columns,
    )
    return in_words(call, session, route, keys, fault) if fault else "", terms


def in_words(call: Call, session: Session, route: Routing, keys: int, fault: int) -> str:
    """Say what is wrong with the rows that the others hold for this rank, in which the core has found ``fault``."""
    returned, num_keys = _returned(session, route), call["BS"] * route.width
    sent = np.ctypeslib.as_array((ctypes.c_int32 * num_keys).from_address(keys)) if num_keys else _NO_KEYS
    if (returned != route.rows_sent(sent)).any():
        return _wrong_counts(call, route, returned)
    if fault == _core.FAULT_TAG:
        return _wrong_places(call, session, route, returned)
    return f"fault {fault} at pair {route.terms.bad_pair} in the window of the rank with id {route.terms.bad_owner}"


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


def hear_verdicts(call: Call, session: Session, sequence: int, problem: str) -> None:
    """Raise on every rank if any has found rows that are not those of one dispatch."""
    channel = session.channel
    session.wait(call, _core.PROGRESS, 2 * sequence)
    if call.partner is not None:
        combine_steps.everyones_verdict(call, session.members, problem)
    elif any(channel.counter(member, _core.PROGRESS) == 2 * sequence + 1 for member in channel.active):
        verdict(call, session.members, problem)


# --- sum ---------------------------------------------------------------------------------------------------------------------


@phase("sum")
def add_up(call: Call, terms: Terms, out: torch.Tensor) -> None:
    """Fill ``out`` [BS, H], of the rows' dtype or float32, with every token's sum."""
    keep = _add_special(call, terms.array)
    if call["shared_expert_x"] is not None:
        keep += _add_shared(call, terms.array)
    num_tokens, hidden = out.shape
    row_bytes = hidden * out.element_size()
    dtype = call["expand_x"].dtype
    wide = out.dtype != dtype
    _core.combine_rows(DTYPES[dtype], wide, terms.address, num_tokens, terms.array.shape[1], hidden, out.data_ptr(), row_bytes)
    del keep


def _add_special(call: Call, terms: npt.NDArray[Any]) -> list[torch.Tensor]:
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


def _add_shared(call: Call, terms: npt.NDArray[Any]) -> list[torch.Tensor]:
    """Fill in the rows of shared_expert_x, without weight, behind all others."""
    x = call["shared_expert_x"].reshape(call["BS"], call["H"]).contiguous()
    terms["kind"][:, -1] = _core.TERM_NOTHING
    token = np.nonzero(values.active(call).any(1))[0]
    _fill(terms, token, np.full_like(token, terms.shape[1] - 1), x, token, np.float32(1), _core.TERM_ROW)
    return [x]


def _fill(terms: npt.NDArray[Any], token: Any, column: Any, rows: torch.Tensor, row: Any, weight: Any, kind: int) -> None:
    terms["address"][token, column] = rows.data_ptr() + row.astype(np.uint64) * np.uint64(rows.shape[1] * rows.element_size())
    terms["weight"][token, column] = weight
    terms["kind"][token, column] = kind
