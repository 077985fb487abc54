"""What one process does for the demo, phase by phase. Its state stays here between the phases, which the parent starts one by one."""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch.nn.functional import silu

import commfuse

from ... import backends, groups
from ...errors import CommfuseError
from . import layer as parts
from .layer import Gated, Layer


@dataclass(kw_only=True)
class Here:
    """This rank's part of the layer, and what the phases have made so far."""

    rank: int
    layer: Layer
    x: torch.Tensor
    router: torch.Tensor
    experts: list[Gated]
    shared: Gated
    made: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a rank tells about its part."""

    backend: str
    transport: str
    out: torch.Tensor  # [tokens, HIDDEN] bfloat16
    expert_ids: torch.Tensor  # [tokens, TOP_K]
    rows_per_expert: list[int]  # received, per local expert
    rows_per_source: list[int]  # received, per rank that sent them


_state: list[Here] = []


def prepare(rank: int, layer: Layer, backend: str) -> CommfuseError | None:
    """Make this rank's tokens and its experts' weights, and send one token around, so that connections stand."""
    commfuse.config.set(backend=backend)
    _state[:] = [
        Here(
            rank=rank,
            layer=layer,
            x=parts.token_rows(layer, rank),
            router=parts.router_weight(layer),
            experts=[
                parts.gated_weights(layer, parts.expert_name(rank * layer.experts_per_rank + i))
                for i in range(layer.experts_per_rank)
            ],
            shared=parts.gated_weights(layer, parts.SHARED),
        )
    ]
    try:
        _warm_up(_state[0])
    except CommfuseError as error:
        return error
    return None


def phase(rank: int, name: str) -> float | CommfuseError:
    """Carry out one of `PHASES` once all ranks are there; return the seconds it took here, or commfuse's refusal."""
    here = _state[0]
    dist.barrier()
    begin = time.perf_counter()
    try:
        PHASES[name](here)
    except CommfuseError as error:
        return error
    return time.perf_counter() - begin


def report(rank: int) -> bytes:
    """Return the pickled `Report` of this rank."""
    here = _state[0]
    counts = torch.diff(here.made["ep_recv_counts"], prepend=torch.zeros(1, dtype=torch.int32))
    return pickle.dumps(
        Report(
            backend=backends.of(groups.resolve(_group())).name,
            transport=dist.get_backend(),
            out=here.made["out"],
            expert_ids=here.made["expert_ids"],
            rows_per_expert=here.made["expert_token_nums"].tolist(),
            rows_per_source=counts.view(here.layer.experts_per_rank, here.layer.ranks).sum(0).tolist(),
        )
    )


def _router(here: Here) -> None:
    """Choose each token's experts: sigmoid scores, the best TOP_K, weights that sum to 1.

    In float64, so that one process with all tokens chooses alike: a float32 sum depends on how many rows are multiplied at once.
    """
    scores = torch.sigmoid(here.x.double() @ here.router.T)
    best, ids = scores.topk(parts.TOP_K, dim=1)
    here.made["expert_ids"] = ids.int()
    here.made["expert_scales"] = (best / best.sum(1, keepdim=True)).float()


def _dispatch(here: Here) -> None:
    names = ("expand_x", "dynamic_scales", "assist", "expert_token_nums", "ep_recv_counts")
    outputs = commfuse.npu_moe_distribute_dispatch_v2(
        here.x,
        here.made["expert_ids"],
        _group(),
        here.layer.ranks,
        here.rank,
        here.layer.experts,
        quant_mode=2 if here.layer.int8_rows else 0,
    )
    here.made.update(zip(names, outputs, strict=False))


def _experts(here: Here) -> None:
    """Run each expert over its block of the received rows; rows behind the last block are never touched.

    bfloat16 rows are replaced in place: what dispatch has allocated, combine may be able to send without a copy.
    """
    expand_x, scales = here.made["expand_x"], here.made["dynamic_scales"]
    y = torch.empty_like(expand_x, dtype=torch.bfloat16) if here.layer.int8_rows else expand_x
    first = 0
    for weights, count in zip(here.experts, here.made["expert_token_nums"].tolist(), strict=True):
        rows = expand_x[first : first + count].float()
        if here.layer.int8_rows:
            rows *= scales[first : first + count, None]
        y[first : first + count] = _gated(weights, rows)
        first += count
    here.made["y"] = y


def _shared_expert(here: Here) -> None:
    here.made["shared_expert_x"] = _gated(here.shared, here.x.float()).bfloat16()


def _combine(here: Here) -> None:
    here.made["out"] = commfuse.npu_moe_distribute_combine_v2(
        here.made["y"],
        here.made["expert_ids"],
        here.made["assist"],
        here.made["ep_recv_counts"],
        here.made["expert_scales"],
        _group(),
        here.layer.ranks,
        here.rank,
        here.layer.experts,
        shared_expert_x=here.made["shared_expert_x"],
    )


PHASES: dict[str, Callable[[Here], None]] = {
    "router": _router,
    "dispatch": _dispatch,
    "experts": _experts,
    "shared expert": _shared_expert,
    "combine": _combine,
}


def _gated(weights: Gated, rows: torch.Tensor) -> torch.Tensor:
    """Return ``down(silu(gate x) * up x)`` for float32 ``rows`` [n, HIDDEN]."""
    both = rows @ torch.cat([weights.gate, weights.up]).float().T
    gate, up = both.chunk(2, dim=1)
    return (silu(gate) * up) @ weights.down.float().T


def _warm_up(here: Here) -> None:
    """One token per rank to the first experts, without a combine, as serving code warms up."""
    ids = torch.arange(parts.TOP_K, dtype=torch.int32)[None]
    commfuse.npu_moe_distribute_dispatch_v2(
        here.x[:1], ids, _group(), here.layer.ranks, here.rank, here.layer.experts, quant_mode=2
    )


def _group() -> dist.ProcessGroup:
    world = dist.group.WORLD
    assert world is not None
    return world
