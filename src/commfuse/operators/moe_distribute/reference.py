"""Golden of the v2 operators: dispatch, combine, and combine with addition and RMS norm.

Written from the published formulas for all ranks at once; the judge of every other implementation. `ranks`
holds one dict per participating rank with every argument of the operator by its public name (group names are
ignored), in any order. With `tp_world_size` 2 it holds the calls of both TP indices. With a real
`elastic_info` it holds the living ranks alone. The result has, per rank and output, `(tensor, valid)`: the
tensor in its published shape and dtype, and the number of leading entries that are specified. The rest is
zeros.

`reference_routes` says who sends which row to whom, `reference_rows` how a row becomes int8,
`reference_return` how combine finds the rows again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .reference_return import Returned, gather_back
from .reference_routes import (
    Args,
    Roles,
    Row,
    active_pairs,
    buffer_sizes,
    domains,
    expand_idx,
    global_batch,
    has_tp,
    padded,
    participation,
    roles_of,
    routes,
    running_counts,
    tp_index,
)
from .reference_rows import quantize_rows, working_dtype

Output = tuple[Tensor | None, int]


@dataclass(frozen=True, kw_only=True)
class Received:
    """What one rank holds after the exchange inside its EP group. n rows."""

    rows: list[Row]
    x: Tensor  # (n, H)
    scales: Tensor  # (n,) float32, zeros when nothing is quantised
    weights: Tensor  # (n,) float32, or (0,) when there are none
    counts: Tensor  # (L*W,) int32 running sum


def dispatch_v2(ranks: list[Args], *, product: str = "portable") -> list[list[Output]]:
    """Golden of `npu_moe_distribute_dispatch_v2`.

    Returns, per rank: `expand_x`, `dynamic_scales`, `assist_info_for_combine`, `expert_token_nums`,
    `ep_recv_counts`, `tp_recv_counts`, `expand_scales`. With `product="A2"`, `assist_info_for_combine` begins
    with the v1 index (BS*K ints, without the tokens behind a 1-D mask) in place of triplets.

    Raises ValueError when the ranks' arguments do not fit together or an active expert id does not exist.
    """
    roles, groups = domains(ranks)
    received = {tp: _exchange(calls, roles) for tp, calls in groups.items()}
    results = []
    for args in ranks:
        rank, tp = roles.physical.index(int(args["ep_rank_id"])), tp_index(args)
        parts = [received[tp][rank]]
        if has_tp(args):
            parts.append(received[1 - tp][rank])
        results.append(_dispatch_outputs(args, roles, rank, parts, product))
    return results


def _exchange(calls: list[Args], roles: Roles) -> list[Received]:
    return [
        receive(calls, roles, rank, rows, running_counts(rows, roles.world_size, roles.local_experts(rank)))
        for rank, rows in enumerate(routes(calls, roles))
    ]


def receive(
    calls: list[Args],
    roles: Roles,
    rank: int,
    rows: list[Row],
    counts: Tensor,
    first_moe_scale: int | None = None,
) -> Received:
    """Collect `rows` for `rank`, quantised if the operator says so.

    `first_moe_scale` is the row of `scales` that belongs to MoE expert 0; E_s unless told otherwise.
    """
    x = [calls[row.source]["x"][row.token] for row in rows]
    values = torch.stack(x) if x else calls[rank]["x"].new_empty(0, calls[rank]["x"].size(1))
    scales = torch.zeros(len(rows))
    if calls[rank]["quant_mode"] == 2:
        first = roles.shared_num if first_moe_scale is None else first_moe_scale
        values, scales = quantize_rows(values, _smooth_rows(calls, roles, rank, rows, first))
    return Received(rows=rows, x=values, scales=scales, weights=_carried_weights(calls, rows), counts=counts)


def _smooth_rows(calls: list[Args], roles: Roles, rank: int, rows: list[Row], first_moe: int) -> Tensor | None:
    """The smooth factors (n, H): those of the receiving expert, from the table of the sending rank."""
    if calls[rank]["scales"] is None or not rows:
        return None
    factors = []
    for row in rows:
        scales = calls[row.source]["scales"]
        if rank >= roles.shared_rank_num:
            expert = (rank - roles.shared_rank_num) * roles.experts_per_rank + row.expert
            factors.append(scales[first_moe + expert])
        elif first_moe:
            factors.append(scales[row.slot - calls[row.source]["expert_ids"].size(1)])
        else:  # a table without rows for the shared experts leaves their tokens as they are
            factors.append(torch.ones_like(scales[0]))
    return torch.stack(factors)


def _carried_weights(calls: list[Args], rows: list[Row]) -> Tensor:
    """`expert_scales` (n,) of the pairs whose rows are here. The rows of a shared expert have none."""
    top_k = calls[0]["expert_ids"].size(1)
    if any(calls[row.source].get("expert_scales") is None or row.slot >= top_k for row in rows):
        return torch.empty(0)
    weights = [calls[row.source]["expert_scales"][row.token, row.slot] for row in rows]
    return torch.stack(weights) if weights else torch.empty(0)


def _dispatch_outputs(args: Args, roles: Roles, rank: int, parts: list[Received], product: str) -> list[Output]:
    own = parts[0]
    num_rows, _ = buffer_sizes(args)
    num_pairs = args["expert_ids"].numel()
    assist_length = max(num_pairs, num_rows * 128)
    if product == "A2":
        assist = padded(expand_idx(args, roles), assist_length, "assist_info_for_combine")[0]
        info = assist, _written_pairs(args)
    else:
        info = padded(_triplets(own.rows), assist_length, "assist_info_for_combine")
    outputs = row_outputs(args, roles, rank, parts)
    return [*outputs[:2], info, *outputs[2:]]


def row_outputs(args: Args, roles: Roles, rank: int, parts: list[Received]) -> list[Output]:
    """The outputs that v1 and v2 share: all but the third. `parts` are own rows, then the TP partner's."""
    own = parts[0]
    num_rows, _ = buffer_sizes(args)
    tp_size = max(int(args["tp_world_size"]), 1)
    expand_x = padded(torch.cat([part.x for part in parts]), num_rows * tp_size, "expand_x")
    scales, valid = padded(torch.cat([part.scales for part in parts]), num_rows * tp_size, "dynamic_scales")
    return [
        expand_x,
        (scales, valid if args["quant_mode"] == 2 else 0),
        expert_token_nums(args, roles, rank, [part.counts for part in parts]),
        _recv_counts(args, parts),
        _tp_recv_counts(args, parts),
        padded(own.weights, num_rows, "expand_scales"),
    ]


