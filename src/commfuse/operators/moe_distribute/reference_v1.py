"""Golden of `npu_moe_distribute_dispatch` and `npu_moe_distribute_combine`, the operators before v2.

Arguments and results are as in `reference`. There are no special experts and no elasticity. With shared experts two
things differ from v2: a rank's tokens are split over all shared-expert ranks (there is one shared expert), and a
shared-expert rank keeps its own tokens, as its first rows, and counts them as if ranks 0 .. R_s-1 had sent them.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .reference import Output, Received, accumulate, receive, row_outputs
from .reference_return import gather_back
from .reference_routes import (
    Args,
    Roles,
    Row,
    domains,
    expand_idx,
    has_tp,
    moe_sends,
    routes,
    running_counts,
    tp_index,
)


def dispatch(ranks: list[Args]) -> list[list[Output]]:
    """Golden of `npu_moe_distribute_dispatch`.

    Returns, per rank: `expand_x`, `dynamic_scales`, `expand_idx`, `expert_token_nums`, `ep_recv_counts`,
    `tp_recv_counts`, `expand_scales`.

    Raises ValueError when the ranks' arguments do not fit together, or for shared experts that v1 cannot place.
    """
    roles, groups = domains(ranks)
    received = {tp: _exchange(calls, roles) for tp, calls in groups.items()}
    results = []
    for args in ranks:
        rank, tp = roles.physical.index(int(args["ep_rank_id"])), tp_index(args)
        parts = [received[tp][rank]] + ([received[1 - tp][rank]] if has_tp(args) else [])
        outputs = row_outputs(args, roles, rank, parts)
        index = expand_idx(args, roles)
        results.append([*outputs[:2], (index, index.size(0)), *outputs[2:]])
    return results


def combine(ranks: list[Args]) -> list[list[Output]]:
    """Golden of `npu_moe_distribute_combine`: per rank one output, (BS, H) in the dtype of `expand_x`.

    `shared_expert_x` has no effect: the published operator does not pass it on. Raises ValueError when `expand_idx`
    or `ep_send_counts` do not fit the ids.
    """
    all_returned = gather_back(ranks, sends=_sends, assist="expand_idx", by_index=True, tp_round=_ties_away)
    results: list[list[Output]] = []
    for args, returned in zip(ranks, all_returned, strict=True):
        total = accumulate({**args, "shared_expert_x": None}, returned)
        results.append([(total.to(args["expand_x"].dtype), total.size(0))])
    return results


def _exchange(calls: list[Args], roles: Roles) -> list[Received]:
    received = []
    for rank, booked in enumerate(routes(calls, roles, _sends)):
        counts = running_counts(booked, roles.world_size, roles.local_experts(rank))
        rows = [replace(row, source=rank) if _is_own(row, rank, roles) else row for row in booked]
        received.append(receive(calls, roles, rank, rows, counts))
    return received


def _is_own(row: Row, rank: int, roles: Roles) -> bool:
    """Whether a row is a shared-expert rank's own token, counted under another shared-expert rank."""
    return rank < roles.shared_rank_num and row.source < roles.shared_rank_num


def _sends(args: Args, source: int, roles: Roles) -> list[tuple[int, Row]]:
    """The copies of one rank's tokens. `Row.source` is the rank under which the receiver counts the row."""
    return _shared_sends(args, source, roles) + moe_sends(args, source, roles)


def _shared_sends(args: Args, source: int, roles: Roles) -> list[tuple[int, Row]]:
    shared_ranks = roles.shared_rank_num
    if shared_ranks == 0:
        return []
    if roles.shared_num != 1 or roles.world_size % shared_ranks or args["x_active_mask"] is not None:
        raise ValueError(
            f"With shared experts, v1 needs shared_expert_num 1 (it is {roles.shared_num}), a divisor of "
            f"{roles.world_size} ranks as shared_expert_rank_num (it is {shared_ranks}), and no x_active_mask."
        )
    num_tokens, top_k = args["expert_ids"].shape
    bounds = [(part + source) * num_tokens // shared_ranks for part in range(shared_ranks + 1)]
    sends = []
    for part in range(shared_ranks):
        receiver, booked = (source, part) if source < shared_ranks else (part, source)
        for token in range(bounds[part] - bounds[0], bounds[part + 1] - bounds[0]):
            sends.append((receiver, Row(expert=0, source=booked, token=token, slot=top_k)))
    return sends


def _ties_away(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Round sums of TP partners' rows. In v1, ties in bf16 go away from zero."""
    if dtype != torch.bfloat16:
        return values.to(dtype)
    bits = values.view(torch.int32).long() + 0x8000
    return (bits & ~0xFFFF).to(torch.int32).view(torch.float32).to(dtype)
