"""The first version of MoE dispatch and combine, and combine with residual and RMS norm.

Letters: W = ep_world_size ranks, R_s = shared_expert_rank_num, M = moe_expert_num, e = M / (W - R_s) experts per MoE rank, BS tokens
of this rank, H hidden size, K = top-k, A = rows this rank may receive: gbs * min(e, K) on a MoE rank, with gbs = global_bs or BS * W.
Every rank of the domain calls them, in the same order of calls.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._call import call


def npu_moe_distribute_dispatch(
    x: Tensor,
    expert_ids: Tensor,
    group_ep: str | torch.distributed.ProcessGroup,
    ep_world_size: int,
    ep_rank_id: int,
    moe_expert_num: int,
    *,
    scales: Tensor | None = None,
    x_active_mask: Tensor | None = None,
    expert_scales: Tensor | None = None,
    group_tp: str | torch.distributed.ProcessGroup = "",
    tp_world_size: int = 0,
    tp_rank_id: int = 0,
    expert_shard_type: int = 0,
    shared_expert_num: int = 1,
    shared_expert_rank_num: int = 0,
    quant_mode: int = 0,
    global_bs: int = 0,
    expert_token_nums_type: int = 1,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Dispatch, first version: as `npu_moe_distribute_dispatch_v2`, with ``expand_idx`` in place of ``assist_info_for_combine``.

    There are no special experts, no shrinking and at most one shared expert. With shared-expert ranks, a MoE rank's tokens are shared
    out over all of them, and a shared-expert rank keeps its own tokens as its first rows.

    Args:
        x: [BS, H] bfloat16, float16 or (portable rules) float32. May be non-contiguous.
        expert_ids: [BS, K] int32, distinct within a row, each in 0..M-1; inactive pairs may hold anything.
        group_ep: the expert-parallel domain, as torch's ``group.group_name`` or a ProcessGroup.
        ep_world_size: W, the size of the domain; a multiple of R_s.
        ep_rank_id: this rank's id in it, 0..W-1.
        moe_expert_num: M; a multiple of W - R_s. Expert i lives on rank R_s + i // e.
        scales: [shared experts + M, H] float32, smooth factors applied before quantising; only with quant_mode 2.
        x_active_mask: bool; [BS]: the first ``sum`` tokens take part; [BS, K]: the marked pairs do. Portable rules, and only when R_s
            is 0.
        expert_scales: [BS, K] float32; carried into ``expand_scales``.
        group_tp: the tensor-parallel domain; only with ``tp_world_size`` 2.
        tp_world_size: 2 if two ranks share all rows they receive; 0 or 1 otherwise.
        tp_rank_id: this rank's id in the tensor-parallel domain.
        expert_shard_type: 0: shared-expert ranks come first.
        shared_expert_num: 1 with shared-expert ranks; without effect when R_s is 0.
        shared_expert_rank_num: R_s, ranks that all hold the one shared expert.
        quant_mode: 0 moves rows as they are; 2 quantises each copy to int8 with one scale.
        global_bs: 0 if every rank has the same BS, otherwise (largest BS) * W, equal on all ranks.
        expert_token_nums_type: 1 for counts, 0 for inclusive prefix sums.

    Returns:
        expand_x: [A, H] x.dtype or int8 ([2A, H] with tensor parallelism): by local expert, source rank, token. Rows after the
            received ones are unspecified.
        dynamic_scales: [A] float32: ``expand_x[i] * dynamic_scales[i]`` gives row i back; unspecified with quant_mode 0.
        expand_idx: [BS * K] int32: for each pair t * K + k, how many earlier pairs of this rank have the same expert.
        expert_token_nums: [local experts] int64: rows per local expert.
        ep_recv_counts: [W * local experts] int32: inclusive prefix sum over (local expert, source rank).
        tp_recv_counts: [tp_world_size] int32.
        expand_scales: [A] float32: ``expert_scales`` of row i if given.

    Raises:
        ArgumentError: an argument breaks a rule, here or on another rank; nothing has been sent. All ranks raise the same text.
        MismatchError: ranks disagree on the operator or on an argument that must be equal.
        GroupError: the group does not exist in this process.
        ExchangeError: a peer died or did not answer in time.
    """
    return call("npu_moe_distribute_dispatch", locals())  # type: ignore[no-any-return]


