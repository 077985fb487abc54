"""The expert rows of each token, weighted and added up."""

from __future__ import annotations

import torch
from torch import Tensor

from ._check import FLOATS, INDICES, Rules, readable
from ._rows import take_rows

_COLUMN_MAJOR = (0, 1)  # drop_pad_mode whose indices run over tokens first


def npu_moe_finalize_routing(
    expanded_permuted_rows: Tensor,
    skip1: Tensor | None,
    skip2: Tensor | None,
    bias: Tensor | None,
    scales: Tensor | None,
    expanded_src_to_dst_row: Tensor,
    export_for_source_row: Tensor | None,
    drop_pad_mode: int | None = 0,
    k: int | None = 1,
) -> Tensor:
    """Add up the K expert rows of each token, weighted, on top of up to two skip connections.

    ``out[t] = skip1[t] + skip2[t] + sum over k of scales[t, k] * (row(t, k) + bias[expert(t, k)])`` in
    float32, k ascending, rounded once. ``row(t, k)`` is ``expanded_permuted_rows[index]``, where the index
    stands in ``expanded_src_to_dst_row`` at ``k * T + t`` for ``drop_pad_mode`` 0 and 1 (the order of
    ``npu_moe_gating_top_k_softmax``'s ``row_idx``) and at ``t * K + k`` for 2 and 3 (the order of
    ``npu_moe_init_routing_v2``). An index of -1 stands for a row of zeros.

    Args:
        expanded_permuted_rows: ``[rows, H]``, or ``[E, C, H]`` with ``drop_pad_mode`` 1 and 3; float16,
            bfloat16 or float32.
        skip1: ``[T, H]`` in the same type, or None.
        skip2: likewise.
        bias: ``[E, H]`` in the same type, or None. Needs ``export_for_source_row``.
        scales: ``[T, K]`` float16, bfloat16 or float32; None weighs every row by 1.
        expanded_src_to_dst_row: ``[T * K]`` int32 or int64, each -1 or the index of a row.
        export_for_source_row: ``[T, K]`` int32 or int64, the expert of each pair; only read with ``bias``.
        drop_pad_mode: 0 to 3.
        k: K without ``scales``; with them K is ``scales.size(1)``.

    Returns:
        ``[T, H]`` in the type of the rows.

    Raises:
        ArgumentError: for other types or shapes, or an index without a row.
    """
    rules = Rules("npu_moe_finalize_routing", expanded_permuted_rows=expanded_permuted_rows, scales=scales)
    drop_pad_mode = 0 if drop_pad_mode is None else drop_pad_mode
    rules.only("drop_pad_mode", drop_pad_mode, (0, 1, 2, 3), "0 and 2 take all rows, 1 and 3 a capacity per expert")
    rows, index = expanded_permuted_rows, expanded_src_to_dst_row
    fits = rules.tensor(rows, "expanded_permuted_rows", (3,) if drop_pad_mode in (1, 3) else (2,), FLOATS)
    fits = rules.tensor(index, "expanded_src_to_dst_row", (1,), INDICES) and fits
    if scales is not None:
        fits = rules.tensor(scales, "scales", (2,), FLOATS) and fits
    if fits:
        per_token = scales.size(1) if scales is not None else (k or 1)
        _check_finalize(rules, rows, (skip1, skip2), bias, scales, index, export_for_source_row, per_token)
    rules.raise_broken()

    rows = rows.reshape(-1, rows.size(-1))
    index = index.reshape(per_token, -1) if drop_pad_mode in _COLUMN_MAJOR else index.reshape(-1, per_token).t()
    total = torch.zeros(index.size(1), rows.size(1), device=rows.device)
    for skip in (skip1, skip2):
        total = total if skip is None else total + skip
    for place in range(per_token):
        row = take_rows(rows, index[place])
        if bias is not None and export_for_source_row is not None:
            row = row + bias.index_select(0, export_for_source_row[:, place]).float()
        total = total + (row if scales is None else row * scales[:, place : place + 1].float())
    return total.to(rows.dtype)


def _check_finalize(
    rules: Rules,
    rows: Tensor,
    skips: tuple[Tensor | None, Tensor | None],
    bias: Tensor | None,
    scales: Tensor | None,
    index: Tensor,
    expert: Tensor | None,
    per_token: int,
) -> None:
    num_pairs, hidden = index.numel(), rows.size(-1)
    whole = per_token >= 1 and num_pairs % per_token == 0
    remedy = "K is scales.size(1), or k without scales"
    if not rules.need(whole, "expanded_src_to_dst_row.numel()", num_pairs, "T * K with K = {}", remedy, per_token):
        return
    num_tokens = num_pairs // per_token
    if scales is not None:
        rules.shape("scales", scales, "(T, K)", (num_tokens, per_token))
    for name, skip in zip(("skip1", "skip2"), skips, strict=True):
        if skip is not None and rules.tensor(skip, name, (2,), (rows.dtype,)):
            rules.shape(name, skip, "(T, H)", (num_tokens, hidden))
    if bias is not None:
        _check_bias(rules, rows, bias, expert, (num_tokens, per_token))
    num_rows = rows.numel() // max(hidden, 1)
    if num_pairs and hidden and readable(index):
        low, high = int(index.min()), int(index.max())
        remedy = "every entry is the index of a row, or -1 for none"
        rules.need(low >= -1, "expanded_src_to_dst_row.min()", low, "-1 or more", remedy)
        rules.need(high < num_rows, "expanded_src_to_dst_row.max()", high, "at most {}", remedy, num_rows - 1)


def _check_bias(rules: Rules, rows: Tensor, bias: Tensor, expert: Tensor | None, shape: tuple[int, int]) -> None:
    fits = rules.tensor(bias, "bias", (2,), (rows.dtype,))
    if fits:
        rules.equal("bias.size(1)", bias.size(1), rows.size(-1), "H of expanded_permuted_rows")
    if rules.tensor(expert, "export_for_source_row", (2,), INDICES):
        rules.shape("export_for_source_row", expert, "(T, K)", shape)
        if fits and expert.numel() and readable(expert):
            low, high = int(expert.min()), int(expert.max())
            inside = low >= 0 and high < bias.size(0)
            remedy = "bias has one row per expert"
            rules.need(inside, "export_for_source_row", f"{low}..{high}", "in 0..{}", remedy, bias.size(0) - 1)
