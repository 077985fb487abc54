"""The first version of MoE dispatch and combine, and combine with residual and RMS norm."""

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

    There are no special experts, no shrinking and one shared expert at most. With shared-expert ranks a rank's tokens are shared
    out over all of them, and a shared-expert rank keeps its own tokens as its first rows.

    Args:
        x: [BS, H] bfloat16/float16/float32. the token rows of this rank.
        expert_ids: [BS, K] int32. the experts of each token, distinct within a row, 0..M+Z+C+N-1; inactive pairs may hold
            anything.
        group_ep: expert-parallel domain: name or ProcessGroup.
        ep_world_size: W, ranks in the expert-parallel domain.
        ep_rank_id: this rank's id in the domain, 0..W-1.
        moe_expert_num: M, MoE experts over all ranks.
        scales: [E_s + moe_expert_num, H] float32. smooth-quantisation factors: one row per shared expert, then one per MoE
            expert.
        x_active_mask: [BS] or [BS, K] bool. which tokens (1-D: the first sum(mask) of them) or (token, k) pairs (2-D) take
            part; others are never read.
        expert_scales: [BS, K] float32. weights of the pairs; they travel with the rows into expand_scales.
        group_tp: tensor-parallel domain; only looked at when tp_world_size is 2.
        tp_world_size: 0 or 1: no tensor parallelism; 2: two ranks share their rows.
        tp_rank_id: this rank's id in the tensor-parallel domain.
        expert_shard_type: 0: shared-expert ranks come before MoE ranks.
        shared_expert_num: shared experts on ranks of their own; counts only with such ranks.
        shared_expert_rank_num: R_s, ranks 0..R_s-1 that hold shared experts.
        quant_mode: 0: rows as they are; 2: int8 rows with one scale per row.
        global_bs: 0 if every rank has the same BS, otherwise (largest BS) * W, equal on all ranks.
        expert_token_nums_type: 1: expert_token_nums holds counts; 0: inclusive prefix sums.

    Returns:
        expand_x: [A * copies, H]: received rows, by local expert, then source rank, then token; the rest is unspecified.
        dynamic_scales: [A * copies]: factor that turns row i back: x ≈ expand_x[i] * dynamic_scales[i]; unspecified with
            quant_mode 0.
        expand_idx: [BS * K]: how many earlier pairs of this rank have the same expert.
        expert_token_nums: [L]: rows per local expert: counts or inclusive prefix sums (expert_token_nums_type).
        ep_recv_counts: [ep_world_size * L * copies + hierarchy_counts]: inclusive prefix sum of rows over (local expert,
            source rank).
        tp_recv_counts: [tp_world_size]: with tensor parallelism: own rows at tp_rank_id, the partner's at the other place.
        expand_scales: [A]: expert_scales of row i, if expert_scales was given; otherwise unspecified.

    Raises:
        ArgumentError: an argument breaks a rule, here or on another rank; nothing has been sent. All ranks raise the same
            text.
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
    """Combine, first version: as `npu_moe_distribute_combine_v2`, with dispatch's ``expand_idx``; for `npu_moe_distribute_dispatch`.

    Args:
        expand_x: [rows, H] bfloat16/float16/float32. the experts' output rows, in the order in which dispatch delivered their
            inputs.
        expert_ids: [BS, K] int32. as given to dispatch.
        expand_idx: [BS * K] int32. as returned by dispatch: how many earlier pairs of this rank have the same expert.
        ep_send_counts: [counts_length] int32. dispatch's ep_recv_counts.
        expert_scales: [BS, K] float32. weight of each (token, k) pair; shared experts are not weighted.
        group_ep: expert-parallel domain: name or ProcessGroup.
        ep_world_size: W, ranks in the expert-parallel domain.
        ep_rank_id: this rank's id in the domain, 0..W-1.
        moe_expert_num: M, MoE experts over all ranks.
        tp_send_counts: [tp_world_size] int32. dispatch's tp_recv_counts; only looked at when tp_world_size is 2.
        x_active_mask: [BS] or [BS, K] bool. which tokens (1-D: the first sum(mask) of them) or (token, k) pairs (2-D) take
            part; others are never read.
        activation_scale: reserved; None.
        weight_scale: reserved; None.
        group_list: reserved; None.
        expand_scales: [A] float32. dispatch's expand_scales; nothing here depends on it.
        shared_expert_x: reserved; None.
        group_tp: tensor-parallel domain; only looked at when tp_world_size is 2.
        tp_world_size: 0 or 1: no tensor parallelism; 2: two ranks share their rows.
        tp_rank_id: this rank's id in the tensor-parallel domain.
        expert_shard_type: 0: shared-expert ranks come before MoE ranks.
        shared_expert_num: shared experts on ranks of their own; counts only with such ranks.
        shared_expert_rank_num: R_s, ranks 0..R_s-1 that hold shared experts.
        global_bs: 0 if every rank has the same BS, otherwise (largest BS) * W, equal on all ranks.
        out_dtype: reserved; 0.
        comm_quant_mode: 0: rows travel as they are; 2: as int8 in blocks of 8 columns.
        group_list_type: reserved; 0.

    Returns:
        x: [BS, H]: the sum of each token's expert rows; zeros for tokens that take no part.

    Raises:
        ArgumentError: an argument breaks a rule, here or on another rank; nothing has been sent. All ranks raise the same
            text.
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

    With s the float32 sum of combine: ``z = s + residual_x``, ``rstd = 1 / sqrt(mean(z * z) + norm_eps)``,
    ``y = gamma * round(z * rstd)``. ``expand_idx`` takes dispatch_v2's ``assist_info_for_combine``.

    Args:
        expand_x: [rows, H] bfloat16/float16/float32. the experts' output rows, in the order in which dispatch delivered their
            inputs.
        expert_ids: [BS, K] int32. as given to dispatch.
        expand_idx: [assist_length] int32. dispatch_v2's assist_info_for_combine.
        ep_send_counts: [counts_length] int32. dispatch's ep_recv_counts.
        expert_scales: [BS, K] float32. weight of each (token, k) pair; shared experts are not weighted.
        residual_x: [BS, 1, H] bfloat16/float16/float32. added to the sums before the norm.
        gamma: [H] bfloat16/float16/float32. weight of the norm.
        group_ep: expert-parallel domain: name or ProcessGroup.
        ep_world_size: W, ranks in the expert-parallel domain.
        ep_rank_id: this rank's id in the domain, 0..W-1.
        moe_expert_num: M, MoE experts over all ranks.
        tp_send_counts: [tp_world_size] int32. dispatch's tp_recv_counts; only looked at when tp_world_size is 2.
        x_active_mask: [BS] or [BS, K] bool. which tokens (1-D: the first sum(mask) of them) or (token, k) pairs (2-D) take
            part; others are never read.
        activation_scale: reserved; None.
        weight_scale: reserved; None.
        group_list: reserved; None.
        expand_scales: [A] float32. dispatch's expand_scales; nothing here depends on it.
        shared_expert_x: [BS, H] or [shared_rows_0, shared_rows_1, H] bfloat16/float16/float32. a row per token that is added
            unweighted (a shared expert computed by the caller).
        elastic_info: [4 + 2 * ep_world_size] int32. [shrunk?, ranks alive, shared-expert ranks, MoE experts, id of each rank
            or -1 (W), rank of each id or -1 (W)].
        ori_x: [BS, H] bfloat16/float16/float32. the token rows given to dispatch; needed by copy and constant experts.
        const_expert_alpha_1: [const_expert_num] or [const_expert_num, H] bfloat16/float16/float32. factor of x, one per
            constant expert or one per constant expert and column.
        const_expert_alpha_2: [const_expert_num] or [const_expert_num, H] bfloat16/float16/float32. factor of v, shaped like
            const_expert_alpha_1.
        const_expert_v: [const_expert_num, H] bfloat16/float16/float32. the constant row of each constant expert.
        group_tp: tensor-parallel domain; only looked at when tp_world_size is 2.
        tp_world_size: 0 or 1: no tensor parallelism; 2: two ranks share their rows.
        tp_rank_id: this rank's id in the tensor-parallel domain.
        expert_shard_type: 0: shared-expert ranks come before MoE ranks.
        shared_expert_num: shared experts on ranks of their own; counts only with such ranks.
        shared_expert_rank_num: R_s, ranks 0..R_s-1 that hold shared experts.
        global_bs: 0 if every rank has the same BS, otherwise (largest BS) * W, equal on all ranks.
        out_dtype: reserved; 0.
        comm_quant_mode: 0: rows travel as they are; 2: as int8 in blocks of 8 columns.
        group_list_type: reserved; 0.
        comm_alg: "", "fullmesh", "hierarchy", "fullmesh_v1", "fullmesh_v2" or "ccu": the same rows and sums here; products
            limit it.
        norm_eps: added to the mean of squares.
        zero_expert_num: Z, ids M..M+Z-1 contribute nothing.
        copy_expert_num: C, the next C ids contribute the token itself.
        const_expert_num: N, the next N ids contribute alpha_1*x + alpha_2*v.

    Returns:
        y: [BS, 1, H]: gamma * (x * rstd), rounded after each product.
        rstd: [BS, 1, 1]: 1 / sqrt(mean of squares + norm_eps).
        x: [BS, 1, H]: combine's sum + residual_x, rounded once.

    Raises:
        ArgumentError: an argument breaks a rule, here or on another rank; nothing has been sent. All ranks raise the same
            text.
        MismatchError: ranks disagree on the operator or on an argument that must be equal.
        GroupError: the group does not exist in this process.
        ExchangeError: a peer died or did not answer in time.
    """
    return call("npu_moe_distribute_combine_add_rms_norm", locals())  # type: ignore[no-any-return]
