"""Which operators are measured, in which shapes."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

OWN, COMPUTE = "cpu", "compute"
PLAIN = ("gloo", "gloo-overlap")
OPERATORS = {
    "all-gather-mm": "npu_all_gather_base_mm",
    "mm-reduce-scatter": "npu_mm_reduce_scatter_base",
    "alltoallv-gmm": "npu_alltoallv_gmm",
    "gmm-alltoallv": "npu_gmm_alltoallv",
}
EXPERTS = 2  # of each rank, in the grouped products


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One measurement: ``m`` rows of each rank, inner width ``k``, output width ``n``; bfloat16.

    all-gather-mm multiplies ranks * m rows. mm-reduce-scatter multiplies as many and leaves m. The grouped ones send each of m rows to
    one of 2 experts of one of the ranks, as evenly as can be.
    """

    operator: str
    ranks: int
    m: int
    k: int
    n: int

    @property
    def title(self) -> str:
        """One line for people."""
        return f"{self.operator}, {self.ranks} ranks, m {self.m}, k {self.k}, n {self.n}"

    @property
    def operations(self) -> int:
        """Floating-point operations of all ranks together."""
        gathered = self.ranks if self.operator in ("all-gather-mm", "mm-reduce-scatter") else 1
        return 2 * self.ranks * gathered * self.m * self.k * self.n


SHAPES = tuple(
    Shape(operator=operator, ranks=2, m=m, k=k, n=n)
    for operator in OPERATORS
    for m, k, n in ((16, 7168, 256), (64, 7168, 2048), (512, 2048, 1024))
)

_MOST = 2**37  # operations: about a third of a second on two cores
GRID = tuple(
    shape
    for operator, ranks, m, k, n in itertools.product(OPERATORS, (2, 4), (1, 64, 512, 4096), (256, 2048, 8192), (64, 2048, 8192))
    if (shape := Shape(operator=operator, ranks=ranks, m=m, k=k, n=n)).operations <= _MOST
)
