"""Rows on their way to the experts of this rank: copied for each expert, or regrouped."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._check import FLOATS, INDICES, Rules, readable
from ._rows import group_of_rows, inverse
from .quant import quantise

_CUMSUM, _COUNTS, _PAIRS = 0, 1, 2  # expert_tokens_num_type
_GATHER, _SCATTER = 0, 1  # row_idx_type


def npu_moe_init_routing_v2(
    x: Tensor,
    expert_idx: Tensor,
    *,
    scale: Tensor | None = None,
    offset: Tensor | None = None,
    active_num: int = -1,
    expert_capacity: int = -1,
    expert_num: int = -1,
    drop_pad_mode: int = 0,
    expert_tokens_num_type: int = 0,
    expert_tokens_num_flag: bool = False,
    quant_mode: int = -1,
    active_expert_range: Sequence[int] = (),
    row_idx_type: int = 0,
    x_dtype: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Copy each token once per active expert it goes to, sorted by expert, optionally quantised.

    Shapes: T tokens of H channels, K experts per token. Pair ``t * K + k`` is token t's k-th expert. Pairs of
    active experts come first, sorted by expert id and then by pair: they are the *available* rows. L is the
    number of active experts, R the number of rows returned.

    Args:
        x: ``[T, H]`` float16, bfloat16 or float32; int8 with ``quant_mode`` -1.
        expert_idx: ``[T, K]`` int32 or int64. An id outside the active range, whatever its value, takes no
            part.
        scale: without quantisation ``[T]`` float32, a scale of each token that travels with its rows; with it
            ``[L, H]`` or ``[1, H]`` float32, smooth factors of each active expert.
        offset: None.
        active_num: R is ``T * K``, or the smaller of ``active_num`` and ``T * K`` if this is above 0.
        expert_capacity: ignored: it belongs to ``drop_pad_mode`` 1.
        expert_num: number of experts, above 0.
        drop_pad_mode: 0.
        expert_tokens_num_type: what the third output holds of each active expert: 0 the prefix sums of the
            row counts, 1 the counts, 2 pairs of expert id and count of the experts that have rows, then
            zeros.
        expert_tokens_num_flag: whether the third output is wanted. Without it, it is a single 0.
        quant_mode: -1 none, 1 int8 with a scale per row (see ``npu_dynamic_quant``).
        active_expert_range: ``[first, end)`` of the active expert ids; all experts if empty.
        row_idx_type: 0: entry p of the second output is the row of pair p, or -1 if it is not available (a
            row may be past R if ``active_num`` cut it off); 1: entry r is the pair of row r, for available
            rows.
        x_dtype: None.

    Returns:
        ``expanded_x`` ``[R, H]`` in ``x``'s type or int8, zeros past the available rows; ``expanded_row_idx``
        ``[T * K]`` int32; ``expert_token_cumsum_or_count`` ``[L]`` int64, ``[expert_num, 2]`` for pairs;
        ``expanded_scale`` ``[R]`` float32, zeros where there is none.

    Raises:
        ArgumentError: for other forms, types or shapes, and for numbers outside these ranges.
    """
    rules = Rules("npu_moe_init_routing_v2", x=x, expert_idx=expert_idx, scale=scale)
    rules.only("drop_pad_mode", drop_pad_mode, (0,), "buffers of a fixed capacity per expert are not computed here")
    rules.only("expert_tokens_num_type", expert_tokens_num_type, (0, 1, 2), "0 prefix sums, 1 counts, 2 pairs")
    rules.only("quant_mode", quant_mode, (-1, 1), "-1 is no quantisation, 1 is int8 with a scale per row")
    rules.only("row_idx_type", row_idx_type, (_GATHER, _SCATTER), "0 is row of pair, 1 is pair of row")
    rules.only("offset", offset, (None,), "it belongs to static quantisation, which is not computed here")
    rules.only("x_dtype", x_dtype, (None,), "it belongs to 4-bit and 8-bit float rows, which are not computed here")
    rules.need(active_num >= -1, "active_num", active_num, "-1 or more", "-1 or 0 keep all rows")
    rules.need(expert_num > 0, "expert_num", expert_num, "above 0", "pass the number of experts")
    first, end = _active_range(rules, active_expert_range, expert_num)
    _check_init_routing(rules, x, expert_idx, scale, quant_mode, end - first)
    rules.raise_broken()

    num_active = end - first
    flat = expert_idx.reshape(-1).to(torch.int64)
    key = torch.where((flat >= first) & (flat < end), flat - first, num_active)
    order = torch.argsort(key, stable=True)
    counts = torch.zeros(num_active + 1, dtype=torch.int64, device=x.device)
    counts = counts.scatter_add(0, key, torch.ones_like(key))[:num_active]
    kept = order[: active_num if active_num > 0 else order.numel()]
    missing = torch.arange(kept.numel(), device=x.device) >= counts.sum()
    source = torch.div(kept, max(expert_idx.size(1), 1), rounding_mode="floor")
    rows, row_scale = _expand(x, source, scale, quant_mode, key[kept].clamp(max=num_active - 1), missing)
    row_idx = _row_index(order, counts.sum(), row_idx_type)
    tokens = _token_counts(counts, first, expert_num, expert_tokens_num_type)
    return rows, row_idx, tokens if expert_tokens_num_flag else tokens.new_zeros(()), row_scale


