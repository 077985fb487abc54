"""Seeded inputs of both operators of this family: the named cases and a generator of random ones.

`case.args(rank)` gives every argument of the operator by its public name, without the group's name:

    [case.args(rank) for rank in range(case.world_size)]

is what the golden of `case.operator` takes. The same case and rank give the same values every time.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

OPERATORS = ("gmm_alltoallv", "alltoallv_gmm")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
Matrix = npt.NDArray[np.int64]

COUNT_TYPES: dict[str, Callable[[list[int]], Any]] = {
    "list": list,
    "tuple": tuple,
    "list_of_numpy_ints": lambda counts: [np.int64(count) for count in counts],
    "numpy_int64": lambda counts: np.array(counts, dtype=np.int64),
    "numpy_int32": lambda counts: np.array(counts, dtype=np.int32),
    "tensor_int64": lambda counts: torch.tensor(counts, dtype=torch.int64),
    "tensor_int32": lambda counts: torch.tensor(counts, dtype=torch.int32),
}

PATTERNS = (
    "uniform",
    "random",
    "sparse",
    "empty_expert",
    "silent_sender",
    "idle_receiver",
    "one_receiver",
    "local_only",
    "zero",
)


def count_matrix(seed: int, *, world_size: int, num_experts: int, pattern: str = "random", largest: int = 4) -> Matrix:
    """Rows from rank to rank and expert: `[source rank, destination rank, local expert]`, each `0..largest`.

    The local expert belongs to the source for `gmm_alltoallv` and to the destination for `alltoallv_gmm`.
    `pattern` is one of PATTERNS; ValueError for any other.
    """
    rng = np.random.default_rng(seed)
    matrix = rng.integers(0, largest + 1, (world_size, world_size, num_experts))
    chosen = int(rng.integers(world_size))
    if pattern == "uniform":
        matrix[:] = largest
    elif pattern == "sparse":
        matrix *= rng.random(matrix.shape) < 0.3
    elif pattern == "empty_expert":
        matrix[:, :, rng.integers(num_experts)] = 0
    elif pattern == "silent_sender":
        matrix[chosen] = 0
    elif pattern == "idle_receiver":
        matrix[:, chosen] = 0
    elif pattern == "one_receiver":
        matrix *= (np.arange(world_size) == chosen)[None, :, None]
    elif pattern == "local_only":
        matrix *= np.eye(world_size, dtype=np.int64)[:, :, None]
    elif pattern == "zero":
        matrix[:] = 0
    elif pattern != "random":
        raise ValueError(f"no count pattern {pattern!r}")
    return matrix


def count_lists(matrix: Matrix) -> list[tuple[list[int], list[int]]]:
    """Per rank `(send_counts, recv_counts)` that tell the same story on all ranks: entry `peer * e + expert`."""
    return [(matrix[rank].ravel().tolist(), matrix[:, rank].ravel().tolist()) for rank in range(len(matrix))]


@dataclass(frozen=True, kw_only=True)
class GmmCase:
    """One configuration. `BS` 0 means no shared expert; `strided` makes every tensor a transposed view."""

    id: str
    operator: str = "gmm_alltoallv"
    seed: int = 0
    world_size: int = 2
    num_experts: int = 2
    pattern: str = "random"
    largest: int = 4
    counts_type: str = "list"
    H1: int = 8
    N1: int = 6
    dtype: torch.dtype = torch.bfloat16
    trans_gmm_weight: bool = False
    BS: int = 0
    H2: int = 5
    N2: int = 7
    trans_mm_weight: bool = False
    permute_out_flag: bool = False
    strided: bool = False

    def counts(self) -> list[tuple[list[int], list[int]]]:
        """Per rank `(send_counts, recv_counts)`."""
        return count_lists(
            count_matrix(
                self.seed,
                world_size=self.world_size,
                num_experts=self.num_experts,
                pattern=self.pattern,
                largest=self.largest,
            )
        )

    def args(self, rank: int) -> dict[str, Any]:
        """Every argument of `operator` on this rank but the group's name."""
        generator = torch.Generator().manual_seed(1009 * self.seed + rank)
        send, recv = self.counts()[rank]
        as_counts = COUNT_TYPES[self.counts_type]
        args: dict[str, Any] = {
            "gmm_x": self._values(generator, sum(send), self.H1),
            "gmm_weight": self._weight(generator, self.trans_gmm_weight, self.num_experts, self.H1, self.N1),
            "ep_world_size": self.world_size,
            "send_counts": as_counts(send),
            "recv_counts": as_counts(recv),
            "send_counts_tensor": None,
            "recv_counts_tensor": None,
            "mm_x": None,
            "mm_weight": None,
            "trans_gmm_weight": self.trans_gmm_weight,
            "trans_mm_weight": self.trans_mm_weight,
            "comm_mode": None,
        }
        if self.BS:
            args["mm_x"] = self._values(generator, self.BS, self.H2)
            args["mm_weight"] = self._weight(generator, self.trans_mm_weight, self.H2, self.N2)
        if self.operator == "alltoallv_gmm":
            args["permute_out_flag"] = self.permute_out_flag
        return args

    def _weight(self, generator: torch.Generator, transposed: bool, *shape: int) -> Tensor:
        """Weights `[..., inner, outer]`, stored the other way round if `transposed`; products stay near 1."""
        *lead, inner, outer = shape
        stored = (outer, inner) if transposed else (inner, outer)
        return self._values(generator, *lead, *stored).mul_(inner**-0.5)

    def _values(self, generator: torch.Generator, *shape: int) -> Tensor:
        *lead, rows, columns = shape
        if self.strided:
            return torch.randn(*lead, columns, rows, generator=generator).to(self.dtype).transpose(-1, -2)
        return torch.randn(*shape, generator=generator).to(self.dtype)


