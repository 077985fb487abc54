"""The one reordering that routing needs: rows that lie by (peer, expert) taken by (expert, peer). Pure.

Worked example: ``counts = [[1, 2], [1, 1]]`` (two peers, two experts) describes five rows: peer 0's one row for expert 0 and two for
expert 1, then peer 1's one and one. By expert: ``by_expert(counts) == [0, 3, 1, 2, 4]``.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


def by_expert(counts: Ints) -> Ints:
    """Return ``order``: row i of the reordered rows is row order[i]; ``counts`` is [peer, expert]."""
    peers, experts = counts.shape
    expert_of_row = np.repeat(np.tile(np.arange(experts), peers), counts.reshape(-1))
    return np.argsort(expert_of_row, kind="stable")


def by_peer(counts: Ints) -> Ints:
    """Return the order (peer, expert) for rows that lie by (expert, peer); ``counts`` is [peer, expert] here too."""
    return by_expert(np.ascontiguousarray(counts.T))


def per_peer(counts: Ints) -> list[int]:
    """Rows for each peer, as plain ints."""
    return [int(n) for n in counts.sum(1)]
