"""MoE dispatch and combine in halves: setups that post and return, teardowns that finish."""

from __future__ import annotations

import torch
from torch import Tensor

from ._call import call


def npu_moe_distribute_dispatch_setup(
    x: Tensor,
    expert_ids: Tensor,
    group_ep: str | torch.distributed.ProcessGroup,
    ep_world_size: int,
    ep_rank_id: int,
    moe_expert_num: int,
    *,
    scales: Tensor | None = None,
    x_active_mask: Tensor | None = None,
    expert_shard_type: int = 0,
    shared_expert_num: int = 1,
    shared_expert_rank_num: int = 0,
    quant_mode: int = 0,
    global_bs: int = 0,
    comm_type: int = 0,
    comm_alg: str = "",
    y_dtype: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Start a dispatch: offer this rank's rows to the ranks of their experts and return without waiting for any of them.

    `npu_moe_distribute_dispatch_teardown` finishes it; what the caller computes in between runs while peers are still on their
    way. Up to 8 setups of a group may wait for their teardowns, which must come in the order of the setups. The four halves
    together give the bits of `npu_moe_distribute_dispatch_v2` and `npu_moe_distribute_combine_v2`. Letters as there; here BS * K
    pairs are sent, and ``shared_expert_num`` counts in the shape of ``y`` even without shared-expert ranks.

    Args:
        x: [BS, H] bfloat16/float16/float32. the token rows of this rank.
        expert_ids: [BS, K] int32. the experts of each token, distinct within a row.
        group_ep: expert-parallel domain: name or ProcessGroup.
        ep_world_size: W, ranks in the expert-parallel domain.
        ep_rank_id: this rank's id in the domain, 0..W-1.
        moe_expert_num: M, MoE experts over all ranks.
        scales: [scale_rows, H] float32. smooth factors: a row per MoE expert, optionally preceded by one per shared expert.
        x_active_mask: [BS] bool. the first sum(mask) tokens take part; others are never read.
        expert_shard_type: 0: shared-expert ranks come before MoE ranks.
        shared_expert_num: shared experts on ranks of their own; counts only with such ranks.
        shared_expert_rank_num: R_s, ranks 0..R_s-1 that hold shared experts.
        quant_mode: 0: rows as they are; 2: int8 rows with one scale per row.
        global_bs: 0 if every rank has the same BS, otherwise (largest BS) * W, equal on all ranks.
        comm_type: 0, 1 or 2: the way of moving on a device; the result is the same.
        comm_alg: "".
        y_dtype: newer products only; None.

    Returns:
        y: [BS * (K + shared_expert_num), y_width]: the rows sent, pair f at row f; to be handed to the teardown unread.
        expand_idx: [BS * K]: for each pair, how many earlier pairs of this rank have the same expert.
        comm_cmd_info: [(BS * (K + shared_expert_num) + ep_world_size * L) * 16]: which operation this is; to be handed to the
            teardown.

    Raises:
        ArgumentError: an argument breaks a rule, here or on another rank; nothing has been sent. All ranks raise the same
            text.
        MismatchError: ranks disagree on the operator or on an argument that must be equal.
        GroupError: the group does not exist in this process.
        ExchangeError: a peer died or did not answer in time.
    """
    return call("npu_moe_distribute_dispatch_setup", locals())  # type: ignore[no-any-return]


def npu_moe_distribute_dispatch_teardown(
    x: Tensor,
    y: Tensor,
    expert_ids: Tensor,
    comm_cmd_info: Tensor,
    group_ep: str | torch.distributed.ProcessGroup,
    ep_world_size: int,
    ep_rank_id: int,
    moe_expert_num: int,
    *,
    expert_shard_type: int = 0,
    shared_expert_num: int = 1,
    shared_expert_rank_num: int = 0,
    quant_mode: int = 0,
    global_bs: int = 0,
    expert_token_nums_type: int = 1,
    comm_type: int = 0,
    comm_alg: str = "",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Finish the oldest dispatch under way: wait for the rows of all ranks and group them by local expert.

    Takes the tensors that `npu_moe_distribute_dispatch_setup` got and returned, unchanged, and the same arguments.

    Args:
        x: [BS, H] bfloat16/float16/float32. as given to the setup.
        y: [BS * (K + shared_expert_num), y_width] bfloat16/float16/float32/int8. as returned by the setup.
        expert_ids: [BS, K] int32. the experts of each token, distinct within a row.
        comm_cmd_info: [command_length] int32. as returned by the setup: which operation this finishes.
        group_ep: expert-parallel domain: name or ProcessGroup.
        ep_world_size: W, ranks in the expert-parallel domain.
        ep_rank_id: this rank's id in the domain, 0..W-1.
        moe_expert_num: M, MoE experts over all ranks.
        expert_shard_type: 0: shared-expert ranks come before MoE ranks.
        shared_expert_num: shared experts on ranks of their own; counts only with such ranks.
        shared_expert_rank_num: R_s, ranks 0..R_s-1 that hold shared experts.
        quant_mode: 0: rows as they are; 2: int8 rows with one scale per row.
        global_bs: 0 if every rank has the same BS, otherwise (largest BS) * W, equal on all ranks.
        expert_token_nums_type: 1: counts; 0: inclusive prefix sums.
        comm_type: 0, 1 or 2: the way of moving on a device; the result is the same.
        comm_alg: "".

    Returns:
        expand_x: [A, H]: received rows, by local expert, then source rank, then token; the rest is unspecified.
        dynamic_scales: [A]: factor that turns row i back; unspecified with quant_mode 0.
        assist_info_for_combine: [A * 128]: begins with the inclusive prefix sum of rows over (local expert, source rank);
            hand it on unread.
        expert_token_nums: [L]: rows per local expert: counts or inclusive prefix sums.

    Raises:
        ArgumentError: an argument breaks a rule, this is not the oldest setup's teardown, or another rank refused its setup.
        MismatchError: ranks disagreed in the setup on an argument that must be equal.
        GroupError: the group does not exist in this process.
        ExchangeError: a peer died or did not answer in time.
    """
    return call("npu_moe_distribute_dispatch_teardown", locals())  # type: ignore[no-any-return]


def npu_moe_distribute_combine_setup(
    expand_x: Tensor,
    expert_ids: Tensor,
    assist_info_for_combine: Tensor,
    group_ep: str | torch.distributed.ProcessGroup,
    ep_world_size: int,
    ep_rank_id: int,
    moe_expert_num: int,
    *,
    expert_shard_type: int = 0,
    shared_expert_num: int = 1,
    shared_expert_rank_num: int = 0,
    global_bs: int = 0,
    comm_quant_mode: int = 0,
    comm_type: int = 0,
    comm_alg: str = "",
) -> tuple[Tensor, Tensor]:
    """Start a combine: offer the experts' rows to the ranks of their tokens and return without waiting for any of them.

    `npu_moe_distribute_combine_teardown` finishes it. Order and number of setups as in `npu_moe_distribute_dispatch_setup`.

    Args:
        expand_x: [rows, H] bfloat16/float16/float32. the experts' output rows, in the order of the inputs.
        expert_ids: [BS, K] int32. the experts of each token, distinct within a row.
        assist_info_for_combine: [counts_length] int32. as returned by dispatch_teardown.
        group_ep: expert-parallel domain: name or ProcessGroup.
        ep_world_size: W, ranks in the expert-parallel domain.
        ep_rank_id: this rank's id in the domain, 0..W-1.
        moe_expert_num: M, MoE experts over all ranks.
        expert_shard_type: 0: shared-expert ranks come before MoE ranks.
        shared_expert_num: shared experts on ranks of their own; counts only with such ranks.
        shared_expert_rank_num: R_s, ranks 0..R_s-1 that hold shared experts.
        global_bs: 0 if every rank has the same BS, otherwise (largest BS) * W, equal on all ranks.
        comm_quant_mode: 0: rows travel as they are.
        comm_type: 0, 1 or 2: the way of moving on a device; the result is the same.
        comm_alg: "".

    Returns:
        quant_expand_x: [rows, align(512, align(32, H) + align(8, H) // 8 * 4)]: a placeholder for the teardown.
        comm_cmd_info: [(rows + ep_world_size) * 16]: which operation this is; to be handed to the teardown.

    Raises:
        ArgumentError: an argument breaks a rule, here or on another rank; nothing has been sent. All ranks raise the same
            text.
        MismatchError: ranks disagree on the operator or on an argument that must be equal.
        GroupError: the group does not exist in this process.
        ExchangeError: a peer died or did not answer in time.
    """
    return call("npu_moe_distribute_combine_setup", locals())  # type: ignore[no-any-return]


def npu_moe_distribute_combine_teardown(
    expand_x: Tensor,
    quant_expand_x: Tensor,
    expert_ids: Tensor,
    expand_idx: Tensor,
    expert_scales: Tensor,
    comm_cmd_info: Tensor,
    group_ep: str | torch.distributed.ProcessGroup,
    ep_world_size: int,
    ep_rank_id: int,
    moe_expert_num: int,
    *,
    x_active_mask: Tensor | None = None,
    shared_expert_x: Tensor | None = None,
    expert_shard_type: int = 0,
    shared_expert_num: int = 1,
    shared_expert_rank_num: int = 0,
    global_bs: int = 0,
    comm_quant_mode: int = 0,
    comm_type: int = 0,
    comm_alg: str = "",
) -> Tensor:
    """Finish the oldest combine under way: wait for the rows of this rank's tokens and sum them as `npu_moe_distribute_combine_v2` does.

    Takes the tensors that `npu_moe_distribute_combine_setup` got and returned, unchanged, and the same arguments.

    Args:
        expand_x: [rows, H] bfloat16/float16/float32. the experts' output rows, in the order of the inputs.
        quant_expand_x: [rows, align(512, align(32, H) + align(8, H) // 8 * 4)] int8. as returned by the setup.
        expert_ids: [BS, K] int32. the experts of each token, distinct within a row.
        expand_idx: [BS * K] int32. as returned by dispatch_setup.
        expert_scales: [BS, K] or [BS * K] float32. weight of each (token, k) pair; shared experts are not weighted.
        comm_cmd_info: [command_length] int32. as returned by the setup: which operation this finishes.
        group_ep: expert-parallel domain: name or ProcessGroup.
        ep_world_size: W, ranks in the expert-parallel domain.
        ep_rank_id: this rank's id in the domain, 0..W-1.
        moe_expert_num: M, MoE experts over all ranks.
        x_active_mask: [BS] bool. the first sum(mask) tokens take part; others are never read.
        shared_expert_x: [BS, H] or [shared_rows_0, shared_rows_1, H] bfloat16/float16/float32. a row per token that is added
            unweighted.
        expert_shard_type: 0: shared-expert ranks come before MoE ranks.
        shared_expert_num: shared experts on ranks of their own; counts only with such ranks.
        shared_expert_rank_num: R_s, ranks 0..R_s-1 that hold shared experts.
        global_bs: 0 if every rank has the same BS, otherwise (largest BS) * W, equal on all ranks.
        comm_quant_mode: 0: rows travel as they are.
        comm_type: 0, 1 or 2: the way of moving on a device; the result is the same.
        comm_alg: "".

    Returns:
        x: [BS, H]: the sum of each token's expert rows; zeros for tokens that take no part.

    Raises:
        ArgumentError: an argument breaks a rule, this is not the oldest setup's teardown, or another rank refused its setup.
        MismatchError: ranks disagreed in the setup on an argument that must be equal.
        GroupError: the group does not exist in this process.
        ExchangeError: a peer died or did not answer in time.
    """
    return call("npu_moe_distribute_combine_teardown", locals())  # type: ignore[no-any-return]
