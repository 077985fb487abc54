"""Seeded inputs of the operators of this family: the named cases and a generator of random ones.

`case.args(rank)` gives every argument of the operator by its public name (the first one by its name in the
schema), without the group's name:

    [case.args(rank) for rank in range(case.world_size)]

is what the golden of `case.operator` takes. The same case and rank give the same values every time.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

OPERATORS = ("all_gather_base_mm", "mm_reduce_scatter_base", "mm_all_reduce_base", "distribute_barrier")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SCALE = 2.0**-10  # of int8 products, so that none of up to 64 terms leaves the range of float16


class _Draw:
    """Values of one rank of one case, in the order in which they are asked for."""

    def __init__(self, seed: int, rank: int) -> None:
        self._generator = torch.Generator().manual_seed(1009 * seed + rank)

    def normal(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(*shape, generator=self._generator).to(dtype)

    def matrix(self, rows: int, columns: int, *, dtype: torch.dtype, transposed_view: bool) -> Tensor:
        shape = (columns, rows) if transposed_view else (rows, columns)
        values = self.int8(*shape) if dtype == torch.int8 else self.normal(*shape, dtype=dtype)
        return values.t() if transposed_view else values

    def int8(self, *shape: int) -> Tensor:
        return torch.randint(-128, 128, shape, generator=self._generator, dtype=torch.int8)

    def scale(self, *shape: int, largest: float, dtype: torch.dtype) -> Tensor:
        """Positive factors between a tenth of `largest` and `largest`; for int64 their float32 bits."""
        values = (0.1 + 0.9 * torch.rand(*shape, generator=self._generator)) * largest
        return packed_scale(values) if dtype == torch.int64 else values.to(dtype)


def packed_scale(scale: Tensor) -> Tensor:
    """A float32 scale in the int64 form: its bits in the low half, and in the high half what no one may read."""
    return scale.view(torch.int32).to(torch.int64) & 0xFFFFFFFF | 1 << 46


@dataclass(frozen=True, kw_only=True)
class GatherScatterCase:
    """One configuration of `all_gather_base_mm` or `mm_reduce_scatter_base`.

    `m`: rows that each rank gives to the gathered matrix, or gets from the scattered one. `x2_scale`: None for
    floating inputs, else the dtype of the scale of int8 ones.
    """

    id: str
    operator: str = "all_gather_base_mm"
    seed: int = 0
    world_size: int = 2
    m: int = 3
    k: int = 16
    n: int = 5
    dtype: torch.dtype = torch.bfloat16
    bias: bool = False
    transposed_x2: bool = False
    gather_output: bool = True
    x2_scale: torch.dtype | None = None
    x1_scale: bool = False
    output_dtype: torch.dtype | None = None
    comm_mode: str | None = None

    def args(self, rank: int) -> dict[str, Any]:
        """Every argument of `operator` on this rank but the group's name."""
        draw = _Draw(self.seed, rank)
        gathers = self.operator == "all_gather_base_mm"
        rows = self.m if gathers else self.m * self.world_size
        dtype = torch.int8 if self.x2_scale else self.dtype
        args: dict[str, Any] = {
            "self": draw.matrix(rows, self.k, dtype=dtype, transposed_view=False),
            "x2": draw.matrix(self.k, self.n, dtype=dtype, transposed_view=self.transposed_x2),
            "world_size": self.world_size,
            "bias": draw.normal(self.n, dtype=self.dtype) if self.bias else None,
            "x1_scale": draw.scale(rows, 1, largest=1.0, dtype=torch.float32) if self.x1_scale else None,
            "x2_scale": draw.scale(1, self.n, largest=SCALE, dtype=self.x2_scale) if self.x2_scale else None,
            "comm_turn": 0,
            "output_dtype": self.output_dtype,
            "comm_mode": self.comm_mode,
        }
        own = {"gather_index": 0, "gather_output": self.gather_output} if gathers else {"reduce_op": "sum"}
        return {**args, **own}