def npu_moe_distribute_combine(
    expand_x: Tensor,
    expert_ids: Tensor,
    expand_idx: Tensor,
    ep_send_counts: Tensor,
    expert_scales: Tensor,
    group_ep: str | torch.distributed.ProcessGroup,
    ep_world_size: int,
    ep_rank_id: int,
    moe_expert_num: int,
    *,
    tp_send_counts: Tensor | None = None,
    x_active_mask: Tensor | None = None,
    activation_scale: Tensor | None = None,
    weight_scale: Tensor | None = None,
    group_list: Tensor | None = None,
    expand_scales: Tensor | None = None,
    shared_expert_x: Tensor | None = None,
    group_tp: str | torch.distributed.ProcessGroup = "",
    tp_world_size: int = 0,
    tp_rank_id: int = 0,
    expert_shard_type: int = 0,
    shared_expert_num: int = 1,
    shared_expert_rank_num: int = 0,
    global_bs: int = 0,
    out_dtype: int = 0,
    comm_quant_mode: int = 0,
    group_list_type: int = 0,
) -> Tensor:
    """Combine, first version: as `npu_moe_distribute_combine_v2`, with the ``expand_idx`` of `npu_moe_distribute_dispatch`.

    Args:
        expand_x: [A, H] bfloat16, float16 or (portable rules) float32: the experts' output rows, in the order of dispatch's
            ``expand_x``. Rows after the received ones are not read.
        expert_ids: [BS, K] int32, as given to dispatch.
        expand_idx: [BS * K] int32, as returned by dispatch.
        ep_send_counts: [W * local experts] int32, dispatch's ``ep_recv_counts``.
        expert_scales: [BS, K] float32, the weight of each pair. Rows of shared experts are not weighted.
        group_ep: the expert-parallel domain, as torch's ``group.group_name`` or a ProcessGroup.
        ep_world_size: W, the size of the domain; a multiple of R_s.
        ep_rank_id: this rank's id in it, 0..W-1.
        moe_expert_num: M; a multiple of W - R_s.
        tp_send_counts: [2] int32, dispatch's ``tp_recv_counts``; only looked at when tp_world_size is 2.
        x_active_mask: bool, [BS] or [BS, K], as given to dispatch. Tokens that take no part get zeros.
        activation_scale: reserved; None.
        weight_scale: reserved; None.
        group_list: reserved; None.
        expand_scales: dispatch's ``expand_scales``; the result does not depend on it.
        shared_expert_x: None. The real operator takes it and drops it without a word; `npu_moe_distribute_combine_v2` adds it.
        group_tp: the tensor-parallel domain; only with ``tp_world_size`` 2.
        tp_world_size: 2 if two ranks hold parts of each other's rows, which are added first; 0 or 1 otherwise.
        tp_rank_id: this rank's id in the tensor-parallel domain.
        expert_shard_type: 0: shared-expert ranks come first.
        shared_expert_num: 1 with shared-expert ranks; without effect when R_s is 0.
        shared_expert_rank_num: R_s, ranks that all hold the one shared expert.
        global_bs: 0 if every rank has the same BS, otherwise (largest BS) * W, equal on all ranks.
        out_dtype: reserved; 0.
        comm_quant_mode: 0: rows travel as they are; 2: as int8 in blocks of 8 columns.
        group_list_type: reserved; 0.

    Returns:
        x: [BS, H] expand_x.dtype: the sum of each token's rows, in float32, k ascending, rounded once.

    Raises:
        ArgumentError: an argument breaks a rule, here or on another rank, or what was handed on from dispatch is not that of one
            dispatch. All ranks raise the same text.
        MismatchError: ranks disagree on the operator or on an argument that must be equal.
        GroupError: the group does not exist in this process.
        ExchangeError: a peer died or did not answer in time.
    """
    return call("npu_moe_distribute_combine", locals())  # type: ignore[no-any-return]


