"""What one process does to measure a fused matmul: every method takes its turn, and turn i of all methods is compared as one pair."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ... import config
from ...compare import outside
from .barrier import Barrier
from .matmul_methods import PROBLEMS, Problem
from .matmul_shapes import COMPUTE, OWN, Shape
from .proof import counting_exchanges, proof_of

Turns = dict[str, list[tuple[int, int]]]
"""By method, this rank's clock before and after each turn, in nanoseconds; the same clock on all ranks."""

# |difference| <= relative * |expected| + absolute. Results are near 1. commfuse rounds a float32 sum once; the plain ways round
# the product of every rank before they sum.
_BOUNDS = {OWN: (2**-7, 2**-10)}
_PLAIN_BOUNDS = (2**-7, 2**-5)


@dataclass(frozen=True, kw_only=True)
class _Here:
    barrier: Barrier
    methods: dict[str, Callable[[], torch.Tensor]]


_state: list[_Here] = []


def make(rank: int, shape: Shape, barrier_path: str) -> tuple[str, ...]:
    """Make inputs and methods of ``shape``, run each once and compare its result; return what is wrong, nothing if all is well."""
    torch.set_num_threads(1)
    group = _group(shape.ranks)
    problem: Problem = PROBLEMS[shape.operator](shape, rank, group)
    methods = problem.methods()
    _state[:] = [_Here(barrier=Barrier(barrier_path, rank, shape.ranks), methods=methods)]
    wanted = problem.expected()
    with config.override(backend=OWN):
        methods[OWN]()  # the first call of a group makes its connections
        with counting_exchanges() as exchanges:
            results = {name: method() for name, method in methods.items()}
        found = [proof_of(group, exchanges).wrong(OWN)]
    found += [
        outside(f"{shape.title}, {name}", wanted, result, _BOUNDS.get(name, _PLAIN_BOUNDS))
        for name, result in results.items()
        if name != COMPUTE
    ]
    return tuple(f"rank {rank}, {text}" for text in found if text)


def measure(rank: int, turns: int) -> Turns:
    """Let every method take its turn, ``turns`` times."""
    here, clock = _state[0], time.perf_counter_ns
    taken: Turns = {name: [] for name in here.methods}
    with config.override(backend=OWN):
        for _ in range(turns):
            for name, method in here.methods.items():
                here.barrier.wait()
                begin = clock()
                method()
                taken[name].append((begin, clock()))
    return taken


_groups: dict[int, str] = {}


def _group(world_size: int) -> str:
    """The group for commfuse, made once in a process: every shape of this world size runs on it."""
    if world_size not in _groups:
        _groups[world_size] = dist.new_group(list(range(world_size))).group_name
    return _groups[world_size]
