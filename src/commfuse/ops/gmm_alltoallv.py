"""Grouped matmul fused with AlltoAllV, in both orders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy.typing as npt
import torch
from torch import Tensor

from ._call import call

Counts: TypeAlias = Sequence[int] | npt.NDArray[Any] | Tensor


def npu_gmm_alltoallv(
    gmm_x: Tensor,
    gmm_weight: Tensor,
    hcom: str | torch.distributed.ProcessGroup,
    ep_world_size: int,
    send_counts: Counts,
    recv_counts: Counts,
    *,
    send_counts_tensor: Tensor | None = None,
    recv_counts_tensor: Tensor | None = None,
    mm_x: Tensor | None = None,
    mm_weight: Tensor | None = None,
    trans_gmm_weight: bool = False,
    trans_mm_weight: bool = False,
    comm_mode: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Multiply every local expert's rows with its weight, then send each row to the rank it is meant for.

    Letters: W = ep_world_size ranks, e local experts on each of them, A rows of this rank, BSK rows that it receives, H1 and N1 the
    widths of a row before and after. Every rank of the domain calls it, in the same order of calls. Products are accumulated in
    float32 and rounded once, before they travel.

    Args:
        gmm_x: [A, H1] bfloat16, float16 or (portable rules) float32, ordered by (local expert l, destination rank j); block (l, j)
            has ``send_counts[j * e + l]`` rows. May be non-contiguous.
        gmm_weight: [e, H1, N1], or [e, N1, H1] with trans_gmm_weight; dtype of gmm_x.
        hcom: the expert-parallel domain, as torch's ``group.group_name`` or a ProcessGroup.
        ep_world_size: W, the size of the domain.
        send_counts: W * e ints from 0, sum A; entry ``j * e + l`` is the rows of local expert l that go to rank j. A list, tuple or
            other sequence; outside compiled code also a numpy array or a CPU tensor.
        recv_counts: W * e ints from 0, sum BSK; entry ``i * e + l`` is the rows that come from local expert l of rank i.
        send_counts_tensor: reserved; None.
        recv_counts_tensor: reserved; None.
        mm_x: [BS, H2], the shared expert's rows. Its product stays on this rank.
        mm_weight: [H2, N2], or [N2, H2] with trans_mm_weight; given if and only if mm_x is.
        trans_gmm_weight: gmm_weight is stored transposed.
        trans_mm_weight: mm_weight is stored transposed; only with mm_x.
        comm_mode: None, "ai_cpu" or "aiv"; the result is the same.

    Returns:
        y: [BSK, N1] of gmm_x.dtype, by (source rank, its local expert), which is ascending global expert id.
        mm_y: [BS, N2] of mm_x.dtype, ``mm_x @ mm_weight``; None without mm_x.

    Raises:
        ArgumentError: an argument breaks a rule, or one rank's counts are not those of its peers; on all ranks, nothing was sent.
        MismatchError: ranks disagree on the operator or on an argument that must be equal.
        GroupError: the group does not exist in this process.
        ExchangeError: a peer died or did not answer in time.
    """
    return call("npu_gmm_alltoallv", locals())  # type: ignore[no-any-return]


def npu_alltoallv_gmm(
    gmm_x: Tensor,
    gmm_weight: Tensor,
    hcom: str | torch.distributed.ProcessGroup,
    ep_world_size: int,
    send_counts: Counts,
    recv_counts: Counts,
    *,
    send_counts_tensor: Tensor | None = None,
    recv_counts_tensor: Tensor | None = None,
    mm_x: Tensor | None = None,
    mm_weight: Tensor | None = None,
    trans_gmm_weight: bool = False,
    trans_mm_weight: bool = False,
    permute_out_flag: bool = False,
    comm_mode: str | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Send each row to the rank of its expert, then multiply every local expert's rows with its weight.

    The inverse movement of `npu_gmm_alltoallv`, whose letters and rounding hold here too: that operator with the two count lists
    exchanged brings the rows back. Every rank of the domain calls it, in the same order of calls.

    Args:
        gmm_x: [A, H1] bfloat16, float16 or (portable rules) float32, ordered by (destination rank j, its local expert l), which is
            ascending global expert id; block (j, l) has ``send_counts[j * e + l]`` rows. May be non-contiguous.
        gmm_weight: [e, H1, N1], or [e, N1, H1] with trans_gmm_weight; dtype of gmm_x.
        hcom: the expert-parallel domain, as torch's ``group.group_name`` or a ProcessGroup.
        ep_world_size: W, the size of the domain.
        send_counts: W * e ints from 0, sum A; entry ``j * e + l`` is the rows for local expert l of rank j. A list, tuple or other
            sequence; outside compiled code also a numpy array or a CPU tensor.
        recv_counts: W * e ints from 0, sum BSK; entry ``i * e + l`` is the rows that come from rank i for local expert l here.
        send_counts_tensor: reserved; None.
        recv_counts_tensor: reserved; None.
        mm_x: [BS, H2], the shared expert's rows. Its product stays on this rank.
        mm_weight: [H2, N2], or [N2, H2] with trans_mm_weight; given if and only if mm_x is.
        trans_gmm_weight: gmm_weight is stored transposed.
        trans_mm_weight: mm_weight is stored transposed; only with mm_x.
        permute_out_flag: also return the received rows.
        comm_mode: None, "ai_cpu" or "aiv"; the result is the same.

    Returns:
        gmm_y: [BSK, N1] of gmm_x.dtype, by (local expert, source rank).
        mm_y: [BS, N2] of mm_x.dtype, ``mm_x @ mm_weight``; None without mm_x.
        permute_out: [BSK, H1] of gmm_x.dtype, the received rows in the order of gmm_y; None without permute_out_flag.

    Raises:
        ArgumentError: an argument breaks a rule, or one rank's counts are not those of its peers; on all ranks, nothing was sent.
        MismatchError: ranks disagree on the operator or on an argument that must be equal.
        GroupError: the group does not exist in this process.
        ExchangeError: a peer died or did not answer in time.
    """
    return call("npu_alltoallv_gmm", locals())  # type: ignore[no-any-return]
