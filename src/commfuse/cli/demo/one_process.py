"""The layer again, in one process and from its definition: float64, expert by expert, nothing travels, no operator is called."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from . import layer as parts
from .layer import Gated, Layer


@dataclass(frozen=True, kw_only=True)
class Exact:
    """What the layer gives for all ranks' tokens in rank order; [tokens, HIDDEN] float64."""

    out: torch.Tensor
    size: torch.Tensor  # the sum of what is added up, without signs


@dataclass(frozen=True, kw_only=True)
class Whole:
    """The layer over the rows that travel, and where those are int8 also over the rows as they were."""

    x: torch.Tensor  # [tokens, HIDDEN] float64
    expert_ids: torch.Tensor  # [tokens, TOP_K]
    as_sent: Exact
    unquantised: Exact | None


def compute(layer: Layer, on_expert: Callable[[int], None] = lambda done: None) -> Whole:
    """Compute the layer for every token; ``on_expert(n)`` is called when n experts are done."""
    with _one_thread():
        return _compute(layer, on_expert)


def _compute(layer: Layer, on_expert: Callable[[int], None]) -> Whole:
    x = torch.cat([parts.token_rows(layer, rank) for rank in range(layer.ranks)])
    expert_ids, weights = _choose(layer, x)
    travelling = [_through_int8(x), x.double()] if layer.int8_rows else [x.double()]
    sums = [_Sum(x) for _ in travelling]
    for expert in range(layer.experts):
        mlp = parts.gated_weights(layer, parts.expert_name(expert))
        token, k = (expert_ids == expert).nonzero(as_tuple=True)
        for rows, total in zip(travelling, sums, strict=True):
            total.add(token, weights[token, k, None] * _gated(mlp, rows[token]))
        on_expert(expert + 1)
    shared = _gated(parts.gated_weights(layer, parts.SHARED), x.double())
    for total in sums:
        total.add(torch.arange(len(x)), shared)
    results = [Exact(out=total.out, size=total.size) for total in sums]
    return Whole(x=x.double(), expert_ids=expert_ids, as_sent=results[0], unquantised=results[1] if layer.int8_rows else None)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Two threads gain a third on an idle machine with two cores, and lose five times as much on a busy one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Sum:
    def __init__(self, x: torch.Tensor) -> None:
        self.out = torch.zeros(x.shape, dtype=torch.float64)
        self.size = torch.zeros(x.shape, dtype=torch.float64)

    def add(self, token: torch.Tensor, rows: torch.Tensor) -> None:
        self.out[token] += rows
        self.size[token] += rows.abs()


def _choose(layer: Layer, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scores = 1 / (1 + torch.exp(-(x.double() @ parts.router_weight(layer).T)))
    expert_ids = scores.argsort(dim=1, descending=True)[:, : parts.TOP_K]
    chosen = scores.gather(1, expert_ids)
    return expert_ids, chosen / chosen.sum(1, keepdim=True)


def _gated(mlp: Gated, rows: torch.Tensor) -> torch.Tensor:
    gate, up = rows @ mlp.gate.double().T, rows @ mlp.up.double().T
    return (gate / (1 + torch.exp(-gate)) * up) @ mlp.down.double().T


def _through_int8(x: torch.Tensor) -> torch.Tensor:
    """Rows as they are after the way as int8: ``q = rint(x * d)`` with ``d = 127 / max|x|`` in float32, times ``1 / d``."""
    wide = x.float()
    d = torch.full((len(x), 1), 127.0) / wide.abs().amax(1, keepdim=True)
    return torch.round(wide * d).double() * d.reciprocal().double()
