"""Tokens sorted by expert, and brought back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._check import FLOATS, INDICES, Rules
from ._rows import inverse, take_rows

_PADDED = "padded indices are not computed here, nor in torch_npu"


def npu_moe_token_permute(
    tokens: Tensor, indices: Tensor, num_out_tokens: int | None = None, padded_mode: bool = False
) -> tuple[Tensor, Tensor]:
    """Copy each token once per expert it goes to, sorted by expert; equals keep their order. Differentiable.

    Shapes: T tokens of H channels, K experts per token. Pair ``t * K + k`` is token t's k-th expert.

    Args:
        tokens: ``[T, H]`` float16, bfloat16 or float32.
        indices: ``[T, K]`` or ``[T]`` int32 or int64: the experts of each token.
        num_out_tokens: rows kept of the sorted ``T * K``: None or 0 keeps all, n > 0 the first n, n < 0 all
            but the last -n.
        padded_mode: False.

    Returns:
        ``permuted_tokens`` ``[rows, H]`` and ``sorted_indices`` ``[T * K]`` int32: entry p is the row that
        pair p has among all sorted rows, kept or not.

    Raises:
        ArgumentError: for another type, shape or form.

    Example:
        >>> rows, where = npu_moe_token_permute(torch.tensor([[1.0], [2.0]]), torch.tensor([[3, 0], [0, 1]]))
        >>> rows.flatten().tolist(), where.tolist()
        ([1.0, 2.0, 2.0, 1.0], [3, 0, 1, 2])
    """
    rules = Rules("npu_moe_token_permute", tokens=tokens, indices=indices)
    rules.only("padded_mode", padded_mode, (False,), _PADDED)
    fits = rules.tensor(tokens, "tokens", (2,), FLOATS)
    if rules.tensor(indices, "indices", (1, 2), INDICES) and fits:
        remedy = "one row of experts per token"
        rules.equal("indices.size(0)", indices.size(0), tokens.size(0), remedy)
    rules.raise_broken()
    flat = indices.reshape(-1)
    order = torch.argsort(flat, stable=True)
    limit = num_out_tokens if num_out_tokens else flat.numel()
    per_token = 1 if indices.dim() == 1 else indices.size(1)
    source = torch.div(order[:limit], per_token, rounding_mode="floor")
    return tokens.index_select(0, source), inverse(order).to(torch.int32)


def npu_moe_token_unpermute(
    permuted_tokens: Tensor,
    sorted_indices: Tensor,
    probs: Tensor | None = None,
    padded_mode: bool = False,
    restore_shape: Sequence[int] | None = None,
) -> Tensor:
    """Add up the K rows of each token, weighted: the way back from ``npu_moe_token_permute``. Differentiable.

    ``out[t] = sum over k of probs[t, k] * permuted_tokens[sorted_indices[t * K + k]]`` in float32, k
    ascending, rounded once. K is ``probs.size(1)``, and 1 without ``probs``.

    Args:
        permuted_tokens: ``[rows, H]`` float16, bfloat16 or float32.
        sorted_indices: ``[T * K]`` int32 or int64. An entry outside ``[0, rows)`` adds nothing: its row was
            dropped.
        probs: ``[T, K]`` float16, bfloat16 or float32.
        padded_mode: False.
        restore_shape: ignored, as published for ``padded_mode`` False.

    Returns:
        ``[T, H]`` in the type of ``permuted_tokens``.

    Raises:
        ArgumentError: for another type, shape or form.
    """
    rules = Rules("npu_moe_token_unpermute", permuted_tokens=permuted_tokens, sorted_indices=sorted_indices)
    rules.only("padded_mode", padded_mode, (False,), _PADDED)
    rules.tensor(permuted_tokens, "permuted_tokens", (2,), FLOATS)
    fits = rules.tensor(sorted_indices, "sorted_indices", (1,), INDICES)
    if probs is not None and rules.tensor(probs, "probs", (2,), FLOATS) and fits:
        pairs = sorted_indices.numel()
        rules.equal("probs.numel()", probs.numel(), pairs, "T * K, the length of sorted_indices")
    rules.raise_broken()
    weights = None if probs is None else probs.float()
    index = sorted_indices.reshape(-1, 1) if probs is None else sorted_indices.reshape(probs.shape)
    total = torch.zeros(index.size(0), permuted_tokens.size(1), device=permuted_tokens.device)
    for k in range(index.size(1)):
        rows = take_rows(permuted_tokens, index[:, k])
        total = total + (rows if weights is None else rows * weights[:, k : k + 1])
    return total.to(permuted_tokens.dtype)
