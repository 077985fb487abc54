"""The operators that fuse a matmul with communication: one call over real ranks, and the same through the golden in one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch.distributed.distributed_c10d import _get_default_group

from .. import backends, groups, ops
from ..compare import MATMUL_TOLERANCE
from ..operators import OPERATORS
from ..operators.all_gather_mm import cases as all_gather_mm
from ..operators.all_gather_mm import reference as all_gather_mm_reference
from ..operators.gmm_alltoallv import cases as gmm_alltoallv
from ..operators.gmm_alltoallv import reference as gmm_alltoallv_reference
from .results import Expected, RankRun

_MOVED = ("permute_out", "gather_out")  # these outputs are not computed, so they are compared bit for bit
_BARRIER = "_npu_distribute_barrier"


@dataclass(frozen=True, kw_only=True)
class Matmul:
    """One operator, whose cases are one call each on the group of all ranks; see `checking.Family`."""

    name: str
    cases: Any  # the module with NAMED and random_case
    goldens: Any  # the module with the golden, which is named like the operator without ``npu_``

    @property
    def operators(self) -> tuple[str, ...]:
        """See `checking.Family`."""
        return (self.name,)

    def named_cases(self) -> Sequence[Any]:
        """See `checking.Family`."""
        return [case for case in self.cases.NAMED if case.operator == self._golden]

    def random_case(self, seed: int) -> Any:
        """See `checking.Family`."""
        return self.cases.random_case(seed, operator=self._golden)

    def world_size(self, case: Any) -> int:
        """See `checking.Family`."""
        size: int = case.world_size
        return size

    def run_on_rank(self, rank: int, case: Any) -> RankRun:
        """See `checking.Family`."""
        group = groups.resolve(_get_default_group())
        function: Callable[..., Any] = getattr(ops, self.name)
        found = function(**case.args(rank), **{OPERATORS[self.name].group: group.name})
        return RankRun(outputs=list(found) if isinstance(found, tuple) else [found], backend=backends.of(group).name)

    def expected(self, case: Any) -> dict[int, list[Expected]]:
        """See `checking.Family`."""
        golden: Callable[..., Any] = getattr(self.goldens, self._golden)
        results = golden([case.args(rank) for rank in range(case.world_size)])
        return {rank: self._rows(found) for rank, found in enumerate(results)}

    @property
    def _golden(self) -> str:
        return self.name.removeprefix("_").removeprefix("npu_")

    def _rows(self, found: Sequence[Any]) -> list[Expected]:
        rows = zip(OPERATORS[self.name].outputs, found, strict=True)
        return [
            Expected(operator=self.name, name=row.name, tensor=tensor, bounds=self._bounds(row.name, tensor))
            for row, (tensor, _) in rows
        ]

    def _bounds(self, output: str, tensor: Any) -> tuple[float, float] | None:
        exact = tensor is None or output in _MOVED or self.name == _BARRIER
        return None if exact else MATMUL_TOLERANCE[tensor.dtype]


GMM_ALLTOALLV = tuple(
    Matmul(name=name, cases=gmm_alltoallv, goldens=gmm_alltoallv_reference) for name in ("npu_gmm_alltoallv", "npu_alltoallv_gmm")
)
ALL_GATHER_MM = tuple(
    Matmul(name=name, cases=all_gather_mm, goldens=all_gather_mm_reference)
    for name in ("npu_all_gather_base_mm", "npu_mm_reduce_scatter_base", "npu_mm_all_reduce_base", _BARRIER)
)
