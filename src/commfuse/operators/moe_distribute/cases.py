"""The configurations that every implementation of dispatch and combine v2 is held against.

`NAMED` changes a field or two of one base case at a time and together takes every value of every argument.
`random_case` draws a valid combination of everything.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import torch

from .round_trip import RoundTrip

__all__ = ["NAMED", "RoundTrip", "random_case"]

COMM_ALGS = ("", "fullmesh", "hierarchy", "fullmesh_v1", "fullmesh_v2", "ccu")

_BASE = RoundTrip(id="base")


def _case(name: str, **changes: Any) -> RoundTrip:
    """The base case with some fields changed. Unless said otherwise, every rank has 5 tokens."""
    world_size = changes.get("world_size", _BASE.world_size)
    return replace(_BASE, id=name, **{"num_tokens": (5,) * world_size, **changes})


_SIZES = [
    _BASE,
    _case("one-rank", world_size=1, moe_expert_num=4),
    _case("two-ranks", world_size=2),
    _case("three-ranks", world_size=3, moe_expert_num=9),
    _case("five-ranks-one-expert-each", world_size=5, moe_expert_num=5),
    _case("eight-ranks", world_size=8, moe_expert_num=16, num_tokens=(3,) * 8),
    _case("eight-ranks-with-expert-scales", world_size=8, num_tokens=(2,) * 8, with_expert_scales=True),
    _case("hidden-one", hidden=1),
    _case("hidden-not-a-multiple-of-eight", hidden=37),
    _case("hidden-wide", hidden=1024, num_tokens=(2,) * 4),
    _case("top-one", top_k=1),
    _case("top-all", top_k=8),
    _case("one-token", num_tokens=(1,) * 4),
    _case("no-token-anywhere", num_tokens=(0,) * 4),
    _case("many-tokens", num_tokens=(40,) * 4, hidden=8),
    _case("uneven-batches", num_tokens=(5, 1, 4, 2), global_bs="max"),
    _case("uneven-batches-spare", num_tokens=(5, 1, 4, 2), global_bs="spare"),
    _case("uneven-batches-some-empty", num_tokens=(0, 6, 0, 3), global_bs="max"),
    _case("only-the-last-rank-has-tokens", num_tokens=(0, 0, 0, 4), global_bs="max"),
    _case("equal-batches-global-bs-given", global_bs="max"),
    _case("warm-up", num_tokens=(1,) * 4, quant_mode=2, shared_expert_num=0, global_bs="max"),
]

_ROWS = [
    _case("fp16", dtype=torch.float16),
    _case("float32", dtype=torch.float32),
    _case("int8", quant_mode=2),
    _case("int8-fp16", quant_mode=2, dtype=torch.float16),
    _case("int8-float32", quant_mode=2, dtype=torch.float32),
    _case("int8-smooth", quant_mode=2, smooth=True),
    _case("int8-smooth-hidden-37", quant_mode=2, smooth=True, hidden=37, dtype=torch.float16),
    _case("extreme-bf16", values="extreme"),
    _case("extreme-int8-bf16", values="extreme", quant_mode=2),
    _case("extreme-int8-fp16", values="extreme", quant_mode=2, dtype=torch.float16),
    _case("extreme-int8-float32-smooth", values="extreme", quant_mode=2, smooth=True, dtype=torch.float32),
    _case("extreme-wire-bf16", values="extreme", comm_quant_mode=2),
    _case("extreme-wire-fp16", values="extreme", comm_quant_mode=2, dtype=torch.float16),
    _case("nonfinite-bf16", values="nonfinite"),
    _case("nonfinite-int8", values="nonfinite", quant_mode=2),
    _case("nonfinite-wire", values="nonfinite", comm_quant_mode=2),
    _case("wire-int8", comm_quant_mode=2),
    _case("wire-int8-fp16", comm_quant_mode=2, dtype=torch.float16),
    _case("wire-int8-float32", comm_quant_mode=2, dtype=torch.float32),
    _case("wire-int8-hidden-37", comm_quant_mode=2, hidden=37),
    _case("wire-int8-and-rows-int8", comm_quant_mode=2, quant_mode=2, smooth=True),
    _case("non-contiguous", non_contiguous=True),
    _case("non-contiguous-int8-2d-mask", non_contiguous=True, quant_mode=2, smooth=True, mask="2d"),
    _case("token-nums-prefix-sums", expert_token_nums_type=0),
]

_ROUTES = [
    _case("all-to-one-expert", routing="one-expert", top_k=1),
    _case("all-to-the-first-experts", routing="one-expert"),
    _case("zipf", routing="zipf", num_tokens=(9,) * 4),
    _case("mask-1d", mask="1d"),
    _case("mask-2d", mask="2d"),
    _case("mask-1d-all-false", mask="1d-false"),
    _case("mask-2d-all-false", mask="2d-false"),
    _case("mask-1d-uneven-batches", mask="1d", num_tokens=(5, 0, 3, 4), global_bs="max"),
    _case("mask-2d-with-expert-scales", mask="2d", with_expert_scales=True),
    _case("mask-2d-int8-fp16", mask="2d", quant_mode=2, dtype=torch.float16),
    _case("with-expert-scales", with_expert_scales=True),
    *[_case(f"comm-alg-{name.replace('_', '-')}", comm_alg=name) for name in COMM_ALGS if name != "hierarchy"],
    _case("comm-alg-hierarchy", comm_alg="hierarchy", with_expert_scales=True),
    _case("performance-info", with_performance_info=True),
]

_SHARED = [
    _case("shared-expert-num-zero", shared_expert_num=0),
    _case("one-shared-rank", shared_expert_rank_num=1, moe_expert_num=6),
    _case("one-shared-expert-two-ranks", shared_expert_rank_num=2, moe_expert_num=4),
    _case("one-shared-expert-uneven-replicas", world_size=5, shared_expert_rank_num=2, moe_expert_num=6),
    _case("two-shared-experts", shared_expert_num=2, shared_expert_rank_num=2, moe_expert_num=4),
    _case("two-shared-experts-replicated", world_size=7, shared_expert_num=2, shared_expert_rank_num=4,
          moe_expert_num=6),
    _case("four-shared-experts", world_size=6, shared_expert_num=4, shared_expert_rank_num=4,
          moe_expert_num=8),
    _case("shared-mask-2d", shared_expert_rank_num=2, moe_expert_num=4, mask="2d"),
    _case("shared-mask-all-false", shared_expert_rank_num=1, moe_expert_num=6, mask="1d-false"),
    _case("shared-int8-smooth", shared_expert_num=2, shared_expert_rank_num=2, moe_expert_num=4,
          quant_mode=2, smooth=True),
    _case("shared-wire-int8", shared_expert_rank_num=1, moe_expert_num=6, comm_quant_mode=2),
    _case("shared-uneven-batches", shared_expert_rank_num=2, moe_expert_num=4, num_tokens=(0, 3, 1, 5),
          global_bs="max"),
    _case("shared-expert-x", shared_expert_x=2),
    _case("shared-expert-x-3d", shared_expert_x=3, num_tokens=(6,) * 4),
    _case("shared-expert-x-3d-masked", shared_expert_x=3, mask="1d", non_contiguous=True),
]  # fmt: skip

_SPECIAL = [
    _case("zero-experts", zero_expert_num=2),
    _case("copy-experts", copy_expert_num=2),
    _case("const-experts", const_expert_num=2),
    _case("const-experts-alpha-2d", const_expert_num=2, alpha="2d"),
    _case("all-special-experts", zero_expert_num=1, copy_expert_num=2, const_expert_num=1),
    _case("all-special-experts-fp16-2d-mask", zero_expert_num=1, copy_expert_num=1, const_expert_num=2,
          alpha="2d", dtype=torch.float16, mask="2d"),
    _case("only-special-experts", zero_expert_num=1, copy_expert_num=1, const_expert_num=1,
          routing="special"),
    _case("only-zero-experts", zero_expert_num=3, routing="special", shared_expert_x=2),
    _case("more-experts-per-token-than-moe-experts", world_size=2, moe_expert_num=2, top_k=5,
          zero_expert_num=1, copy_expert_num=1, const_expert_num=1),
    _case("special-and-shared", copy_expert_num=2, const_expert_num=1, shared_expert_rank_num=1,
          moe_expert_num=6),
    _case("special-int8-non-contiguous", copy_expert_num=1, const_expert_num=1, quant_mode=2,
          non_contiguous=True),
]  # fmt: skip

_TENSOR_PARALLEL = [
    _case("tp-one", tp_world_size=1),
    _case("tp-two", tp_world_size=2, moe_expert_num=4),
    _case("tp-two-fp16", tp_world_size=2, moe_expert_num=4, dtype=torch.float16),
    _case("tp-two-one-ep-rank", tp_world_size=2, world_size=1, moe_expert_num=1, top_k=1),
    _case("tp-two-shared", tp_world_size=2, shared_expert_rank_num=1, moe_expert_num=3),
    _case("tp-two-int8-smooth", tp_world_size=2, moe_expert_num=4, quant_mode=2, smooth=True),
    _case("tp-two-mask-2d", tp_world_size=2, moe_expert_num=4, mask="2d", expert_token_nums_type=0),
    _case("tp-two-uneven-batches", tp_world_size=2, moe_expert_num=4, num_tokens=(2, 0, 5, 1),
          global_bs="max"),
    _case("tp-two-special", tp_world_size=2, moe_expert_num=4, zero_expert_num=1, copy_expert_num=1,
          const_expert_num=1),
    _case("tp-two-all-false", tp_world_size=2, moe_expert_num=4, mask="1d-false"),
]  # fmt: skip

_ELASTIC = [
    _case("elastic-flag-zero", elastic_flag_zero=True),
    _case("elastic-flag-zero-shared", elastic_flag_zero=True, shared_expert_rank_num=2, moe_expert_num=4),
    _case("elastic-one-dead", alive=(0, 1, 3)),
    _case("elastic-rank-zero-dead", alive=(1, 2, 3)),
    _case("elastic-ids-reordered", alive=(3, 0, 2)),
    _case("elastic-one-left", alive=(2,), top_k=2),
    _case("elastic-nobody-dead", alive=(0, 1, 2, 3)),
    # Rank 2 held MoE experts before and holds the shared expert now.
    _case("elastic-moe-rank-becomes-shared", world_size=6, shared_expert_rank_num=2, moe_expert_num=8,
          alive=(2, 3, 4, 5), alive_shared_rank_num=1),
    # Ranks 0 and 1 held the shared expert before; rank 1 holds MoE experts now.
    _case("elastic-shared-rank-becomes-moe", world_size=6, shared_expert_rank_num=2, moe_expert_num=8,
          alive=(0, 1, 3, 5), alive_shared_rank_num=1),
    _case("elastic-more-shared-ranks", world_size=8, shared_expert_rank_num=2, moe_expert_num=12,
          alive=(0, 1, 2, 4, 5, 7), alive_shared_rank_num=3, num_tokens=(3,) * 8),
    _case("elastic-two-shared-experts", world_size=8, shared_expert_num=2, shared_expert_rank_num=4,
          moe_expert_num=8, alive=(0, 2, 3, 6, 7), alive_shared_rank_num=2, num_tokens=(3,) * 8, mask="2d"),
    _case("elastic-special-experts", alive=(0, 2, 3), zero_expert_num=1, copy_expert_num=1,
          const_expert_num=1),
    _case("elastic-int8-uneven-batches", alive=(3, 1, 0), num_tokens=(2, 5, 0, 0), global_bs="max",
          quant_mode=2, smooth=True, expert_token_nums_type=0),
    _case("elastic-wire-int8-performance-info", alive=(0, 1, 3), comm_quant_mode=2,
          with_performance_info=True),
]  # fmt: skip

NAMED: list[RoundTrip] = [*_SIZES, *_ROWS, *_ROUTES, *_SHARED, *_SPECIAL, *_TENSOR_PARALLEL, *_ELASTIC]


def random_case(seed: int) -> RoundTrip:
    """A small valid configuration; the same one for the same `seed`."""
    rng = random.Random(seed)
    fields = {**_draw_ranks(rng), **_draw_rows(rng)}
    case = replace(_BASE, id=f"random-{seed}", seed=seed, **fields)
    return replace(case, **_draw_routing(rng, case))


def _draw_ranks(rng: random.Random) -> dict[str, Any]:
    """Ranks, their experts and their tokens."""
    world_size = rng.randint(1, 8)
    shared = [(num, num * g) for num in (1, 2, 3, 4) for g in (1, 2, 3) if num * g < world_size]
    shared_num, shared_ranks = rng.choice([(0, 0), (1, 0), rng.choice([*shared, (1, 0)])])
    tp_world_size = rng.choice([0, 0, 0, 1, 2])
    experts_per_rank = 1 if tp_world_size == 2 else rng.randint(1, 4)
    global_bs = rng.choice(["zero", "max", "spare"])
    tokens = rng.randint(0, 6)
    num_tokens = [tokens if global_bs == "zero" else rng.randint(0, 6) for _ in range(world_size)]
    alive, alive_shared = None, 0
    if tp_world_size != 2 and rng.random() < 0.25:
        moe_ranks = world_size - shared_ranks
        alive, alive_shared = _draw_survivors(rng, world_size, shared_num if shared_ranks else 0, moe_ranks)
    return {
        "world_size": world_size,
        "tp_world_size": tp_world_size,
        "shared_expert_num": shared_num,
        "shared_expert_rank_num": shared_ranks,
        "moe_expert_num": experts_per_rank * (world_size - shared_ranks),
        "global_bs": global_bs,
        "num_tokens": tuple(num_tokens),
        "alive": alive,
        "alive_shared_rank_num": alive_shared,
        "elastic_flag_zero": tp_world_size != 2 and alive is None and rng.random() < 0.15,
        "shared_expert_x": rng.choice([None, 2, 3]) if shared_ranks == 0 else None,
    }


def _draw_survivors(rng: random.Random, world_size: int, shared_num: int, moe_ranks: int) -> tuple[tuple[int, ...], int]:
    """The living ranks in the order of their new ids, and how many of them hold shared experts.

    There are never more MoE ranks than before: the ids of further experts would be those of special experts.
    """
    shared_ranks = range(shared_num, world_size, shared_num) if shared_num else [0]
    splits = [(shared, moe) for shared in shared_ranks for moe in range(1, moe_ranks + 1) if shared + moe <= world_size]
    shared, moe = rng.choice(splits)
    return tuple(rng.sample(range(world_size), shared + moe)), shared


def _draw_rows(rng: random.Random) -> dict[str, Any]:
    """What a row is made of and how it travels."""
    quant_mode = rng.choice([0, 2])
    return {
        "hidden": rng.choice([1, 2, 7, 8, 16, 24, 33, 40]),
        "dtype": rng.choice([torch.bfloat16, torch.float16, torch.float32]),
        "quant_mode": quant_mode,
        "smooth": quant_mode == 2 and rng.random() < 0.5,
        "values": rng.choice(["normal", "normal", "extreme"]),
        "mask": rng.choice([None, None, "1d", "2d", "1d-false", "2d-false"]),
        "expert_token_nums_type": rng.choice([0, 1]),
        "comm_alg": rng.choice(COMM_ALGS),
        "with_expert_scales": rng.random() < 0.3,
        "alpha": rng.choice(["1d", "2d"]),
        "non_contiguous": rng.random() < 0.3,
        "with_performance_info": rng.random() < 0.2,
    }


def _draw_routing(rng: random.Random, case: RoundTrip) -> dict[str, Any]:
    """Special experts, K and the way the ids are drawn: whatever the living experts allow."""
    kinds = {f"{kind}_expert_num": rng.choice([0, 0, 1, 2]) for kind in ("zero", "copy", "const")}
    specials = sum(kinds.values())
    top_k = rng.randint(1, min(6, case.living_expert_num + specials))
    routing = rng.choice(["uniform", "uniform", "zipf", "one-expert", *["special"] * (specials >= top_k)])
    return {
        **kinds,
        "top_k": top_k,
        "routing": routing,
        "comm_quant_mode": 0 if case.tp_world_size == 2 else rng.choice([0, 2]),
        "with_expert_scales": case.with_expert_scales or case.comm_alg == "hierarchy",
    }