# What each case changes of the default one. Together they take every value of every argument.
_VARIANTS: dict[str, dict[str, Any]] = {
    "base": {},
    "fp16": {"dtype": torch.float16},
    "float32": {"dtype": torch.float32},
    "one-rank": {"world_size": 1, "num_experts": 4},
    "three-ranks": {"world_size": 3},
    "four-ranks-one-expert-each": {"world_size": 4, "num_experts": 1},
    "five-ranks-sparse": {"world_size": 5, "num_experts": 3, "pattern": "sparse"},
    "six-ranks-shared-expert": {"world_size": 6, "largest": 2, "BS": 3},
    "seven-ranks": {"world_size": 7, "largest": 2, "counts_type": "numpy_int64"},
    "eight-ranks-four-experts": {"world_size": 8, "num_experts": 4, "largest": 2},
    "uniform": {"pattern": "uniform"},
    "empty-expert": {"pattern": "empty_expert", "num_experts": 3},
    "silent-sender": {"pattern": "silent_sender", "world_size": 3},
    "idle-receiver": {"pattern": "idle_receiver", "world_size": 3, "dtype": torch.float16},
    "one-receiver": {"pattern": "one_receiver", "world_size": 4},
    "local-only": {"pattern": "local_only"},
    "no-rows-anywhere": {"pattern": "zero"},
    "no-rows-but-a-shared-expert": {"pattern": "zero", "BS": 4},
    "many-rows": {"largest": 40, "H1": 16, "N1": 32},
    "width-one": {"H1": 1, "N1": 1},
    "wide": {"H1": 256, "N1": 192, "dtype": torch.float16},
    "trans-gmm-weight": {"trans_gmm_weight": True},
    "trans-gmm-weight-fp16": {"trans_gmm_weight": True, "dtype": torch.float16, "num_experts": 3},
    "shared-expert": {"BS": 4},
    "shared-expert-one-row": {"BS": 1, "dtype": torch.float16},
    "shared-expert-float32": {"BS": 5, "H2": 64, "N2": 3, "dtype": torch.float32},
    "trans-mm-weight": {"BS": 4, "trans_mm_weight": True},
    "both-transposed": {"BS": 4, "trans_gmm_weight": True, "trans_mm_weight": True, "dtype": torch.float16},
    "strided": {"strided": True, "BS": 4},
    "strided-transposed": {"strided": True, "BS": 4, "trans_gmm_weight": True, "trans_mm_weight": True},
    **{f"counts-{name.replace('_', '-')}": {"counts_type": name} for name in COUNT_TYPES},
}

_PERMUTED = (
    "base",
    "fp16",
    "float32",
    "eight-ranks-four-experts",
    "empty-expert",
    "idle-receiver",
    "strided",
)

NAMED: list[GmmCase] = [
    *[
        GmmCase(id=f"{operator}-{name}", operator=operator, **{"seed": seed, **changes})
        for operator in OPERATORS
        for seed, (name, changes) in enumerate(_VARIANTS.items())
    ],
    *[
        GmmCase(
            id=f"alltoallv_gmm-{name}-permute-out",
            operator="alltoallv_gmm",
            permute_out_flag=True,
            **_VARIANTS[name],
        )
        for name in _PERMUTED
    ],
]


def random_case(seed: int, *, operator: str = "") -> GmmCase:
    """A small valid configuration drawn from all values of all fields; without `operator`, of either."""
    rng = random.Random(seed)
    drawn = operator or OPERATORS[seed % len(OPERATORS)]
    rows_of_shared_expert = rng.choice((0, 0, rng.randint(1, 9)))
    return GmmCase(
        id=f"{drawn}-random-{seed}",
        operator=drawn,
        seed=seed,
        world_size=rng.choice((1, 2, 2, 3, 4, 4, 5, 6, 7, 8)),
        num_experts=rng.randint(1, 5),
        pattern=rng.choice(("random", *PATTERNS)),
        largest=rng.randint(1, 6),
        counts_type=rng.choice(tuple(COUNT_TYPES)),
        H1=rng.randint(1, 48),
        N1=rng.randint(1, 48),
        dtype=rng.choice(DTYPES),
        trans_gmm_weight=rng.random() < 0.5,
        BS=rows_of_shared_expert,
        H2=rng.randint(1, 32),
        N2=rng.randint(1, 32),
        trans_mm_weight=rows_of_shared_expert > 0 and rng.random() < 0.5,
        permute_out_flag=drawn == "alltoallv_gmm" and rng.random() < 0.5,
        strided=rng.random() < 0.2,
    )
