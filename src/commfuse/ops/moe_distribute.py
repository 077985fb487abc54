"""MoE dispatch and combine, version 2."""

from __future__ import annotations

import torch
from torch import Tensor

from ._call import call


def npu_moe_distribute_dispatch_v2(
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
    elastic_info: Tensor | None = None,
    performance_info: Tensor | None = None,
    group_tp: str | torch.distributed.ProcessGroup = "",
    tp_world_size: int = 0,
    tp_rank_id: int = 0,
    expert_shard_type: int = 0,
    shared_expert_num: int = 1,
    shared_expert_rank_num: int = 0,
    quant_mode: int = 0,
    global_bs: int = 0,
    expert_token_nums_type: int = 1,
    comm_alg: str = "",
    zero_expert_num: int = 0,
    copy_expert_num: int = 0,
    const_expert_num: int = 0,
    y_dtype: int | None = None,
    x_dtype: int | None = None,
    scales_dtype: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Send every token's row to the ranks that hold its experts, and group what arrives by expert.

    Letters: W = ep_world_size ranks, R_s = shared_expert_rank_num, M = moe_expert_num, e = M / (W - R_s) experts per MoE rank,
    BS tokens of this rank, H hidden size, K = top-k, A = rows this rank may receive: gbs * min(e, K) on a MoE rank, with
    gbs = global_bs or BS * W. Every rank of the domain calls it, in the same order of calls.

    Args:
        x: [BS, H] bfloat16, float16 or (portable rules) float32. May be non-contiguous.
        expert_ids: [BS, K] int32, distinct within a row, each in 0..M + special experts - 1; inactive pairs may hold anything.
        group_ep: the expert-parallel domain, as torch's ``group.group_name`` or a ProcessGroup.
        ep_world_size: W, the size of the domain.
        ep_rank_id: this rank's id in it, 0..W-1.
        moe_expert_num: M; a multiple of W - R_s. Expert i lives on rank R_s + i // e.
        scales: [shared experts + M, H] float32, smooth factors applied before quantising; only with quant_mode 2.
        x_active_mask: bool; [BS]: the first ``sum`` tokens take part; [BS, K]: the marked pairs do.
        expert_scales: [BS, K] float32; carried into ``expand_scales``.
        elastic_info: [4 + 2W] int32, the ranks that are left after shrinking; see `docs/operators`.
        performance_info: [W] int64; the microseconds waited for each rank are added to it.
        group_tp: the tensor-parallel domain; only with ``tp_world_size`` 2.
        tp_world_size: 2 if two ranks share all rows they receive; 0 or 1 otherwise.
        tp_rank_id: this rank's id in the tensor-parallel domain.
        expert_shard_type: 0: shared-expert ranks come first.
        shared_expert_num: shared experts on ranks of their own, 0..4; without effect when R_s is 0.
        shared_expert_rank_num: R_s, a multiple of shared_expert_num.
        quant_mode: 0 moves rows as they are; 2 quantises each copy to int8 with one scale.
        global_bs: 0 if every rank has the same BS, otherwise (largest BS) * W, equal on all ranks.
        expert_token_nums_type: 1 for counts, 0 for inclusive prefix sums.
        comm_alg: "", "fullmesh", "hierarchy", "fullmesh_v1", "fullmesh_v2" or "ccu"; the result is the same.
        zero_expert_num: ids M.. that contribute nothing; their pairs are not sent.
        copy_expert_num: the next ids; they contribute the token itself, at combine.
        const_expert_num: the next ids; they contribute alpha_1 * x + alpha_2 * v, at combine.
        y_dtype: newer products only; None.
        x_dtype: newer products only; None.
        scales_dtype: newer products only; None.

    Returns:
        expand_x: [A, H] x.dtype or int8 ([2A, H] with tensor parallelism): by local expert, source rank, token. Rows after the
            received ones are unspecified.
        dynamic_scales: [A] float32: ``expand_x[i] * dynamic_scales[i]`` gives row i back; unspecified with quant_mode 0.
        assist_info_for_combine: [max(BS * K, 128 * A)] int32, to be handed to combine.
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
    return call("npu_moe_distribute_dispatch_v2", locals())  # type: ignore[no-any-return]


def npu_moe_distribute_combine_v2(
    expand_x: Tensor,
    expert_ids: Tensor,
    assist_info_for_combine: Tensor,
    ep_send_counts: Tensor,
    expert_scales: Tensor,
    group_ep: str | torch.distributed.ProcessGroup,
    ep_world_size: int,
    ep_rank_id: int,
    moe_expert_num: int,
    *,
    tp_send_counts: Tensor | None = None,
    x_active_mask: Tensor | None = None,
    expand_scales: Tensor | None = None,
    shared_expert_x: Tensor | None = None,
    elastic_info: Tensor | None = None,
    ori_x: Tensor | None = None,
    const_expert_alpha_1: Tensor | None = None,
    const_expert_alpha_2: Tensor | None = None,
    const_expert_v: Tensor | None = None,
    performance_info: Tensor | None = None,
    group_tp: str | torch.distributed.ProcessGroup = "",
    tp_world_size: int = 0,
    tp_rank_id: int = 0,
    expert_shard_type: int = 0,
    shared_expert_num: int = 1,
    shared_expert_rank_num: int = 0,
    global_bs: int = 0,
    comm_quant_mode: int = 0,
    comm_alg: str = "",
    zero_expert_num: int = 0,
    copy_expert_num: int = 0,
    const_expert_num: int = 0,
) -> Tensor:
    """Return the experts' rows to the tokens' ranks and sum them, weighted, in the order of k.

    ``x[t] = sum over k of expert_scales[t, k] * row(t, k)`` in float32, k ascending, multiplied then added, then the rows of shared
    experts and ``shared_expert_x[t]`` unweighted, rounded once. Letters as in `npu_moe_distribute_dispatch_v2`, whose arguments
    and results of the same call belong here unchanged.

    Args:
        expand_x: [at least the received rows, H] bfloat16, float16 or (portable rules) float32: the experts' outputs in the order of
            dispatch's expand_x. Rows after the received ones are not read.
        expert_ids: [BS, K] int32, as given to dispatch.
        assist_info_for_combine: as returned by dispatch.
        ep_send_counts: dispatch's ep_recv_counts.
        expert_scales: [BS, K] float32, the weights; those of inactive pairs are not read.
        group_ep: the expert-parallel domain, as in dispatch.
        ep_world_size: W.
        ep_rank_id: this rank's id, 0..W-1.
        moe_expert_num: M.
        tp_send_counts: [2] int32, dispatch's tp_recv_counts; not looked at without tensor parallelism.
        x_active_mask: as given to dispatch.
        expand_scales: accepted and not needed.
        shared_expert_x: [BS, H] or [a, b, H] with a * b = BS, added unweighted; only when shared_expert_rank_num is 0.
        elastic_info: as given to dispatch.
        ori_x: [BS, H], the token rows; needed by copy and constant experts.
        const_expert_alpha_1: [N] or [N, H], the factor of x in constant experts.
        const_expert_alpha_2: shaped likewise, the factor of v.
        const_expert_v: [N, H], the constant rows.
        performance_info: [W] int64; the microseconds waited for each rank are added to it.
        group_tp: as in dispatch.
        tp_world_size: as in dispatch; with 2, both partners' outputs for a row are added before it returns.
        tp_rank_id: as in dispatch.
        expert_shard_type: 0.
        shared_expert_num: as in dispatch.
        shared_expert_rank_num: as in dispatch.
        global_bs: as in dispatch.
        comm_quant_mode: 0; 2: rows travel as int8 in blocks of 8 columns (not with tensor parallelism).
        comm_alg: as in dispatch; it need not be the same.
        zero_expert_num: as in dispatch.
        copy_expert_num: as in dispatch.
        const_expert_num: as in dispatch.

    Returns:
        [BS, H] of expand_x.dtype; zeros for tokens that take no part.

    Raises:
        ArgumentError: an argument breaks a rule, or what was handed on from dispatch is not that of one dispatch; on all ranks.
        MismatchError: ranks disagree on the operator or on an argument that must be equal.
        GroupError: the group does not exist in this process.
        ExchangeError: a peer died or did not answer in time.
    """
    return call("npu_moe_distribute_combine_v2", locals())  # type: ignore[no-any-return]