def npu_moe_re_routing(
    tokens: Tensor,
    expert_token_num_per_rank: Tensor,
    *,
    per_token_scales: Tensor | None = None,
    expert_token_num_type: int = 1,
    idx_type: int = 0,
    tokens_dtype: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Regroup rows that came in by (source rank, expert) into (expert, source rank).

    Shapes: A rows of H channels, R source ranks, E local experts.

    Args:
        tokens: ``[A, H]`` float16, bfloat16, float32 or int8. Rows past the sum of the counts are not read.
        expert_token_num_per_rank: ``[R, E]`` int32 or int64: rows from each rank for each expert.
        per_token_scales: ``[A]`` or ``[A, n]`` float32, moved with their rows; None gives zeros.
        expert_token_num_type: 1, counts.
        idx_type: 0: entry j of the third output is the row that came to place j.
        tokens_dtype: None.

    Returns:
        ``permute_tokens`` ``[A, H]`` and ``permute_per_token_scales`` ``[A]`` (or ``[A, n]``) float32, zeros
        past the sum of the counts; ``permute_token_idx`` ``[A]`` int32, a permutation, past the sum ``j``
        itself; ``expert_token_num`` ``[E]`` in the type of the counts.

    Raises:
        ArgumentError: for other types, shapes or forms, and for counts that are negative or pass A.
    """
    counts = expert_token_num_per_rank
    rules = Rules("npu_moe_re_routing", tokens=tokens, expert_token_num_per_rank=counts)
    rules.only("expert_token_num_type", expert_token_num_type, (1,), "take torch.cumsum of the fourth output")
    rules.only("idx_type", idx_type, (0,), "take torch.argsort of the third output")
    rules.only("tokens_dtype", tokens_dtype, (None,), "it belongs to 4-bit and 8-bit float rows")
    fits = rules.tensor(tokens, "tokens", (2,), (*FLOATS, torch.int8))
    counted = rules.tensor(counts, "expert_token_num_per_rank", (2,), INDICES)
    if fits and counted and readable(counts):
        rules.counts("expert_token_num_per_rank", counts.flatten().tolist(), tokens.size(0))
    if per_token_scales is not None and rules.tensor(per_token_scales, "per_token_scales", (1, 2), (torch.float32,)):
        rules.equal("per_token_scales.size(0)", per_token_scales.size(0), tokens.size(0), "one per row")
    rules.raise_broken()

    num_ranks, num_experts = counts.shape
    segment, inside = group_of_rows(counts.reshape(-1).cumsum(0), tokens.size(0))
    key = (segment % max(num_experts, 1)) * num_ranks + torch.div(segment, max(num_experts, 1), rounding_mode="floor")
    order = torch.argsort(key.masked_fill(~inside, num_ranks * num_experts), stable=True)
    moved = tokens.index_select(0, order).masked_fill(~inside.unsqueeze(1), 0)
    if per_token_scales is None:
        scales = torch.zeros(tokens.size(0), device=tokens.device)
    else:
        outside = ~inside.view(-1, *[1] * (per_token_scales.dim() - 1))
        scales = per_token_scales.index_select(0, order).masked_fill(outside, 0)
    return moved, scales, order.to(torch.int32), counts.sum(0).to(counts.dtype)


def _active_range(rules: Rules, given: Sequence[int], expert_num: int) -> tuple[int, int]:
    if len(given) == 0:
        return 0, max(expert_num, 1)
    fits = len(given) == 2 and 0 <= given[0] < given[1] <= expert_num
    remedy = "pass [first, end) of the active experts, or [] for all"
    rules.need(
        fits,
        "active_expert_range",
        list(given),
        "[first, end] with 0 <= first < end <= {}",
        remedy,
        expert_num,
    )
    return (given[0], given[1]) if fits else (0, 1)


def _check_init_routing(
    rules: Rules, x: Tensor, expert_idx: Tensor, scale: Tensor | None, quant_mode: int, num_active: int
) -> None:
    fits = rules.tensor(x, "x", (2,), FLOATS if quant_mode == 1 else (*FLOATS, torch.int8))
    if rules.tensor(expert_idx, "expert_idx", (2,), INDICES) and fits:
        rules.equal("expert_idx.size(0)", expert_idx.size(0), x.size(0), "one row of experts per token")
    if scale is None or not fits:
        return
    if quant_mode != 1:
        if rules.tensor(scale, "scale", (1,), (torch.float32,)):
            rules.shape("scale", scale, "(T,)", (x.size(0),))
    elif rules.tensor(scale, "scale", (2,), (torch.float32,)):
        rules.shape("scale", scale, "(active experts, H)", (num_active, x.size(1)), (1, x.size(1)))


def _expand(
    x: Tensor, source: Tensor, scale: Tensor | None, quant_mode: int, expert: Tensor, missing: Tensor
) -> tuple[Tensor, Tensor]:
    rows = x.index_select(0, source).masked_fill(missing.unsqueeze(1), 0)
    if quant_mode == 1:
        smooth = 1.0 if scale is None else scale[expert if scale.size(0) > 1 else torch.zeros_like(expert)]
        return quantise((rows.float() * smooth).masked_fill(missing.unsqueeze(1), 0))
    if scale is None:
        return rows, torch.zeros(rows.size(0), device=x.device)
    return rows, scale.index_select(0, source).masked_fill(missing, 0)


def _row_index(order: Tensor, available: Tensor, row_idx_type: int) -> Tensor:
    if row_idx_type == _SCATTER:
        return order.to(torch.int32)
    row = inverse(order)
    return row.masked_fill(row >= available, -1).to(torch.int32)


def _token_counts(counts: Tensor, first: int, expert_num: int, num_type: int) -> Tensor:
    if num_type == _CUMSUM:
        return counts.cumsum(0)
    if num_type == _COUNTS:
        return counts
    used_first = torch.argsort((counts == 0).to(torch.int8), stable=True)
    used = counts[used_first]
    pairs = torch.stack(((used_first + first).masked_fill(used == 0, 0), used), 1)
    return torch.cat((pairs, pairs.new_zeros(expert_num - counts.numel(), 2)))