def npu_moe_distribute_combine_add_rms_norm(
    expand_x: Tensor,
    expert_ids: Tensor,
    expand_idx: Tensor,
    ep_send_counts: Tensor,
    expert_scales: Tensor,
    residual_x: Tensor,
    gamma: Tensor,
    group_ep: str | torch.distributed.ProcessGroup,
    ep_world_size: int,
    ep_rank_id: int,
    moe_expert_num: int,
    *,
    tp_send_counts: Tensor | None = None,
    x_active_mask: Tensor | None = None,
    activation_scale: Tensor | None = None,
    weight_scale: Tensor | None = None,
    group_list: Tensor | None = None,
    expand_scales: Tensor | None = None,
    shared_expert_x: Tensor | None = None,
    elastic_info: Tensor | None = None,
    ori_x: Tensor | None = None,
    const_expert_alpha_1: Tensor | None = None,
    const_expert_alpha_2: Tensor | None = None,
    const_expert_v: Tensor | None = None,
    group_tp: str | torch.distributed.ProcessGroup = "",
    tp_world_size: int = 0,
    tp_rank_id: int = 0,
    expert_shard_type: int = 0,
    shared_expert_num: int = 1,
    shared_expert_rank_num: int = 0,
    global_bs: int = 0,
    out_dtype: int = 0,
    comm_quant_mode: int = 0,
    group_list_type: int = 0,
    comm_alg: str = "",
    norm_eps: float = 1e-06,
    zero_expert_num: int = 0,
    copy_expert_num: int = 0,
    const_expert_num: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Combine as `npu_moe_distribute_combine_v2`, add ``residual_x``, and apply RMS norm with weight ``gamma``.

    With s the float32 sum of combine, before it is rounded::

        z    = s + residual_x                          float32
        x    = z                                       rounded
        rstd = 1 / sqrt(mean(z * z) + norm_eps)        float32, from the unrounded z
        y    = gamma * (z * rstd)                      rounded after each of the two products

    Goes with `npu_moe_distribute_dispatch_v2`, whose ``assist_info_for_combine`` it takes under the name ``expand_idx``. Arguments
    that are not described otherwise are those of `npu_moe_distribute_combine_v2`.

    Args:
        expand_x: [A, H] bfloat16, or (portable rules) float16 or float32: the experts' output rows, in the order of dispatch's
            ``expand_x``. Rows after the received ones are not read.
        expert_ids: [BS, K] int32, as given to dispatch.
        expand_idx: [A * 128] int32, dispatch_v2's ``assist_info_for_combine``.
        ep_send_counts: [W * local experts] int32, dispatch's ``ep_recv_counts``.
        expert_scales: [BS, K] float32, the weight of each pair. Rows of shared experts are not weighted.
        residual_x: [BS, 1, H] expand_x.dtype, added to the sums before the norm.
        gamma: [H] expand_x.dtype, the weight of the norm.
        group_ep: the expert-parallel domain, as torch's ``group.group_name`` or a ProcessGroup.
        ep_world_size: W, the size of the domain.
        ep_rank_id: this rank's id in it, 0..W-1.
        moe_expert_num: M; a multiple of W - R_s.
        tp_send_counts: [2] int32, dispatch's ``tp_recv_counts``; only looked at when tp_world_size is 2.
        x_active_mask: bool, [BS] or [BS, K], as given to dispatch. Tokens that take no part get zeros in all three outputs.
        activation_scale: reserved; None.
        weight_scale: reserved; None.
        group_list: reserved; None.
        expand_scales: dispatch's ``expand_scales``; the result does not depend on it.
        shared_expert_x: [BS, H], or [a, b, H] with a * b = BS, in the dtype of expand_x: rows that are added unweighted.
        elastic_info: [4 + 2W] int32, the ranks that are left after shrinking, as given to dispatch.
        ori_x: [BS, H] expand_x.dtype, the rows given to dispatch; needed by copy and constant experts.
        const_expert_alpha_1: [N] or [N, H] expand_x.dtype, factor of ori_x.
        const_expert_alpha_2: [N] or [N, H] expand_x.dtype, factor of const_expert_v.
        const_expert_v: [N, H] expand_x.dtype, the row of each constant expert.
        group_tp: the tensor-parallel domain; only with ``tp_world_size`` 2.
        tp_world_size: 2 if two ranks hold parts of each other's rows, which are added first; 0 or 1 otherwise.
        tp_rank_id: this rank's id in the tensor-parallel domain.
        expert_shard_type: 0: shared-expert ranks come first.
        shared_expert_num: shared experts on ranks of their own; without effect when R_s is 0.
        shared_expert_rank_num: R_s, a multiple of shared_expert_num.
        global_bs: 0 if every rank has the same BS, otherwise (largest BS) * W, equal on all ranks.
        out_dtype: reserved; 0.
        comm_quant_mode: 0: rows travel as they are; 2: as int8 in blocks of 8 columns.
        group_list_type: reserved; 0.
        comm_alg: "", "fullmesh", "hierarchy", "fullmesh_v1", "fullmesh_v2" or "ccu"; the result is the same.
        norm_eps: added to the mean of the squares; at least 0.
        zero_expert_num: ids M.. that contribute nothing.
        copy_expert_num: the next ids; they contribute the token itself.
        const_expert_num: N, the next ids; they contribute alpha_1 * x + alpha_2 * v.

    Returns:
        y: [BS, 1, H] expand_x.dtype.
        rstd: [BS, 1, 1] float32.
        x: [BS, 1, H] expand_x.dtype, the sum with the residual, for the next layer.

    Raises:
        ArgumentError: an argument breaks a rule, here or on another rank, or what was handed on from dispatch is not that of one
            dispatch. All ranks raise the same text.
        MismatchError: ranks disagree on the operator or on an argument that must be equal.
        GroupError: the group does not exist in this process.
        ExchangeError: a peer died or did not answer in time.
    """
    return call("npu_moe_distribute_combine_add_rms_norm", locals())  # type: ignore[no-any-return]
