"""Grouped matmul and AlltoAllV through windows: one publication with the counts and the rows; each rank copies its blocks into place.

The counts of all ranks are compared before a row moves. For ``gmm_alltoallv`` the products are computed straight into the window before
that, since they depend on this rank's own counts alone.
"""

from __future__ import annotations

import numpy as np
import torch

from ...call import Call
from ...operators import orders
from ...operators.gmm_alltoallv import steps
from ..base import Outputs
from . import views
from .outputs import outputs, scratch
from .publication import Publication, staged_bytes
from .session import Session

COUNTS, ROWS = range(2)  # segments
Blocks = list[list[tuple[int, int, int]]]  # of each source: its rows from here, to there, so many


def gmm_alltoallv(call: Call, session: Session, waited_us: list[float]) -> Outputs:
    """Carry out npu_gmm_alltoallv: products into the window; every rank copies those that are for it."""
    mine, shape = steps.own_counts(call), (call["A"], call["N1"])
    dtype = call["gmm_x"].dtype
    publication = Publication(call, session, (mine.nbytes, shape[0] * shape[1] * dtype.itemsize))
    steps.grouped_product(call, call["gmm_x"], mine[0].sum(0), publication.staging.view(ROWS, shape, dtype))
    publication.staging.copy_in(COUNTS, torch.from_numpy(mine))
    publication.publish()
    made = outputs(call, session)
    shared = steps.shared_product(call, made.get("mm_y"))
    everyone = _meet(publication, mine, call["N1"] * dtype.itemsize)
    views.pull_blocks(session, ROWS, made["y"], by_source(everyone[:, 0], session.members.index))
    publication.close()
    return (made["y"], shared)


def alltoallv_gmm(call: Call, session: Session, waited_us: list[float]) -> Outputs:
    """Carry out npu_alltoallv_gmm: every rank copies the rows for its experts, in their order, and multiplies them."""
    mine, rows = steps.own_counts(call), call["gmm_x"]
    publication = Publication(call, session, (mine.nbytes, staged_bytes(session, rows)))
    publication.staging.copy_in(COUNTS, torch.from_numpy(mine))
    publication.put(ROWS, rows)
    publication.publish()
    made = outputs(call, session)
    shared = steps.shared_product(call, made.get("mm_y"))
    everyone = _meet(publication, mine, call["H1"] * rows.element_size())
    permute_out = made.get("permute_out")
    came = scratch(session, (call["BSK"], call["H1"]), rows.dtype) if permute_out is None else permute_out
    views.pull_blocks(session, ROWS, came, by_expert(everyone[:, 0], session.members.index))
    publication.close()
    steps.grouped_product(call, came, mine[1].sum(0), made["gmm_y"])
    return (made["gmm_y"], shared, permute_out)


def _meet(publication: Publication, mine: orders.Ints, row_bytes: int) -> orders.Ints:
    """Return all ranks' counts, [rank, send or receive, peer, expert], once they match and every rank has published its rows.

    Raises ArgumentError on every rank where they do not match; the publication is closed then.
    """
    publication.meet()
    session = publication.session
    everyone = np.empty((len(session.members.members), *mine.shape), np.int64)
    views.pull_all(session, COUNTS, torch.from_numpy(everyone))
    try:
        steps.check_counts(publication.call, session.members, everyone)
    except Exception:
        publication.close()
        raise
    for member, num_rows in enumerate(everyone[:, 0].sum((1, 2)).tolist()):
        views.check_size(session, ROWS, member, num_rows * row_bytes)
    return everyone


def by_source(sent: orders.Ints, me: int) -> Blocks:
    """Return where this rank's rows lie at the sources, and go, by (source, expert).

    ``sent``: [source, peer, expert] rows; each source has its rows by (expert, peer).

    Worked example: ``sent = [[[1, 2], [1, 1]], [[0, 1], [2, 0]]]``, ``me = 1``. Source 0 holds, expert by expert, 1 row for rank 0 and
    1 for rank 1, then 2 and 1: rank 1 takes row 1 to its place 0, and row 4 to 1. Source 1 holds 0 and 2, then 1 and 0: rank 1 takes
    rows 0 and 1 to its places 2 and 3. Result: ``[[(1, 0, 1), (4, 1, 1)], [(0, 2, 2)]]``.
    """
    lower, of_expert, sizes = sent[:, :me].sum(1).tolist(), sent.sum(1).tolist(), sent[:, me].tolist()
    blocks, here = Blocks(), 0
    for before, totals, counts in zip(lower, of_expert, sizes, strict=True):
        blocks.append([])
        begin = 0
        for less, total, count in zip(before, totals, counts, strict=True):
            if count:
                blocks[-1].append((begin + less, here, count))
            begin += total
            here += count
    return blocks


def by_expert(sent: orders.Ints, me: int) -> Blocks:
    """Return where this rank's rows lie at the sources, and go, by (expert, source).

    ``sent``: [source, peer, expert] rows; each source has its rows by (peer, expert). With the numbers above, source 0 holds rank 1's
    rows as 3 and 4, source 1 as 1 and 2: ``[[(3, 0, 1), (4, 3, 1)], [(1, 1, 2)]]``.
    """
    begins, sizes = sent[:, :me].sum((1, 2)).tolist(), sent[:, me].T.tolist()
    blocks: Blocks = [[] for _ in begins]
    here = 0
    for of_expert in sizes:
        for source, count in enumerate(of_expert):
            if count:
                blocks[source].append((begins[source], here, count))
            begins[source] += count
            here += count
    return blocks