def expert_token_nums(args: Args, roles: Roles, rank: int, counts: list[Tensor]) -> Output:
    """`expert_token_nums` int64 (L,) from the running counts of own and partner rows."""
    ends = torch.stack([part.reshape(-1, roles.world_size)[:, -1] for part in counts]).sum(dim=0)
    nums = ends if args["expert_token_nums_type"] == 0 else ends.diff(prepend=ends.new_zeros(1))
    return padded(nums, buffer_sizes(args)[1], "expert_token_nums")


def _triplets(rows: Sequence[Row]) -> Tensor:
    """Int32 (3n,): source rank, token, slot of every row."""
    return torch.tensor([[row.source, row.token, row.slot] for row in rows], dtype=torch.int32).flatten()


def _written_pairs(args: Args) -> int:
    mask = args["x_active_mask"]
    if mask is not None and mask.dim() == 1:
        return int(mask.sum()) * int(args["expert_ids"].size(1))
    return int(args["expert_ids"].numel())


def _recv_counts(args: Args, parts: list[Received]) -> Output:
    """Own running sums, then the partner's. With `expert_scales` there is room for private words behind."""
    world_size = int(args["ep_world_size"])
    length = world_size * buffer_sizes(args)[1] * len(parts)
    if args["expert_scales"] is not None:
        length += 2 * global_batch(args) * args["expert_ids"].size(1) * (world_size // 8)
    return padded(torch.cat([part.counts for part in parts]), length, "ep_recv_counts")


def _tp_recv_counts(args: Args, parts: list[Received]) -> Output:
    counts = torch.zeros(int(args["tp_world_size"]), dtype=torch.int32)
    if len(parts) == 1:
        return counts, 0
    counts[int(args["tp_rank_id"])] = len(parts[0].rows)
    counts[1 - int(args["tp_rank_id"])] = len(parts[1].rows)
    return counts, 2


def combine_v2(ranks: list[Args], *, const_expert: str = "linear", product: str = "portable") -> list[list[Output]]:
    """Golden of `npu_moe_distribute_combine_v2`: per rank one output, (BS, H) in the dtype of `expand_x`.

    `const_expert` is "linear" (alpha_1 * x + alpha_2 * v, for alphas (N,) and (N, H)) or "softmax" (alphas
    (N, H) are the two rows of a gate; alphas (N,) stay linear). With `product="A2"` `assist_info_for_combine`
    is the v1 index.

    Rows are found by the expert side's `ep_send_counts` and the owner's ids and mask. Raises ValueError when
    `assist_info_for_combine` says something else, or when the ranks' arguments do not fit together.
    """
    results: list[list[Output]] = []
    for args, returned in zip(ranks, gather_back(ranks, by_index=product == "A2"), strict=True):
        total = accumulate(args, returned, const_expert=const_expert)
        results.append([(total.to(args["expand_x"].dtype), total.size(0))])
    return results


def combine_add_rms_norm(ranks: list[Args], *, const_expert: str = "linear", product: str = "portable") -> list[list[Output]]:
    """Golden of `npu_moe_distribute_combine_add_rms_norm`: combine, add `residual_x`, RMS norm.

    `expand_idx` is the `assist_info_for_combine` of dispatch v2. Returns, per rank: y (BS, 1, H), rstd (BS,
    1, 1) float32, x (BS, 1, H). Rows of masked tokens are zeros in all three. Raises as `combine_v2` does.
    """
    results: list[list[Output]] = []
    for args, returned in zip(ranks, gather_back(ranks, assist="expand_idx", by_index=product == "A2"), strict=True):
        outputs = _add_rms_norm(args, accumulate(args, returned, const_expert=const_expert))
        active = participation(args).any(dim=1).reshape(-1, 1, 1)
        masked = [torch.where(active, output, torch.zeros_like(output)) for output in outputs]
        results.append([(output, output.size(0)) for output in masked])
    return results


def _add_rms_norm(args: Args, total: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dtype, work, hidden = args["expand_x"].dtype, total.dtype, total.size(1)
    z = total.unsqueeze(1) + args["residual_x"].to(work)
    squares = z * z * torch.tensor(1.0 / hidden, dtype=work)
    # The order of this sum is nobody's promise; float64 is nearest to all of them.
    mean = squares.sum(dim=2, keepdim=True, dtype=torch.float64).to(work)
    rstd = 1.0 / torch.sqrt(mean + args["norm_eps"])
    u = (z * rstd).to(dtype)
    y = (u.to(work) * args["gamma"].to(work)).to(dtype)
    return y, rstd.to(torch.float32), z.to(dtype)


def accumulate(args: Args, returned: Returned, *, const_expert: str = "linear") -> Tensor:
    """The weighted sum (BS, H) of a rank in the working dtype: k ascending, multiply, then add.

    Shared experts and `shared_expert_x` are added last, without a weight. Masked tokens have zeros.
    """
    roles, (num_tokens, top_k) = roles_of(args), args["expert_ids"].shape
    hidden, work = args["expand_x"].size(1), working_dtype(args["expand_x"].dtype)
    total = torch.zeros(num_tokens, hidden, dtype=work)
    for token, k, expert in active_pairs(args, roles):
        special = expert - roles.first_special
        term = returned[token, k] if special < 0 else _special_term(args, token, special, const_expert)
        if term is not None:
            total[token] = total[token] + term.to(work) * args["expert_scales"][token, k].to(work)
    shared_x = args["shared_expert_x"]
    for token in participation(args).any(dim=1).nonzero().flatten().tolist():
        for s in range(roles.shared_num):
            total[token] = total[token] + returned[token, top_k + s].to(work)
        if shared_x is not None:
            total[token] = total[token] + shared_x.reshape(num_tokens, hidden)[token].to(work)
    return total


def _special_term(args: Args, token: int, special: int, const_expert: str) -> Tensor | None:
    """What special expert number `special` gives for a token (H,), or None for a zero expert."""
    zeros, copies = int(args["zero_expert_num"]), int(args["copy_expert_num"])
    if special < zeros:
        return None
    work = working_dtype(args["expand_x"].dtype)
    x: Tensor = args["ori_x"][token].to(work)
    if special < zeros + copies:
        return x
    c = special - zeros - copies
    alpha_1: Tensor = args["const_expert_alpha_1"][c].to(work)
    alpha_2: Tensor = args["const_expert_alpha_2"][c].to(work)
    if const_expert == "softmax" and alpha_1.dim():
        alpha_1, alpha_2 = _gate(alpha_1, alpha_2, x)
    elif const_expert not in ("linear", "softmax"):
        raise ValueError(f'const_expert is "linear" or "softmax", not {const_expert!r}.')
    v: Tensor = args["const_expert_v"][c].to(work)
    return alpha_1 * x + alpha_2 * v


def _gate(alpha_1: Tensor, alpha_2: Tensor, x: Tensor) -> Tensor:
    """Softmax (2,) of the two dot products, computed in float64 and rounded to the dtype of `x`."""
    logits = torch.stack([torch.dot(alpha.double(), x.double()) for alpha in (alpha_1, alpha_2)])
    return torch.softmax(logits, dim=0).to(x.dtype)
