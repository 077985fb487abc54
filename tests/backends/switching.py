"""Steps that ranks take one after the other: calls of changing living ranks on changing backends, some of them wrong."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

import commfuse
from commfuse import config
from tests.backends.cpu import layer
from tests.faults.work import ids_below

WORLD = 4
BACKENDS = "cpu", "portable", "reference"
WRONG = {  # what one rank does that the others do not, and what all who take part read
    "refused": commfuse.ArgumentError,
    "differs": commfuse.MismatchError,
    "other-operator": commfuse.MismatchError,
    "other-order": commfuse.MismatchError,
    "other-backend": commfuse.MismatchError,
    "bad-table": commfuse.ArgumentError,
    "bad-tables": commfuse.ArgumentError,  # on all ranks
}
NO_TABLE = "bad-table", "bad-tables"  # which leaves others in doubt about who takes part


@dataclass(frozen=True, kw_only=True)
class Step:
    """One call of ``ranks``, in the order of their ids, on ``backend``; ``wrong`` on rank ``by``, '' for a right one."""

    backend: str
    ranks: tuple[int, ...]
    wrong: str = ""
    by: int = 0
    pauses: tuple[float, ...] = (0.0,) * WORLD  # seconds of each rank's own work before it


def sequence(seed: int, length: int, wrong: float = 0.15, pause: float = 0.3) -> Iterator[Step]:
    """Draw steps; ``wrong`` and ``pause`` are the shares of wrong calls and of ranks that come late."""
    draw = random.Random(seed)
    backend, ranks = "cpu", tuple(range(WORLD))
    for _ in range(length):
        if draw.random() < 0.3:
            backend = draw.choice(BACKENDS)
        if draw.random() < 0.7:
            ranks = tuple(draw.sample(range(WORLD), draw.choice((1, 2, 2, 3, 3, 3, 4, 4))))
            ranks = ranks if draw.random() < 0.3 else tuple(sorted(ranks))
        by = draw.choice(ranks)
        kinds = [kind for kind in WRONG if kind not in NO_TABLE or len(ranks) == WORLD]
        yield Step(
            backend=backend,
            ranks=ranks,
            wrong=draw.choice(kinds) if draw.random() < wrong and len(ranks) > 1 else "",
            by=by,
            pauses=tuple(draw.expovariate(500) if draw.random() < pause else 0.0 for _ in range(WORLD)),
        )


def take(rank: int, step: Step, seed: int) -> str:
    """Take one step on this rank; '' or what is not as it must be."""
    busy_until = time.perf_counter() + step.pauses[rank]
    while time.perf_counter() < busy_until:
        pass
    if rank not in step.ranks:
        return ""
    wrong = step.wrong if rank == step.by or step.wrong == "bad-tables" else ""
    backend = "portable" if step.backend != "portable" else "reference"
    try:
        with config.override(backend=backend if wrong == "other-backend" else step.backend):
            right = one_round(rank, step.ranks, seed, wrong)
    except commfuse.CommfuseError as error:
        if step.wrong and type(error) is WRONG[step.wrong]:
            return ""
        return f"{type(error).__name__}: {error}"
    if step.wrong:
        return "no error"
    return "" if right else "other results"


def one_round(rank: int, ranks: tuple[int, ...], seed: int, wrong: str = "") -> bool:
    """Dispatch and combine of ``ranks``, on this one with something ``wrong``; whether the result is right."""
    world = dist.get_world_size()
    info = None if ranks == tuple(range(world)) else table(ranks, world)
    if wrong == "other-order":
        info = table((*ranks[1:], ranks[0]), world)
    if wrong in NO_TABLE:
        info = table(ranks, world).fill_(99)
    ids = ids_below(2 * len(ranks), rank, seed)
    args: dict[str, Any] = {"elastic_info": info, "moe_expert_num": 2 * world, "expert_ids": ids}
    if wrong == "refused":
        ids[0, 0] = 99
    if wrong == "differs":
        args["global_bs"] = 4 * world
    if wrong == "other-operator":
        commfuse._npu_distribute_barrier(torch.ones(1), layer.common(rank, world)["group_ep"], world, elastic_info=info)
        return True
    out = layer.dispatch(rank, world, seed, **args)
    x = layer.combine(rank, world, out, out[0] * 2, seed, **args)
    return torch.equal(x, layer.expected(rank, seed=seed))


def told(call: Callable[[], object]) -> tuple[str, str]:
    """Kind and text of what ``call`` raises; empty if nothing."""
    try:
        call()
    except commfuse.CommfuseError as error:
        return type(error).__name__, str(error)
    return "", ""


def table(ranks: tuple[int, ...], world: int) -> torch.Tensor:
    """The elastic_info with which ``ranks`` go on, in this order; two experts on each."""
    new_ids = [ranks.index(rank) if rank in ranks else -1 for rank in range(world)]
    gone = [-1] * (world - len(ranks))
    return torch.tensor([1, len(ranks), 0, 2 * len(ranks), *new_ids, *ranks, *gone], dtype=torch.int32)
