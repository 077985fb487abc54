"""Which experts a token goes to, and with what weight."""

from __future__ import annotations

import torch
from torch import Tensor

from ._check import FLOATS, Rules

_MAX, _SUM_OF_TWO = 0, 1  # group_select_mode
_SOFTMAX, _SIGMOID = 0, 1  # norm_type


def npu_moe_gating_top_k(
    x: Tensor,
    k: int,
    *,
    bias: Tensor | None = None,
    input_ids: Tensor | None = None,
    tid2eid: Tensor | None = None,
    k_group: int = 1,
    group_count: int = 1,
    group_select_mode: int = 0,
    renorm: int = 0,
    norm_type: int = 0,
    out_flag: bool = False,
    routed_scaling_factor: float = 1.0,
    eps: float = 1e-20,
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose the k best experts of each token, optionally from the best groups of experts only.

    In float32: ``norm = softmax(x)`` or ``sigmoid(x)``; experts are ranked by ``norm + bias``, within the
    ``k_group`` best of ``group_count`` equal groups; their weights are ``norm`` without the bias, with
    sigmoid divided by their sum plus ``eps``, times ``routed_scaling_factor``. Of equals the lower expert id
    comes first. Shapes: T tokens, E experts. Differentiable in ``x``.

    Args:
        x: ``[T, E]`` logits, float16, bfloat16 or float32.
        k: experts per token, ``1 .. E / group_count * k_group``.
        bias: ``[E]`` float16, bfloat16 or float32: shifts the ranking, not the weights.
        input_ids: None; the hash mode is not computed here.
        tid2eid: None, likewise.
        k_group: groups that stay, ``1 .. group_count``.
        group_count: equal groups that the experts form, a divisor of E.
        group_select_mode: a group's rank: 0 by its best expert, 1 by the sum of its two best.
        renorm: 0, norm before top-k.
        norm_type: 0 softmax, 1 sigmoid.
        out_flag: whether the caller wants ``norm``. It is returned either way.
        routed_scaling_factor: factor of the weights.
        eps: added to the sum that sigmoid weights are divided by.

    Returns:
        ``y`` ``[T, k]`` in ``x``'s type, best first; ``expert_idx`` ``[T, k]`` int32; ``norm`` ``[T, E]``
        float32.

    Raises:
        ArgumentError: for other forms, types or shapes, and for numbers outside these ranges.
    """
    rules = Rules("npu_moe_gating_top_k", x=x, k=k, bias=bias)
    rules.only("input_ids", input_ids, (None,), "look the experts up before the call: hash mode is not computed here")
    rules.only("tid2eid", tid2eid, (None,), "look the experts up before the call: hash mode is not computed here")
    rules.only("group_select_mode", group_select_mode, (_MAX, _SUM_OF_TWO), "0 ranks by maximum, 1 by the two best")
    rules.only("renorm", renorm, (0,), "divide the weights by their sum after the call")
    rules.only("norm_type", norm_type, (_SOFTMAX, _SIGMOID), "0 is softmax, 1 is sigmoid")
    if rules.tensor(x, "x", (2,), FLOATS):
        _check_groups(rules, x.size(1), k, k_group, group_count, group_select_mode)
        if bias is not None and rules.tensor(bias, "bias", (1,), FLOATS):
            rules.shape("bias", bias, "(E,)", (x.size(1),))
    rules.raise_broken()
    norm = torch.sigmoid(x.float()) if norm_type == _SIGMOID else torch.softmax(x.float(), -1)
    rank = norm if bias is None else norm + bias.float()
    if k_group < group_count:
        rank = _within_best_groups(rank, group_count, k_group, group_select_mode)
    index = _top(rank, k)
    weight = norm.gather(-1, index)
    if norm_type == _SIGMOID:
        weight = weight / (weight.sum(-1, keepdim=True) + eps)
    return (weight * routed_scaling_factor).to(x.dtype), index.to(torch.int32), norm


def npu_moe_gating_top_k_softmax(x: Tensor, finished: Tensor | None = None, k: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Choose the k experts of highest softmax for each token, in float32; of equals the lower id is first.

    Args:
        x: ``[T, E]`` or ``[B, S, E]`` logits (then T = B * S), float16, bfloat16 or float32.
        finished: bool of ``x``'s shape without the last dimension. A finished token gets expert id E in all k
            places, which later operators take for no expert.
        k: experts per token, ``1 .. E``.

    Returns:
        ``y`` in ``x``'s type, best first; ``expert_idx`` int32; ``row_idx`` int32, where place j of token i
        holds ``j * T + i``. All of ``x``'s shape with k as the last dimension.

    Raises:
        ArgumentError: for another type or shape, or a k outside its range.
    """
    rules = Rules("npu_moe_gating_top_k_softmax", x=x, finished=finished, k=k)
    if rules.tensor(x, "x", (2, 3), FLOATS):
        rules.need(1 <= k <= x.size(-1), "k", k, "1..{}", "there are as many experts as logits", x.size(-1))
        if finished is not None and rules.tensor(finished, "finished", (x.dim() - 1,), (torch.bool,)):
            rules.shape("finished", finished, "x.shape[:-1]", tuple(x.shape[:-1]))
    rules.raise_broken()
    norm = torch.softmax(x.float(), -1)
    index = _top(norm, k)
    weight = norm.gather(-1, index).to(x.dtype)
    shape = weight.shape
    num_tokens = x.numel() // x.size(-1)
    row_idx = torch.arange(k * num_tokens, device=x.device).view(k, num_tokens).t().reshape(shape)
    if finished is not None:
        index = index.masked_fill(finished.unsqueeze(-1), x.size(-1))
    return weight, index.to(torch.int32), row_idx.to(torch.int32)


def _top(rank: Tensor, k: int) -> Tensor:
    """Return the ids of the k highest, the lower id first among equals, which topk does not promise."""
    return torch.sort(rank, dim=-1, descending=True, stable=True)[1][..., :k]


def _within_best_groups(rank: Tensor, group_count: int, k_group: int, mode: int) -> Tensor:
    grouped: Tensor = rank.unflatten(1, (group_count, -1))
    score = grouped.amax(-1) if mode == _MAX else grouped.topk(2, -1)[0].sum(-1)
    chosen = torch.zeros_like(score, dtype=torch.bool).scatter(1, _top(score, k_group), True)
    return grouped.masked_fill(~chosen.unsqueeze(-1), -torch.inf).flatten(1)


def _check_groups(rules: Rules, num_experts: int, k: int, k_group: int, group_count: int, mode: int) -> None:
    divides = group_count >= 1 and num_experts % group_count == 0
    if not rules.need(divides, "group_count", group_count, "a divisor of E = {}", "groups are equal", num_experts):
        return
    size = num_experts // group_count
    smallest = 2 if mode == _SUM_OF_TWO and k_group < group_count else 1
    remedy = "group_select_mode 1 adds the two best experts of a group"
    rules.need(size >= smallest, "E / group_count", size, "at least {}", remedy, smallest)
    if rules.need(1 <= k_group <= group_count, "k_group", k_group, "1..{}", "see group_count", group_count):
        remedy = "the {} groups that stay hold {} experts each"
        rules.need(1 <= k <= size * k_group, "k", k, "1..{}", remedy, size * k_group, k_group, size)
