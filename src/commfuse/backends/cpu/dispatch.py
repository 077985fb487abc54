"""Dispatch: publish keys and rows once; pull this rank's rows from every window, in their order."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ... import _core, config
from ...call import Call
from ...observe.ranges import phase
from ...operators.moe_distribute import dispatch_steps, plan
from . import routing
from .routing import Routing
from .session import Session
from .staging import DTYPES, Staging

KEYS, ROWS, FACTORS, WEIGHTS = range(4)  # segments
_Outputs = dict[str, torch.Tensor]


def dispatch(call: Call, session: Session, waited_us: list[float]) -> tuple[torch.Tensor, ...]:
    """Carry out npu_moe_distribute_dispatch and _v2."""
    route = routing.of(session, call)
    sequence, offer = session.begin(call), session.offer(call)
    try:
        staging = stage(call, session, route)
    except _core.CoreMemoryError as lack:
        session.refuse(call, sequence, str(lack))
    staging.fill(offer)
    session.channel.publish(sequence, offer)
    error = session.meet(call, sequence, offer, waited_us)
    outputs: _Outputs = {}
    if error is None:
        outputs = pull(call, call, session, route)
        _fill_counts(call, session, route, outputs)
    session.end(sequence)
    staging.release(sequence)
    if error is not None:
        raise error
    if call.partner is not None:
        _share(call, outputs, route)
    dispatch_steps.record_waits(call, session.members, waited_us)
    return tuple(outputs.values())


# --- publish -----------------------------------------------------------------------------------------------------------------


@phase("publish")
def stage(call: Call, session: Session, route: Routing) -> Staging:
    """Write what this rank publishes.

    Raises:
        CoreMemoryError: there is not enough memory; nothing has been touched.
    """
    num_tokens, hidden, quantised = call["BS"], call["H"], call["quant_mode"] == 2
    copies = route.width if call["scales"] is not None else 1  # smooth factors belong to an expert: a row for each copy
    rows = num_tokens * copies
    staging = Staging(
        session,
        (
            num_tokens * route.width * 4,
            rows * hidden * (1 if quantised else call["x"].element_size()),
            rows * 4 if quantised else 0,
            num_tokens * route.width * 4 if call["expert_scales"] is not None else 0,
        ),
    )
    route.check_keys(call, staging.address(KEYS))
    if quantised:
        _quantise(call, route, staging, rows)
    else:
        staging.copy_in(ROWS, call["x"])
    if call["expert_scales"] is not None:
        weights = staging.view(WEIGHTS, (num_tokens, route.width), torch.float32)
        weights[:, : call["K"]] = call["expert_scales"]
        weights[:, call["K"] :] = 0
    return staging


def _quantise(call: Call, route: Routing, staging: Staging, rows: int) -> None:
    x: torch.Tensor = call["x"]
    if x.stride(1) != 1 or (x.stride(0) < call["H"] and len(x) > 1):
        x = x.contiguous()
    pick, smooth, smooth_rows, factor_rows = _smooth(call, route, staging)
    _core.quantise_rows(
        DTYPES[x.dtype],
        call["H"],
        rows,
        x.data_ptr(),
        x.stride(0) * x.element_size(),
        len(x),
        staging.address(ROWS),
        staging.address(FACTORS),
        _at(pick),
        0 if smooth is None else smooth.data_ptr(),
        smooth_rows,
        _at(factor_rows),
    )


def _smooth(call: Call, route: Routing, staging: Staging) -> tuple[Any, torch.Tensor | None, int, Any]:
    """Return, for each copy, its token and its row of the smooth factors; -1 where no copy is sent."""
    if call["scales"] is None:
        return None, None, 0, None
    smooth: torch.Tensor = call["scales"].contiguous()
    if len(smooth) == call["moe_expert_num"]:  # a table without rows for shared experts leaves their copies as they are
        smooth = torch.cat([torch.ones(call["E_s"], call["H"]), smooth])
    keys = staging.ints(KEYS).reshape(-1, route.width)
    tokens = np.broadcast_to(np.arange(len(keys), dtype=np.int32)[:, None], keys.shape)
    pick = np.ascontiguousarray(np.where(keys < 0, np.int32(-1), tokens))
    factor_rows = route.factor_rows[keys] + np.int32(len(smooth) - call["moe_expert_num"])
    return pick, smooth, len(smooth), np.ascontiguousarray(factor_rows)


def _at(array: Any) -> int:
    return 0 if array is None else int(array.ctypes.data)


# --- pull --------------------------------------------------------------------------------------------------------------------


@phase("pull")
def pull(call: Call, given: Call, session: Session, route: Routing) -> _Outputs:
    """Return the outputs of ``call`` with the rows that were published for this rank; ``given`` is the call that published."""
    sort = route.sort
    total = sort.run(session.channel.sources(KEYS))
    outputs = _allocate(call, session, total)
    _place_rows(given, session, route, outputs)
    sort.write_key_counts(outputs["expert_token_nums"].data_ptr(), call["expert_token_nums_type"] == 0)
    return outputs


def _fill_counts(call: Call, session: Session, route: Routing, outputs: _Outputs) -> None:
    sort = route.sort
    sums = outputs["ep_recv_counts"]
    sort.write_running_counts(sums.data_ptr())
    if call["split_shared"] and route.me < route.top.shared_ranks:
        counts = plan.counts_from_prefix_sums(sums.tolist(), route.top.world, 1)
        sums[: route.top.world] = torch.from_numpy(plan.prefix_sums(plan.booked(plan.arrivals(counts), route.top, route.me)))
    if call["tp_world_size"] == 1:
        outputs["tp_recv_counts"][0] = sort.num_rows
    assist = outputs["expand_idx"] if "expand_idx" in outputs else outputs["assist_info_for_combine"]
    if call["layout"] == "triplets":
        sort.write_tags(assist.data_ptr())
    else:
        index = dispatch_steps.expand_idx(call)
        assist[: len(index)] = index


def _place_rows(call: Call, session: Session, route: Routing, outputs: _Outputs) -> None:
    """Copy the rows, and what belongs to them, from every window to their places."""
    channel, sort, per_pair = session.channel, route.sort, call["scales"] is not None
    expand_x = outputs["expand_x"]
    row_bytes = call["H"] * expand_x.element_size()
    room = expand_x.shape[0] * row_bytes
    sort.place(channel.sources(ROWS), expand_x.data_ptr(), room, row_bytes, row_bytes, per_pair, session.large_copy)
    if call["quant_mode"] == 2:
        factors = outputs["dynamic_scales"]
        sort.place(channel.sources(FACTORS), factors.data_ptr(), 4 * len(factors), 4, 4, per_pair)
    if call["expert_scales"] is not None:
        weights = outputs["expand_scales"]
        sort.place(channel.sources(WEIGHTS), weights.data_ptr(), 4 * len(weights), 4, 4, True)


def _allocate(call: Call, session: Session, total: int) -> _Outputs:
    """The outputs; expand_x lies in this process's window, so that combine can publish it where it is."""
    outputs: _Outputs = {}
    poison = config.get("poison")
    for name, shape, blank in call.form.blanks:
        if name == "expand_x" and call.partner is None:
            made = session.slabs.empty(shape, blank.dtype, rows=shape[0] if poison else total)
        else:
            made = blank.new_empty(*shape)
        outputs[name] = made
        if poison:
            made.fill_(float("nan") if made.is_floating_point() else 0x7F)
    return outputs


def _share(call: Call, outputs: _Outputs, route: Routing) -> None:
    """Append the tensor-parallel partner's rows, over the partners' process group."""
    sums = outputs["ep_recv_counts"].tolist()
    came = plan.arrivals(plan.counts_from_prefix_sums(sums, route.top.world, route.local_experts))
    factors = outputs["dynamic_scales"][: came.total] if call["quant_mode"] == 2 else torch.empty(came.total, 0)
    dispatch_steps.share_with_partner(call, outputs, [outputs["expand_x"][: came.total], factors], came)
