"""The collectives of torch.distributed over gloo, and of MPI, for the peers."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

# torch 2.13 has given these two shorter names and warns about the old ones.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def all_gather_rows(out: torch.Tensor, given: torch.Tensor, async_op: bool = False) -> Any:
    """All-gather on the default group, as bytes; return the work to wait for, with ``async_op``."""
    return _all_gather(out.view(torch.int8), given.view(torch.int8), async_op=async_op)


class Gloo:
    """torch.distributed over gloo, on a group of its own. Rows travel as bytes: gloo does not know every dtype."""

    def __init__(self) -> None:
        self._group = dist.new_group(backend="gloo")

    def all_to_all(self, out: torch.Tensor, given: torch.Tensor) -> None:
        """See `Transport`."""
        dist.all_to_all_single(out, given, group=self._group)

    def all_to_all_v(self, out: torch.Tensor, given: torch.Tensor, out_rows: list[int], given_rows: list[int]) -> None:
        """See `Transport`."""
        dist.all_to_all_single(out.view(torch.int8), given.view(torch.int8), out_rows, given_rows, group=self._group)

    def all_gather(self, out: torch.Tensor, given: torch.Tensor) -> None:
        """See `Transport`."""
        _all_gather(out.view(torch.int8), given.view(torch.int8), group=self._group)

    def reduce_scatter(self, out: torch.Tensor, given: torch.Tensor) -> None:
        """See `Transport`."""
        _reduce_scatter(out, given, group=self._group)


class Mpi:
    """MPI through mpi4py. The ranks must have been started by MPI (see `mpi`)."""

    def __init__(self) -> None:
        from mpi4py import MPI

        self._world = MPI.COMM_WORLD
        self._byte = MPI.BYTE

    def all_to_all(self, out: torch.Tensor, given: torch.Tensor) -> None:
        """See `Transport`."""
        self._world.Alltoall(_bytes(given), _bytes(out))

    def all_to_all_v(self, out: torch.Tensor, given: torch.Tensor, out_rows: list[int], given_rows: list[int]) -> None:
        """See `Transport`."""
        row_bytes = out.shape[1] * out.element_size()
        sends = [_bytes(given), [count * row_bytes for count in given_rows], self._byte]
        takes = [_bytes(out), [count * row_bytes for count in out_rows], self._byte]
        self._world.Alltoallv(sends, takes)

    def all_gather(self, out: torch.Tensor, given: torch.Tensor) -> None:
        """See `Transport`."""
        self._world.Allgather(_bytes(given), _bytes(out))

    def reduce_scatter(self, out: torch.Tensor, given: torch.Tensor) -> None:
        """See `Transport`."""
        self._world.Reduce_scatter_block(given.numpy(), out.numpy())


def _bytes(tensor: torch.Tensor) -> Any:
    return tensor.view(torch.int8).numpy()
