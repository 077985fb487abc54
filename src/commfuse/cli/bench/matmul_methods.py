"""Each operator with its inputs, its formula in one process, and the ways to compute it: fused, plain, and the product alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch

import commfuse

from .matmul_shapes import COMPUTE, EXPERTS, OWN, Shape
from .transports import Gloo, all_gather_rows

Methods = dict[str, Callable[[], torch.Tensor]]
_BF16 = torch.bfloat16


class Problem(Protocol):
    """One operator in one shape, on one rank."""

    def methods(self) -> Methods:
        """Return the methods by name; each makes one call and returns its result."""
        ...

    def expected(self) -> torch.Tensor:
        """Return what every method but `COMPUTE` must return, within rounding."""
        ...


class AllGatherMm:
    """``cat(x of all ranks) @ weight``."""

    def __init__(self, shape: Shape, rank: int, group: str) -> None:
        self._shape, self._rank, self._group = shape, rank, group
        self._all = [_rows(shape.m, shape.k, peer) for peer in range(shape.ranks)]
        self._weight = _weight(shape, rank)

    def methods(self) -> Methods:
        """See `Problem`."""
        shape, x, weight = self._shape, self._all[self._rank], self._weight
        gathered = torch.cat(self._all)
        product = torch.empty(len(gathered), shape.n, dtype=_BF16)
        own = slice(self._rank * shape.m, (self._rank + 1) * shape.m)
        others = [part for part in (slice(0, own.start), slice(own.stop, len(gathered))) if part.start < part.stop]

        def fused() -> torch.Tensor:
            return commfuse.npu_all_gather_base_mm(x, weight, self._group, shape.ranks, gather_output=False)[0]

        def plain() -> torch.Tensor:
            all_gather_rows(gathered, x)
            return torch.mm(gathered, weight, out=product)

        def overlapping() -> torch.Tensor:
            work = all_gather_rows(gathered, x, async_op=True)
            torch.mm(x, weight, out=product[own])
            work.wait()
            for part in others:
                torch.mm(gathered[part], weight, out=product[part])
            return product

        def compute() -> torch.Tensor:
            return torch.mm(gathered, weight, out=product)

        return {OWN: fused, "gloo": plain, "gloo-overlap": overlapping, COMPUTE: compute}

    def expected(self) -> torch.Tensor:
        """See `Problem`."""
        return _product(torch.cat(self._all), self._weight).to(_BF16)


class MmReduceScatter:
    """This rank's rows of the sum over ranks of ``x @ weight``."""

    def __init__(self, shape: Shape, rank: int, group: str) -> None:
        self._shape, self._rank, self._group = shape, rank, group
        self._x = _rows(shape.ranks * shape.m, shape.k, rank)
        self._weight = _weight(shape, rank)

    def methods(self) -> Methods:
        """See `Problem`."""
        shape, x, weight, gloo = self._shape, self._x, self._weight, Gloo()
        product = torch.empty(len(x), shape.n, dtype=_BF16)
        wide, share = torch.empty(product.shape), torch.empty(shape.m, shape.n)

        def fused() -> torch.Tensor:
            return commfuse.npu_mm_reduce_scatter_base(x, weight, self._group, shape.ranks)

        def plain() -> torch.Tensor:
            wide.copy_(torch.mm(x, weight, out=product))
            gloo.reduce_scatter(share, wide)
            return share.to(_BF16)

        def compute() -> torch.Tensor:
            return torch.mm(x, weight, out=product)

        return {OWN: fused, "gloo": plain, COMPUTE: compute}

    def expected(self) -> torch.Tensor:
        """See `Problem`."""
        shape, total = self._shape, torch.zeros(self._shape.m, self._shape.n)
        for peer in range(shape.ranks):
            share = _rows(shape.ranks * shape.m, shape.k, peer)[self._rank * shape.m : (self._rank + 1) * shape.m]
            total += _product(share, _weight(shape, peer))
        return total.to(_BF16)


class _Grouped:
    """Rows and experts of the two grouped operators; every rank sends ``counts[peer][expert]`` rows, the same on all ranks."""

    def __init__(self, shape: Shape, rank: int, group: str) -> None:
        self._shape, self._rank, self._group = shape, rank, group
        self._weight = _expert_weights(shape, rank)
        blocks, more = divmod(shape.m, shape.ranks * EXPERTS)
        flat = torch.tensor([blocks + (i < more) for i in range(shape.ranks * EXPERTS)])
        self._counts = flat.view(shape.ranks, EXPERTS)
        self._x = [_rows(shape.m, shape.k, peer) for peer in range(shape.ranks)]


