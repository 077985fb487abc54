"""Which row goes where: pure functions of expert ids, masks and sizes. numpy integers in, the same out; no rank state, no clock.

    topology     who takes part, and which experts each of them holds
    routes       the rows that one rank sends, in the order in which they travel
    arrivals     the rows that one rank receives, in the order in which they are kept

Worked example (two ranks with two experts each, K = 2): rank 0 has ``expert_ids = [[0, 2], [3, 1], [2, 3]]``. Its routes go by
(destination rank, local expert, token): tokens 0, 1 to rank 0 (experts 0 and 1), then 0, 2, 1, 2 to rank 1 (expert 2 twice,
expert 3 twice); ``counts = [[1, 1], [2, 2]]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from .. import orders

Ints = orders.Ints
Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Topology:
    """Ranks and experts in effect, in local ids (after shrinking: of the ranks that are left)."""

    world: int
    shared_ranks: int
    shared_experts: int
    experts: int  # MoE experts in effect
    first_special: int  # ids from here on are special experts
    physical: tuple[int, ...]  # local id -> rank in the process group

    @property
    def experts_per_rank(self) -> int:
        """MoE experts on each MoE rank."""
        return self.experts // (self.world - self.shared_ranks)

    @property
    def replicas(self) -> int:
        """Ranks that hold the same shared expert."""
        return self.shared_ranks // self.shared_experts if self.shared_ranks else 0

    def local_experts(self, rank: int) -> int:
        """Experts on ``rank``."""
        return 1 if rank < self.shared_ranks else self.experts_per_rank


@dataclass(frozen=True, kw_only=True)
class Routes:
    """The rows a rank sends, ordered by (destination rank, local expert there, token, k)."""

    token: Ints
    slot: Ints  # k, or K+s for shared expert s
    factor_row: Ints  # row of `scales` that smooths this copy
    counts: Ints  # [destination rank, local expert]

    def per_rank(self) -> list[int]:
        """Rows for each destination."""
        return orders.per_peer(self.counts)


@dataclass(frozen=True, kw_only=True)
class Arrivals:
    """The rows a rank receives. They come in by (source rank, local expert) and are kept by (local expert, source rank)."""

    order: Ints  # kept row i is row order[i] of those that came in
    counts: Ints  # [source rank, local expert]

    @property
    def total(self) -> int:
        """Rows received."""
        return int(self.counts.sum())

    def prefix_sums(self) -> Ints:
        """Inclusive prefix sum over (local expert, source rank)."""
        return prefix_sums(self.counts)

    def per_expert(self) -> Ints:
        """Rows for each local expert."""
        return np.asarray(self.counts.sum(0))

    def per_rank(self) -> list[int]:
        """Rows from each source."""
        return orders.per_peer(self.counts)


@lru_cache(maxsize=256)
def topology(
    world: int, shared_ranks: int, shared_experts: int, experts: int, elastic: tuple[int, ...] | None = None
) -> Topology:
    """Return who takes part. ``elastic`` is the content of elastic_info when its flag is set, already checked."""
    if elastic is None:
        everyone = tuple(range(world))
        return Topology(
            world=world,
            shared_ranks=shared_ranks,
            shared_experts=shared_experts,
            experts=experts,
            first_special=experts,
            physical=everyone,
        )
    return Topology(
        world=elastic[1],
        shared_ranks=elastic[2],
        shared_experts=shared_experts,
        experts=elastic[3],
        first_special=experts,
        physical=elastic[4 + world : 4 + world + elastic[1]],
    )


def active_pairs(num_tokens: int, top_k: int, mask: Flags | None) -> Flags:
    """Return which (token, k) pairs take part: all, the first ``mask.sum()`` tokens (1-D), or ``mask`` itself (2-D)."""
    if mask is None:
        return np.ones((num_tokens, top_k), dtype=bool)
    if mask.ndim == 2:
        return mask
    return np.repeat(np.arange(num_tokens)[:, None] < mask.sum(), top_k, axis=1)


def routes(
    expert_ids: Ints, active: Flags, top: Topology, rank: int, *, split_shared: bool = False, first_factor: int | None = None
) -> Routes:
    """Return the rows that local rank ``rank`` sends. Ids of inactive pairs are not looked at.

    ``split_shared``: a rank's tokens are shared out over all shared-expert ranks (the first version of the operators).
    ``first_factor``: row of `scales` that belongs to MoE expert 0, if it is not the number of shared experts.
    """
    _, top_k = expert_ids.shape
    pair_token, pair_k = np.nonzero(active & (np.where(active, expert_ids, 0) < top.first_special))
    expert = expert_ids[pair_token, pair_k]
    copy_token, copy_expert, copy_rank = (_split_copies if split_shared else _shared_copies)(active, top, rank)
    width = max(top.experts_per_rank, 1)
    moe_key = (top.shared_ranks + expert // width) * width + expert % width
    key = np.concatenate([copy_rank * width, moe_key])
    order = np.argsort(key, kind="stable")
    first = top.shared_experts if first_factor is None else first_factor
    return Routes(
        token=np.concatenate([copy_token, pair_token])[order],
        slot=np.concatenate([top_k + copy_expert, pair_k])[order],
        factor_row=np.concatenate([copy_expert, first + expert])[order],
        counts=np.bincount(key, minlength=top.world * width).reshape(top.world, width),
    )


def _shared_copies(active: Flags, top: Topology, rank: int) -> tuple[Ints, Ints, Ints]:
    """Return (token, shared expert, destination) of every copy that goes to a shared expert: one replica of each."""
    experts = top.shared_experts if top.shared_ranks else 0
    tokens = np.nonzero(active.any(1))[0]
    expert = np.repeat(np.arange(experts), len(tokens))
    return np.tile(tokens, experts), expert, expert * top.replicas + (rank % top.replicas if top.replicas else 0)


def _split_copies(active: Flags, top: Topology, rank: int) -> tuple[Ints, Ints, Ints]:
    """The same where a shared-expert rank keeps its own tokens and every other rank shares out its own over all of them."""
    tokens = np.arange(len(active) if top.shared_ranks else 0)
    if rank < top.shared_ranks:
        target = np.full_like(tokens, rank)
    else:
        target = np.repeat(np.arange(top.shared_ranks), split_sizes(len(tokens), top.shared_ranks, rank))
    return tokens, np.zeros_like(tokens), target


def split_sizes(num_tokens: int, shared_ranks: int, rank: int) -> Ints:
    """Return how many of a rank's tokens belong to each shared-expert rank, one contiguous range after the other."""
    return np.asarray(np.diff((np.arange(shared_ranks + 1) + rank) * num_tokens // max(shared_ranks, 1)))


def booked(came: Arrivals, top: Topology, rank: int) -> Ints:
    """Return ``came.counts`` as the first version of the operators shows it: own tokens of a shared-expert rank as if shared out."""
    counts: Ints = came.counts.copy()
    if rank < top.shared_ranks:
        counts[: top.shared_ranks, 0] = split_sizes(int(counts[rank, 0]), top.shared_ranks, rank)
    return counts


def unbooked(counts: Ints, top: Topology, rank: int) -> Ints:
    """Inverse of `booked`."""
    out: Ints = counts.copy()
    if rank < top.shared_ranks:
        out[: top.shared_ranks, 0] = 0
        out[rank, 0] = counts[: top.shared_ranks, 0].sum()
    return out


def arrivals(counts: Ints) -> Arrivals:
    """Return the order of the rows that come in; ``counts`` is [source rank, local expert]."""
    return Arrivals(order=orders.by_expert(counts), counts=counts)


def prefix_sums(counts: Ints) -> Ints:
    """Return the inclusive prefix sum over (local expert, source rank); ``counts`` is [source rank, local expert]."""
    return np.asarray(np.cumsum(counts.T.reshape(-1)))


def counts_from_prefix_sums(sums: Sequence[int], sources: int, experts: int) -> Ints:
    """Inverse of `prefix_sums`; a sequence without entries stands for zeros."""
    flat = np.asarray(sums if len(sums) else np.zeros(sources * experts), dtype=np.int64)[: sources * experts]
    return np.asarray(np.diff(flat, prepend=0).reshape(experts, sources).T.copy())


def expand_idx(expert_ids: Ints, active: Flags, first_special: int) -> Ints:
    """Return, for each flat pair, how many earlier active pairs of this rank have the same expert; 0 for special and inactive."""
    out = np.zeros(expert_ids.size, dtype=np.int64)
    flat = expert_ids.reshape(-1)
    pairs = np.nonzero((active & (np.where(active, expert_ids, 0) < first_special)).reshape(-1))[0]
    order = pairs[np.argsort(flat[pairs], kind="stable")]
    sorted_ids = flat[order]
    first = np.searchsorted(sorted_ids, sorted_ids, side="left")
    out[order] = np.arange(len(order)) - first
    return out
