"""What the window holds, against the rows that arrive: experts write in place and touch valid rows only."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

import commfuse
from commfuse import config
from tests.conftest import RunRanks
from tests.faults.bodies import world

from . import core  # noqa: F401 - skips where the core is not built

TOP_K, EXPERTS = 8, 32


def worst(rank: int, world_size: int, num_tokens: int, hidden: int, held: bool) -> float:
    """The window's memory over the bytes of the rows that arrived, the most of six round trips.

    ``held``: the latest output is still there when the next call is made.
    """
    slabs = importlib.import_module("commfuse.backends.cpu.slabs").own()
    before = slabs.arena.allocated_bytes()
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(num_tokens, hidden, generator=generator).bfloat16()
    weights = torch.rand(num_tokens, TOP_K, generator=generator)
    place: tuple[Any, ...] = (world(), world_size, rank, EXPERTS)
    most, out = 0.0, None
    with config.override(backend="cpu"):
        for _ in range(6):
            ids = torch.rand(num_tokens, EXPERTS, generator=generator).argsort(1)[:, :TOP_K].int()
            out = out if held else None
            out = commfuse.npu_moe_distribute_dispatch_v2(x, ids, *place)
            total = int(out[4][-1])
            out[0][:total].mul_(2)
            commfuse.npu_moe_distribute_combine_v2(out[0], ids, out[2], out[4], weights, *place)
            most = max(most, (slabs.arena.allocated_bytes() - before) / (total * hidden * 2))
    return most


SIZES = [(4, 256, 1024), pytest.param((16, 512, 7168), marks=pytest.mark.long)]


@pytest.mark.parametrize("sizes", SIZES, ids=["small", "EP 16"])
@pytest.mark.parametrize(("held", "limit"), [(False, 1.5), (True, 2.5)], ids=["dropped", "held"])
def test_the_window_is_little_more_than_the_rows(
    run_ranks: RunRanks, no_ranks: None, sizes: tuple[int, int, int], held: bool, limit: float
) -> None:
    found = run_ranks(sizes[0], worst, *sizes, held)
    assert max(found) <= limit, found
    assert min(found) > (1.9 if held else 0.9), "the rows are not where this looks"
