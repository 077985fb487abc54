"""What the memory alone allows: no exchange, no choice of rows. As many processes at once as there are ranks."""

from __future__ import annotations

import time

import numpy as np
import torch

from .method import Problem, Received, logical_bytes


class _Limit:
    """Two phases that stand for dispatch and combine; see `Method`."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        workload = problem.workload
        self._num_rows, self._num_returned = len(problem.expected.rows), workload.num_tokens * workload.top_k
        self._nanoseconds = 0

    def dispatch(self) -> None:
        """See `Method`."""
        begin = time.perf_counter_ns()
        self._receive()
        self._nanoseconds += time.perf_counter_ns() - begin

    def combine(self) -> None:
        """See `Method`."""
        begin = time.perf_counter_ns()
        self._sum()
        self._nanoseconds += time.perf_counter_ns() - begin

    def moved_ns(self) -> int | None:
        """All the time."""
        return self._nanoseconds

    def bytes_between_ranks(self) -> int:
        """See `Method`."""
        return 0

    def received(self) -> Received:
        """Return the expected rows if what stands for receiving them has done its work."""
        self._check_received()
        return self._problem.expected.rows, self._problem.expected.scales

    def sums(self) -> torch.Tensor:
        """Return the expected sums if what stands for them has done its work."""
        self._check_sums()
        return self._problem.expected.out

    def _receive(self) -> None:
        raise NotImplementedError

    def _sum(self) -> None:
        raise NotImplementedError

    def _check_received(self) -> None:
        raise NotImplementedError

    def _check_sums(self) -> None:
        raise NotImplementedError


class Memcpy(_Limit):
    """Copy, row by row, as many bytes as a rank must end up with."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        workload = problem.workload
        self._rows = _Copies(self._num_rows, workload.dispatch_row_bytes, self._num_rows, 0)
        self._returned = _Copies(self._num_returned, workload.combine_row_bytes, self._num_returned, 0)
        assert self._rows.num_bytes + self._returned.num_bytes == logical_bytes(problem)

    def _receive(self) -> None:
        self._rows.copy()

    def _sum(self) -> None:
        self._returned.copy()

    def _check_received(self) -> None:
        self._rows.check()

    def _check_sums(self) -> None:
        self._returned.check()


class Floor(_Limit):
    """What cannot be saved: write the rows, from few that the cache holds; read those that come back, once, and sum them."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        from ... import _core
        from ...backends.cpu import host
        from ...backends.cpu.routing import TERM
        from ...backends.cpu.staging import DTYPES

        workload = problem.workload
        past_cache = host.large_copy(workload.ranks)
        self._rows = _Copies(self._num_rows, workload.dispatch_row_bytes, _FEW_ROWS, past_cache)
        self._back = torch.randn(self._num_returned, workload.hidden).to(workload.row_dtype)
        self._out = torch.empty(workload.num_tokens, workload.hidden, dtype=workload.row_dtype)
        self._terms = np.zeros((workload.num_tokens, workload.top_k), TERM)
        begins = np.arange(self._num_returned, dtype=np.uint64) * np.uint64(workload.combine_row_bytes)
        self._terms["address"] = begins.reshape(self._terms.shape) + np.uint64(self._back.data_ptr())
        self._terms["weight"], self._terms["kind"] = 1, _core.TERM_ROW
        self._add_up = _core.combine_rows
        sizes = workload.num_tokens, workload.top_k, workload.hidden
        row_bytes = workload.combine_row_bytes
        self._arguments = DTYPES[workload.row_dtype], False, self._terms.ctypes.data, *sizes, self._out.data_ptr(), row_bytes

    def _receive(self) -> None:
        self._rows.copy()

    def _sum(self) -> None:
        self._add_up(*self._arguments)

    def _check_received(self) -> None:
        self._rows.check()

    def _check_sums(self) -> None:
        wanted = self._back.view(*self._terms.shape, -1).float().sum(1)
        torch.testing.assert_close(self._out.float(), wanted, rtol=2**-7, atol=2**-7)


_FEW_ROWS = 8


class _Copies:
    """Rows, of which there are ``num_sources``, and where ``num_rows`` copies go."""

    def __init__(self, num_rows: int, row_bytes: int, num_sources: int, past_cache: int) -> None:
        self.num_bytes = num_rows * row_bytes
        self._index = torch.arange(num_rows, dtype=torch.int32) % max(num_sources, 1)
        self._source = torch.randint(1, 127, (num_sources, row_bytes), dtype=torch.uint8)
        self._copy = torch.zeros(num_rows, row_bytes, dtype=torch.uint8)
        out, source, index = (tensor.data_ptr() for tensor in (self._copy, self._source, self._index))
        self._arguments = out, row_bytes, source, self._source.numel(), row_bytes, index, num_rows, row_bytes, past_cache
        from ... import _core

        self._copy_rows = _core.gather_rows

    def copy(self) -> None:
        self._copy_rows(*self._arguments)

    def check(self) -> None:
        if not torch.equal(self._copy, self._source[self._index]):
            raise AssertionError("the copies that stand for the memory's limit are not complete")