class AlltoallvGmm(_Grouped):
    """Rows to their experts' ranks, then every expert's product."""

    def methods(self) -> Methods:
        """See `Problem`."""
        shape, x, weight, gloo = self._shape, self._x[self._rank], self._weight, Gloo()
        here = self._counts[self._rank]
        send, take = self._counts.flatten().tolist(), here.repeat(shape.ranks).tolist()
        arrived = torch.cat(self._arriving()) if sum(take) else x[:0]
        by_expert = _transposed(here.repeat(shape.ranks, 1))
        ordered = arrived[by_expert]
        product = torch.empty(len(arrived), shape.n, dtype=_BF16)
        sizes = [int(count) * shape.ranks for count in here]
        given, taken = self._counts.sum(1).tolist(), [int(here.sum())] * shape.ranks

        def fused() -> torch.Tensor:
            return commfuse.npu_alltoallv_gmm(x, weight, self._group, shape.ranks, send, take)[0]

        def plain() -> torch.Tensor:
            gloo.all_to_all_v(arrived, x, taken, given)
            torch.index_select(arrived, 0, by_expert, out=ordered)
            return _grouped_product(ordered, weight, sizes, product)

        def compute() -> torch.Tensor:
            return _grouped_product(ordered, weight, sizes, product)

        return {OWN: fused, "gloo": plain, COMPUTE: compute}

    def expected(self) -> torch.Tensor:
        """See `Problem`."""
        parts = self._arriving()
        here = self._counts[self._rank].tolist()
        split = [part.split(here) for part in parts]
        rows = [_product(split[peer][e], self._weight[e]) for e in range(EXPERTS) for peer in range(self._shape.ranks)]
        return torch.cat(rows).to(_BF16)

    def _arriving(self) -> list[torch.Tensor]:
        """The rows that come from each rank, by local expert."""
        ends = self._counts.sum(1).cumsum(0).tolist()
        first = ends[self._rank] - int(self._counts[self._rank].sum())
        return [x[first : ends[self._rank]] for x in self._x]


class GmmAlltoallv(_Grouped):
    """Every expert's product, then the rows to the ranks that they are for."""

    def methods(self) -> Methods:
        """See `Problem`."""
        shape, x, weight, gloo = self._shape, self._x[self._rank], self._weight, Gloo()
        send, take = self._counts.flatten().tolist(), self._counts[self._rank].repeat(shape.ranks).tolist()
        sizes = self._counts.sum(0).tolist()
        by_rank = _transposed(self._counts.t())
        product = torch.empty(len(x), shape.n, dtype=_BF16)
        ordered = torch.empty_like(product)
        given, taken = self._counts.sum(1).tolist(), [int(self._counts[self._rank].sum())] * shape.ranks
        arrived = torch.empty(sum(taken), shape.n, dtype=_BF16)

        def fused() -> torch.Tensor:
            return commfuse.npu_gmm_alltoallv(x, weight, self._group, shape.ranks, send, take)[0]

        def plain() -> torch.Tensor:
            torch.index_select(_grouped_product(x, weight, sizes, product), 0, by_rank, out=ordered)
            gloo.all_to_all_v(arrived, ordered, taken, given)
            return arrived

        def compute() -> torch.Tensor:
            return _grouped_product(x, weight, sizes, product)

        return {OWN: fused, "gloo": plain, COMPUTE: compute}

    def expected(self) -> torch.Tensor:
        """See `Problem`."""
        rows = []
        for peer, x in enumerate(self._x):
            blocks = x.split(self._counts.t().flatten().tolist())  # by expert, then destination
            mine = blocks[self._rank :: self._shape.ranks]
            weights = self._weight if peer == self._rank else _expert_weights(self._shape, peer)
            rows += [_product(block, weight) for block, weight in zip(mine, weights, strict=True)]
        return torch.cat(rows).to(_BF16)


PROBLEMS: dict[str, Callable[[Shape, int, str], Problem]] = {
    "all-gather-mm": AllGatherMm,
    "mm-reduce-scatter": MmReduceScatter,
    "alltoallv-gmm": AlltoallvGmm,
    "gmm-alltoallv": GmmAlltoallv,
}


def _grouped_product(x: torch.Tensor, weight: torch.Tensor, sizes: list[int], out: torch.Tensor) -> torch.Tensor:
    """Multiply consecutive blocks of ``x`` with one weight each, which is what torch's grouped_mm does on the CPU."""
    for rows, one, product in zip(x.split(sizes), weight, out.split(sizes), strict=True):
        torch.mm(rows, one, out=product)
    return out


def _transposed(counts: torch.Tensor) -> torch.Tensor:
    """Return the order that turns blocks of ``counts[i, j]`` rows, by i, into blocks by j."""
    flat = counts.flatten()
    begins = (flat.cumsum(0) - flat).view(counts.shape)
    ranges = [
        torch.arange(int(begins[i, j]), int(begins[i, j] + counts[i, j]))
        for j in range(counts.shape[1])
        for i in range(len(counts))
    ]
    return torch.cat(ranges)


def _rows(count: int, width: int, number: int) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(number)).to(_BF16)


def _weight(shape: Shape, number: int) -> torch.Tensor:
    """Return [k, n], stored as torch.nn.Linear does, scaled so that products are near 1."""
    made = torch.randn(shape.n, shape.k, generator=torch.Generator().manual_seed(1000 + number))
    return (made / math.sqrt(shape.k)).to(_BF16).t()


def _expert_weights(shape: Shape, rank: int) -> torch.Tensor:
    """Return [EXPERTS, k, n], the weights of one rank's experts, each stored transposed."""
    return torch.stack([_weight(shape, rank * EXPERTS + e).t() for e in range(EXPERTS)]).transpose(1, 2)


def _product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.mm(x.float(), weight.float())
