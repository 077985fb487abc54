"""From experts to keys: who takes part in a call, as the core's integer keys, kept for the next call of the same kind.

MoE expert ``j`` is key ``j``; behind them, key ``experts + q`` is shared-expert rank ``q``. A pair's column is its k, or K+s for the
copy that goes to shared expert s.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ... import _core
from ...call import Call
from ...operators.moe_distribute import plan, values
from ...operators.moe_distribute.plan import Topology
from .session import Session

TERM = np.dtype([("address", np.uint64), ("weight", np.float32), ("kind", np.uint32)])


class Terms(NamedTuple):
    """The terms of every token's sum, [BS, columns] `TERM`."""

    array: npt.NDArray[Any]
    address: int  # asking the array for it takes longer than finding the terms of one token


@dataclass(frozen=True, kw_only=True)
class Routing:
    """Keys of one topology as this rank sees them."""

    top: Topology
    me: int
    num_keys: int
    width: int  # columns that are published: K, then one for each shared expert
    check: _core.KeyCheck
    sort: _core.KeySort
    terms: _core.TermPlan
    factor_rows: npt.NDArray[np.int32]  # of each key, counted from the first MoE expert's row
    scratch: dict[tuple[int, int], Terms]

    @cached_property
    def local_experts(self) -> int:
        """Experts of this rank."""
        return self.top.local_experts(self.me)

    @property
    def first_rows(self) -> list[int]:
        """Where each owner's keys begin, by owner and key."""
        shared, per_rank = self.top.shared_ranks, self.top.experts_per_rank
        return [*range(shared), *range(shared, self.num_keys, per_rank)]

    def check_keys(self, call: Call, out: int) -> None:
        """Write the keys of this rank's pairs, [BS, width] int32, to address ``out``."""
        ids = call["expert_ids"].contiguous()
        flags, active = values.marked(call)
        if self.check.run(ids.data_ptr(), call["BS"], active, 0 if flags is None else flags.data_ptr(), out):
            raise _core.CoreError(f"expert_ids changed during the call: {self.check.bad_key} at pair {self.check.bad_pair}")
        if call["split_shared"] and self.top.shared_ranks:
            self._split_keys(call["BS"], out)

    def _split_keys(self, num_tokens: int, out: int) -> None:
        """Share this rank's tokens out over all shared-expert ranks, as the first version of the operators does."""
        keys = np.ctypeslib.as_array((ctypes.c_int32 * (num_tokens * self.width)).from_address(out)).reshape(-1, self.width)
        target: Any = self.me
        if self.me >= self.top.shared_ranks:
            target = np.repeat(np.arange(self.top.shared_ranks), plan.split_sizes(num_tokens, self.top.shared_ranks, self.me))
        keys[:, -1] = self.top.experts + target

    def rows_sent(self, keys: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
        """Return how many of this rank's ``keys`` (flat) are of each, by owner and key: shared-expert ranks, then MoE experts."""
        counts = np.bincount(keys + 1, minlength=self.num_keys + 1)
        return counts[1:] if not self.top.shared_ranks else np.roll(counts[1:], self.top.shared_ranks)

    def term_array(self, num_tokens: int, columns: int) -> Terms:
        """Return an array for the terms of ``num_tokens`` sums; the same one for the next call of this size."""
        terms = self.scratch.get((num_tokens, columns))
        if terms is None:
            self.scratch.clear()
            array = np.zeros((num_tokens, columns), TERM)
            terms = self.scratch[num_tokens, columns] = Terms(array, array.ctypes.data)
        return terms


def of(session: Session, call: Call) -> Routing:
    """Return the routing of ``call``, which has been checked."""
    key = call.form, values.elastic(call), session.members.index
    routing: Routing | None = session.kept.get(key)
    if routing is None:
        if len(session.kept) >= _KEEP:
            session.kept.clear()
        routing = session.kept[key] = _of_topology(session, call)
    return routing


_KEEP = 4096


def _of_topology(session: Session, call: Call) -> Routing:
    """Return the routing that all forms of one topology share."""
    top = values.topology(call)
    key = top, session.members.index, call["K"], call["all_experts"]
    routing: Routing | None = session.kept.get(key)
    if routing is None:
        routing = session.kept[key] = _make(top, session.members.index, call["K"], call["all_experts"])
    return routing


def _make(top: Topology, me: int, top_k: int, all_experts: int) -> Routing:
    shared = top.shared_experts if top.shared_ranks else 0
    num_keys = top.experts + top.shared_ranks
    per_rank = top.experts_per_rank
    first = top.experts + me if me < top.shared_ranks else (me - top.shared_ranks) * per_rank
    copies_to = [top.experts + s * top.replicas + me % top.replicas for s in range(shared)]
    owners = [top.shared_ranks + j // per_rank for j in range(top.experts)] + list(range(top.shared_ranks))
    slots = [j % per_rank for j in range(top.experts)] + [0] * top.shared_ranks
    factor_rows = [*range(top.experts), *(q // top.replicas - shared for q in range(top.shared_ranks))]
    width = top_k + shared
    return Routing(
        top=top,
        me=me,
        num_keys=num_keys,
        width=width,
        check=_core.KeyCheck(top_k, top.experts, top.first_special, all_experts, copies_to),
        sort=_core.KeySort(width, num_keys, first, first + top.local_experts(me)),
        terms=_core.TermPlan(width, top_k, top.world, me, owners, slots),
        factor_rows=np.array(factor_rows, dtype=np.int32),
        scratch={},
    )