@dataclass(frozen=True, kw_only=True)
class AllReduceCase:
    """One configuration of `mm_all_reduce_base`.

    `rows`: the leading dimensions of x1. Granularities are "value" `[1]`, "column" `[n]`, "row" `[1, n]` and, for
    antiquant alone, "group" `[ceil(k / group_size), n]`. `antiquant` set means int8 x2, `dequant` set int8 both.
    """

    id: str
    operator: str = "mm_all_reduce_base"
    seed: int = 0
    world_size: int = 2
    rows: tuple[int, ...] = (4,)
    k: int = 16
    n: int = 5
    dtype: torch.dtype = torch.bfloat16
    bias: bool = False
    x3: bool = False
    transposed_x2: bool = False
    antiquant: str = ""
    antiquant_offset: bool = False
    group_size: int = 0
    dequant: str = ""
    dequant_dtype: torch.dtype = torch.float32
    pertoken: bool = False
    comm_quant: str = ""

    def args(self, rank: int) -> dict[str, Any]:
        """Every argument of `mm_all_reduce_base` on this rank but the group's name."""
        draw = _Draw(self.seed, rank)
        int8_x1, int8_x2 = bool(self.dequant), bool(self.dequant or self.antiquant)
        x2_dtype = torch.int8 if int8_x2 else self.dtype
        x1 = draw.int8(*self.rows, self.k) if int8_x1 else draw.normal(*self.rows, self.k, dtype=self.dtype)
        return {
            "x1": x1,
            "x2": draw.matrix(self.k, self.n, dtype=x2_dtype, transposed_view=self.transposed_x2),
            "reduce_op": "sum",
            "bias": self._bias(draw),
            "x3": draw.normal(*self.rows, self.n, dtype=self._output_dtype) if self.x3 else None,
            **self._scales(draw),
            "antiquant_group_size": self.group_size,
            "comm_turn": 0,
        }

    def _bias(self, draw: _Draw) -> Tensor | None:
        if not self.bias:
            return None
        if self.dequant:
            return draw.int8(self.n).to(torch.int32) * 100
        return draw.normal(self.n, dtype=self.dtype)

    def _scales(self, draw: _Draw) -> dict[str, Tensor | None]:
        scales: dict[str, Tensor | None] = dict.fromkeys(
            (
                "antiquant_scale",
                "antiquant_offset",
                "dequant_scale",
                "pertoken_scale",
                "comm_quant_scale_1",
                "comm_quant_scale_2",
            )
        )
        if self.antiquant:
            shape = self._shape(self.antiquant)
            scales["antiquant_scale"] = draw.scale(*shape, largest=2.0**-6, dtype=self.dtype)
            if self.antiquant_offset:
                scales["antiquant_offset"] = draw.int8(*shape).to(self.dtype)
        if self.dequant:
            shape = self._shape(self.dequant)
            scales["dequant_scale"] = draw.scale(*shape, largest=SCALE, dtype=self.dequant_dtype)
        if self.pertoken:
            num_rows = torch.Size(self.rows).numel()
            scales["pertoken_scale"] = draw.scale(num_rows, largest=1.0, dtype=torch.float32)
        if self.comm_quant:
            for name in ("comm_quant_scale_1", "comm_quant_scale_2"):
                shape = self._shape(self.comm_quant)
                scales[name] = draw.scale(*shape, largest=1.0, dtype=self._output_dtype)
        return scales

    def _shape(self, granularity: str) -> tuple[int, ...]:
        if granularity == "group":
            return -(-self.k // self.group_size), self.n
        return {"value": (1,), "column": (self.n,), "row": (1, self.n)}[granularity]

    @property
    def _output_dtype(self) -> torch.dtype:
        if not self.dequant:
            return self.dtype
        return torch.bfloat16 if self.dequant_dtype == torch.bfloat16 else torch.float16


@dataclass(frozen=True, kw_only=True)
class BarrierCase:
    """One configuration of `_npu_distribute_barrier`. `elastic_info` is all zeros: no rank was removed."""

    id: str
    operator: str = "distribute_barrier"
    seed: int = 0
    world_size: int = 2
    shape: tuple[int, ...] = (2, 3)
    dtype: torch.dtype = torch.bfloat16
    time_out: int | None = None
    elastic_info: bool = False

    def args(self, rank: int) -> dict[str, Any]:
        """Every argument of `_npu_distribute_barrier` on this rank but the group's name."""
        elastic_info = torch.zeros(4 + 2 * self.world_size, dtype=torch.int32)
        return {
            "x_ref": (_Draw(self.seed, rank).normal(*self.shape, dtype=torch.float32) * 50).to(self.dtype),
            "world_size": self.world_size,
            "time_out": None if self.time_out is None else torch.tensor([self.time_out]),
            "elastic_info": elastic_info if self.elastic_info else None,
        }


Case = GatherScatterCase | AllReduceCase | BarrierCase

# What each case changes of the default one. Together they take every value of every argument.
_BOTH: dict[str, dict[str, Any]] = {
    "base": {},
    "fp16": {"dtype": torch.float16},
    "float32": {"dtype": torch.float32},
    "one-rank": {"world_size": 1},
    "three-ranks": {"world_size": 3},
    "four-ranks": {"world_size": 4},
    "five-ranks": {"world_size": 5, "m": 1},
    "six-ranks": {"world_size": 6, "m": 1, "dtype": torch.float16},
    "seven-ranks": {"world_size": 7, "m": 2},
    "eight-ranks": {"world_size": 8, "m": 2, "k": 32},
    "no-rows": {"m": 0},
    "one-row": {"m": 1},
    "width-one": {"k": 1, "n": 1},
    "long-inner": {"k": 512, "m": 2, "dtype": torch.float16},
    "bias": {"bias": True},
    "bias-fp16": {"bias": True, "dtype": torch.float16, "transposed_x2": True},
    "bias-float32": {"bias": True, "dtype": torch.float32},
    "transposed-x2": {"transposed_x2": True},
    "comm-mode-ai-cpu": {"comm_mode": "ai_cpu"},
    "comm-mode-aiv": {"comm_mode": "aiv"},
}

_INT8: dict[str, dict[str, Any]] = {
    "int8": {"x2_scale": torch.float32, "x1_scale": True},
    "int8-four-ranks": {"x2_scale": torch.float32, "x1_scale": True, "world_size": 4},
    "int8-transposed-x2": {"x2_scale": torch.float32, "x1_scale": True, "transposed_x2": True},
    "int8-no-x1-scale": {"x2_scale": torch.float32},
    "int8-bias": {"x2_scale": torch.float32, "x1_scale": True, "bias": True},
    "int8-to-fp16": {"x2_scale": torch.float32, "x1_scale": True, "output_dtype": torch.float16},
    "int8-to-bf16": {"x2_scale": torch.float32, "x1_scale": True, "output_dtype": torch.bfloat16},
    "int8-packed-scale": {"x2_scale": torch.int64, "x1_scale": True},
    "int8-packed-scale-no-x1-scale": {"x2_scale": torch.int64, "output_dtype": torch.float16},
}

_GATHER: dict[str, dict[str, Any]] = {
    "no-gather-output": {"gather_output": False},
    "no-gather-output-fp16-bias": {"gather_output": False, "dtype": torch.float16, "bias": True},
    "no-gather-output-no-rows": {"gather_output": False, "m": 0},
}

_ALL_REDUCE: dict[str, dict[str, Any]] = {
    "base": {},
    "fp16": {"dtype": torch.float16},
    "float32": {"dtype": torch.float32},
    "one-rank": {"world_size": 1},
    "three-ranks": {"world_size": 3},
    "four-ranks": {"world_size": 4, "dtype": torch.float16},
    "five-ranks": {"world_size": 5},
    "six-ranks": {"world_size": 6},
    "seven-ranks": {"world_size": 7},
    "eight-ranks": {"world_size": 8, "bias": True},
    "no-rows": {"rows": (0,)},
    "three-dimensions": {"rows": (2, 3)},
    "three-dimensions-no-rows": {"rows": (2, 0)},
    "bias": {"bias": True},
    "x3": {"x3": True},
    "three-dimensions-bias-x3-fp16": {"rows": (2, 3), "bias": True, "x3": True, "dtype": torch.float16},
    "transposed-x2": {"transposed_x2": True},
    "antiquant-value": {"antiquant": "value"},
    "antiquant-value-offset": {"antiquant": "value", "antiquant_offset": True, "dtype": torch.float16},
    "antiquant-column": {"antiquant": "column", "transposed_x2": True},
    "antiquant-column-offset": {"antiquant": "column", "antiquant_offset": True},
    "antiquant-row-float32": {"antiquant": "row", "antiquant_offset": True, "dtype": torch.float32},
    "antiquant-group": {"antiquant": "group", "group_size": 4, "antiquant_offset": True},
    "antiquant-group-uneven": {"antiquant": "group", "group_size": 5, "dtype": torch.float16},
    "antiquant-everything": {
        "antiquant": "group", "group_size": 3, "antiquant_offset": True, "rows": (2, 2), "bias": True, "x3": True,
    },
    "dequant-value": {"dequant": "value", "pertoken": True},
    "dequant-column": {"dequant": "column"},
    "dequant-row-bf16": {"dequant": "row", "dequant_dtype": torch.bfloat16},
    "dequant-packed": {"dequant": "column", "dequant_dtype": torch.int64},
    "dequant-packed-value": {"dequant": "value", "dequant_dtype": torch.int64, "transposed_x2": True},
    "dequant-pertoken-bf16": {"dequant": "column", "dequant_dtype": torch.bfloat16, "pertoken": True},
    "dequant-pertoken-three-dimensions": {"dequant": "column", "pertoken": True, "rows": (2, 3)},
    "dequant-everything": {"dequant": "row", "pertoken": True, "rows": (2, 3), "bias": True, "x3": True},
    "comm-quant-column": {"dequant": "column", "pertoken": True, "comm_quant": "column"},
    "comm-quant-row": {"dequant": "row", "dequant_dtype": torch.bfloat16, "comm_quant": "row", "world_size": 4},
}  # fmt: skip

_BARRIER: dict[str, dict[str, Any]] = {
    "base": {},
    "one-rank": {"world_size": 1},
    "three-ranks": {"world_size": 3, "dtype": torch.float16},
    "eight-ranks": {"world_size": 8, "dtype": torch.float32},
    "int8": {"dtype": torch.int8},
    "empty": {"shape": (0, 4)},
    "one-dimension": {"shape": (7,)},
    "time-out": {"time_out": 1_000_000},
    "elastic-info": {"elastic_info": True},
}


def _gather_scatter(operator: str, variants: dict[str, dict[str, Any]]) -> list[Case]:
    return [
        GatherScatterCase(id=f"{operator}-{name}", operator=operator, seed=seed, **changes)
        for seed, (name, changes) in enumerate(variants.items())
    ]


_INT8_AIV = {name: {"comm_mode": "aiv", **changes} for name, changes in _INT8.items()}

NAMED: list[Case] = [
    *_gather_scatter("all_gather_base_mm", {**_BOTH, **_GATHER, **_INT8_AIV}),
    *_gather_scatter("mm_reduce_scatter_base", {**_BOTH, **_INT8_AIV}),
    *[
        AllReduceCase(id=f"mm_all_reduce_base-{name}", seed=seed, **changes)
        for seed, (name, changes) in enumerate(_ALL_REDUCE.items())
    ],
    *[
        BarrierCase(id=f"distribute_barrier-{name}", seed=seed, **changes)
        for seed, (name, changes) in enumerate(_BARRIER.items())
    ],
]


def random_case(seed: int, *, operator: str = "") -> Case:
    """A small valid configuration drawn from all values of all fields; without `operator`, of any of them."""
    rng = random.Random(seed)
    drawn = operator or OPERATORS[seed % len(OPERATORS)]
    common: dict[str, Any] = {
        "id": f"{drawn}-random-{seed}",
        "operator": drawn,
        "seed": seed,
        "world_size": rng.choice((1, 2, 2, 3, 4, 4, 5, 6, 7, 8)),
        "dtype": rng.choice(DTYPES),
    }
    if drawn == "distribute_barrier":
        return BarrierCase(**common, **_random_barrier(rng))
    common.update(k=rng.randint(1, 64), n=rng.randint(1, 24), bias=rng.random() < 0.4, transposed_x2=rng.random() < 0.4)
    if drawn == "mm_all_reduce_base":
        return AllReduceCase(**{**common, **_random_all_reduce(rng, common["k"])})
    return GatherScatterCase(**{**common, **_random_gather_scatter(rng)})


def _random_gather_scatter(rng: random.Random) -> dict[str, Any]:
    m = rng.choice((0, 1, 2, 3, 5, 8))
    if rng.random() < 0.6:
        comm_mode = rng.choice((None, "ai_cpu", "aiv"))
        gather_output = comm_mode == "aiv" or rng.random() < 0.6
        return {"m": m, "comm_mode": comm_mode, "gather_output": gather_output}
    return {
        "m": m,
        "bias": False,
        "x2_scale": rng.choice((torch.float32, torch.int64)),
        "x1_scale": rng.random() < 0.8,
        "output_dtype": rng.choice((None, torch.float16, torch.bfloat16)),
        "comm_mode": "aiv",
    }


def _random_all_reduce(rng: random.Random, k: int) -> dict[str, Any]:
    rows = rng.choice(((0,), (1,), (4,), (7,), (1, 3), (3, 2), (2, 0)))
    drawn: dict[str, Any] = {"rows": rows, "x3": rng.random() < 0.4}
    form = rng.choice(("floating", "antiquant", "dequant"))
    if form == "antiquant":
        granularity = rng.choice(("value", "column", "row", "group"))
        drawn.update(antiquant=granularity, antiquant_offset=rng.random() < 0.5)
        drawn.update(group_size=rng.randint(1, k) if granularity == "group" else 0)
    elif form == "dequant":
        drawn.update(
            dequant=rng.choice(("value", "column", "row")),
            dequant_dtype=rng.choice((torch.float32, torch.bfloat16, torch.int64)),
            pertoken=rng.random() < 0.5,
            comm_quant=rng.choice(("", "", "column", "row")),
        )
    return drawn


def _random_barrier(rng: random.Random) -> dict[str, Any]:
    return {
        "shape": rng.choice(((1,), (5,), (0, 3), (2, 3), (2, 1, 4))),
        "time_out": rng.choice((None, 1_000_000)),
        "elastic_info": rng.random() < 0.3,
    }
