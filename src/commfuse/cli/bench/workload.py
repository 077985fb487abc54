"""What is measured on: sizes, routing, and the inputs that follow from them, the same in every process."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
ROUTINGS = {
    "uniform": "every expert is equally likely",
    "zipf": "expert e is chosen 1 / (e + 1) times as often as expert 0",
    "one-hot": "every token chooses expert 0, and the others as uniform does",
}
QUANTS = {"none": "rows as they are", "int8": "rows as int8 with one float32 scale each; combine is not quantised"}


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Dispatch and combine of one size. ``num_tokens`` are those of each rank; ``num_experts`` is a multiple of ``ranks``."""

    name: str
    ranks: int
    num_tokens: int
    hidden: int
    top_k: int
    num_experts: int
    quant: str = "none"
    routing: str = "uniform"
    dtype: str = "bfloat16"

    @property
    def quantised(self) -> bool:
        """Whether dispatch moves int8."""
        return self.quant == "int8"

    @property
    def row_dtype(self) -> torch.dtype:
        """Of x, of the experts' rows and of the sums."""
        return DTYPES[self.dtype]

    @property
    def experts_per_rank(self) -> int:
        """Expert e lives on rank e // experts_per_rank."""
        return self.num_experts // self.ranks

    @property
    def most_rows(self) -> int:
        """How many rows one rank can receive: every token of every rank, for each expert here that it can choose."""
        return self.ranks * self.num_tokens * min(self.top_k, self.experts_per_rank)

    @property
    def dispatch_row_bytes(self) -> int:
        """Bytes of one row on its way to an expert, with its scale."""
        return self.hidden + 4 if self.quantised else self.combine_row_bytes

    @property
    def combine_row_bytes(self) -> int:
        """Bytes of one row on its way back."""
        return self.hidden * self.row_dtype.itemsize

    @property
    def title(self) -> str:
        """One line for people."""
        rows = "int8" if self.quantised else self.dtype
        return (
            f"{self.name}: {self.ranks} ranks, {self.num_tokens} tokens each, hidden size {self.hidden}, top {self.top_k} of "
            f"{self.num_experts} experts, {self.routing} routing, {rows} rows"
        )


CASES = {
    workload.name: workload
    for workload in (
        Workload(name="A", ranks=2, num_tokens=128, hidden=7168, top_k=8, num_experts=16),
        Workload(name="B", ranks=4, num_tokens=64, hidden=4096, top_k=8, num_experts=32),
        Workload(name="C", ranks=16, num_tokens=8, hidden=7168, top_k=8, num_experts=32),
        Workload(name="D", ranks=2, num_tokens=1, hidden=7168, top_k=8, num_experts=16),
        Workload(name="E", ranks=2, num_tokens=512, hidden=4096, top_k=8, num_experts=64),
    )
}


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What one rank brings along."""

    x: torch.Tensor  # [num_tokens, hidden] row_dtype
    expert_ids: torch.Tensor  # [num_tokens, top_k] int32, distinct within a row
    expert_scales: torch.Tensor  # [num_tokens, top_k] float32, the weights: positive, their sum is 1


def inputs(workload: Workload, rank: int) -> Inputs:
    """Return the inputs of ``rank``, drawn from a generator of its own."""
    generator = torch.Generator().manual_seed(1000 + rank)
    x = torch.randn(workload.num_tokens, workload.hidden, generator=generator)
    ids = choose_experts(workload, generator)
    weights = torch.softmax(torch.randn(ids.shape, generator=generator), dim=1)
    return Inputs(x=x.to(workload.row_dtype), expert_ids=ids, expert_scales=weights)


@functools.lru_cache(maxsize=4)
def all_inputs(workload: Workload) -> tuple[Inputs, ...]:
    """Return the inputs of every rank."""
    return tuple(inputs(workload, rank) for rank in range(workload.ranks))


def choose_experts(workload: Workload, generator: torch.Generator) -> torch.Tensor:
    """Return [num_tokens, top_k] int32 expert ids, distinct within a row, chosen as ``workload.routing`` says (see `ROUTINGS`).

    Drawn without replacement by the Gumbel trick: the largest of log(likelihood) + noise.
    """
    noise = -torch.log(-torch.log(torch.rand(workload.num_tokens, workload.num_experts, generator=generator)))
    scores = noise + likelihood(workload).log()
    return scores.topk(workload.top_k, dim=1).indices.int()


def likelihood(workload: Workload) -> torch.Tensor:
    """Return [num_experts] float32: how likely each expert is, up to a factor; infinity: always chosen."""
    ones = torch.ones(workload.num_experts)
    if workload.routing == "zipf":
        return ones / torch.arange(1, workload.num_experts + 1)
    if workload.routing == "one-hot":
        ones[0] = torch.inf
    return ones
