"""MoE dispatch and combine in halves: setups that post and return, teardowns that finish.

A layer makes the four calls in this order, with its own computation between the halves of each::

    y, expand_idx, command = npu_moe_distribute_dispatch_setup(x, expert_ids, *domain)
    expand_x, dynamic_scales, assist, nums = npu_moe_distribute_dispatch_teardown(x, y, expert_ids, command, *domain)
    rows = experts(expand_x)
    placeholder, command = npu_moe_distribute_combine_setup(rows, expert_ids, assist, *domain)
    out = npu_moe_distribute_combine_teardown(rows, placeholder, expert_ids, expand_idx, expert_scales, command, *domain)

A setup waits for no other rank (the first call of a group does: its ranks choose the backend together). At most 8 setups of a
group may be under way. All ranks make their setups and other calls in the same order, and each rank its teardowns in the order of
its setups.

Letters: W = ep_world_size ranks, R_s = shared_expert_rank_num, M = moe_expert_num, e = M / (W - R_s) experts per MoE rank, BS tokens
of this rank, H hidden size, K = top-k, L experts of this rank (e, or 1 on a shared-expert rank), A = rows this rank may receive:
gbs * min(e, K) on a MoE rank, with gbs = global_bs or BS * W. Align<n>(v) is v rounded up to a multiple of n.
"""

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
    """Start a dispatch: post this rank's rows for the ranks of their experts, and return without waiting for any of them.

    `npu_moe_distribute_dispatch_teardown` finishes it. The four halves together give the bits of `npu_moe_distribute_dispatch_v2` and
    `npu_moe_distribute_combine_v2`. The letters below are explained at the top of this file and in `docs/operators`.

    Args:
        x: [BS, H] bfloat16, float16 or (portable rules) float32. May be non-contiguous.
        expert_ids: [BS, K] int32, distinct within a row, each in 0..M-1; ids of tokens that take no part may be anything.
        group_ep: the expert-parallel domain, as torch's ``group.group_name`` or a ProcessGroup.
        ep_world_size: W, the size of the domain.
        ep_rank_id: this rank's id in it, 0..W-1.
        moe_expert_num: M; a multiple of W - R_s. Expert i lives on rank R_s + i // e.
        scales: [M, H] or [shared_expert_num + M, H] float32, smooth factors applied before quantising; the last M rows are those of
            the MoE experts. Without rows of their own, copies for shared experts are not smoothed. Only with quant_mode 2.
        x_active_mask: [BS] bool; the first ``sum`` tokens take part.
        expert_shard_type: 0: shared-expert ranks come first.
        shared_expert_num: shared experts on ranks of their own. Counts in the shapes of ``y`` and ``comm_cmd_info`` even when R_s is 0.
        shared_expert_rank_num: R_s, a multiple of shared_expert_num.
        quant_mode: 0 moves rows as they are; 2 quantises each copy to int8 with one scale.
        global_bs: 0 if every rank has the same BS, otherwise (largest BS) * W, equal on all ranks.
        comm_type: 0, 1 or 2, a way of moving on a device; the result is the same.
        comm_alg: "".
        y_dtype: newer products only; None.

    Returns:
        y: [BS * (K + shared_expert_num), Align256(H)] x.dtype with quant_mode 0, [.., Align512(Align32(H) + 4)] int8 with quant_mode 2:
            row t * K + k holds the row of token t as its k-th expert gets it. For the teardown.
        expand_idx: [BS * K] int32: for each pair t * K + k, how many earlier pairs of this rank have the same expert. For
            combine_teardown.
        comm_cmd_info: [(BS * (K + shared_expert_num) + W * L) * 16] int32: which operation this is. For the teardown.

    Raises:
        ArgumentError: this rank refuses an argument, or 8 setups are under way. It waits until its peers have heard of it: they raise
            the same text in their teardown.
        MismatchError: this rank refuses an argument and peers are in another operator.
        GroupError: the group does not exist in this process.
        ExchangeError: a peer is gone.
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
    """Finish the oldest operation under way, a dispatch: wait for the rows of all ranks and group them by local expert.

    Takes what `npu_moe_distribute_dispatch_setup` got and returned, unchanged, and the same arguments.

    Args:
        x: [BS, H], as given to the setup.
        y: [BS * (K + shared_expert_num), ..], as returned by the setup.
        expert_ids: [BS, K] int32, as given to the setup.
        comm_cmd_info: [(BS * (K + shared_expert_num) + W * L) * 16] int32, as returned by the setup.
        group_ep: as given to the setup.
        ep_world_size: as given to the setup.
        ep_rank_id: as given to the setup.
        moe_expert_num: as given to the setup.
        expert_shard_type: as given to the setup.
        shared_expert_num: as given to the setup.
        shared_expert_rank_num: as given to the setup.
        quant_mode: as given to the setup.
        global_bs: as given to the setup.
        expert_token_nums_type: 1 for counts, 0 for inclusive prefix sums.
        comm_type: as given to the setup.
        comm_alg: as given to the setup.

    Returns:
        expand_x: [A, H] x.dtype or int8: by local expert, source rank, token. Rows after the received ones are unspecified.
        dynamic_scales: [A] float32: ``expand_x[i] * dynamic_scales[i]`` gives row i back; unspecified with quant_mode 0.
        assist_info_for_combine: [A * 128] int32, to be handed to combine_setup. Begins with the inclusive prefix sum of rows over
            (local expert, source rank): W * L entries.
        expert_token_nums: [L] int64: rows per local expert.

    Raises:
        ArgumentError: an argument breaks a rule or is not that of the setup, or this is not the teardown of the oldest setup: on this
            rank alone, and the right call can follow. Or a rank refused its setup: on every rank, and the operation is over.
        MismatchError: setups of different ranks do not agree; on every rank, and the operation is over.
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
    expert_shard_type: int = 0,
    shared_expert_num: int = 1,
    shared_expert_rank_num: int = 0,
    global_bs: int = 0,
    comm_quant_mode: int = 0,
    comm_type: int = 0,
    comm_alg: str = "",
) -> tuple[Tensor, Tensor]:
    """Start a combine: post the experts' rows for the ranks of their tokens, and return without waiting for any of them.

    `npu_moe_distribute_combine_teardown` finishes it. What is said of setups at `npu_moe_distribute_dispatch_setup` holds here too.
    Every argument may be given by position, as the published page has it, or by name.

    Args:
        expand_x: [A, H] bfloat16, float16 or (portable rules) float32: the experts' output rows, in the order of dispatch's
            ``expand_x``. Rows after the received ones are not read; there may be more or fewer of them (portable rules).
        expert_ids: [BS, K] int32, as given to dispatch_setup.
        assist_info_for_combine: [A * 128] int32, as returned by dispatch_teardown; the first W * L entries are read. That of
            `npu_moe_distribute_dispatch_v2` has another content.
        group_ep: the expert-parallel domain, as torch's ``group.group_name`` or a ProcessGroup.
        ep_world_size: W, the size of the domain.
        ep_rank_id: this rank's id in it, 0..W-1.
        moe_expert_num: M; a multiple of W - R_s.
        expert_shard_type: 0: shared-expert ranks come first.
        shared_expert_num: shared experts on ranks of their own; without effect when R_s is 0.
        shared_expert_rank_num: R_s, a multiple of shared_expert_num.
        global_bs: as given to dispatch_setup.
        comm_quant_mode: 0: rows travel as they are.
        comm_type: 0, 1 or 2, a way of moving on a device; the result is the same.
        comm_alg: "".

    Returns:
        quant_expand_x: [A, Align512(Align32(H) + Align8(H) / 8 * 4)] int8: a placeholder, for the teardown.
        comm_cmd_info: [(A + W) * 16] int32: which operation this is. For the teardown. (A is here the number of rows of ``expand_x``.)

    Raises:
        ArgumentError: this rank refuses an argument, or 8 setups are under way. It waits until its peers have heard of it: they raise
            the same text in their teardown.
        MismatchError: this rank refuses an argument and peers are in another operator.
        GroupError: the group does not exist in this process.
        ExchangeError: a peer is gone.
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
    """Finish the oldest operation under way, a combine: wait for the rows of this rank's tokens and sum them, weighted, k ascending.

    Takes what `npu_moe_distribute_combine_setup` got and returned, unchanged, and the same arguments.

    Args:
        expand_x: [A, H], as given to the setup.
        quant_expand_x: [A, ..] int8, as returned by the setup.
        expert_ids: [BS, K] int32, as given to the setup.
        expand_idx: [BS * K] int32, as returned by dispatch_setup.
        expert_scales: [BS, K] or [BS * K] float32, the weight of each pair. Rows of shared experts are not weighted.
        comm_cmd_info: [(A + W) * 16] int32, as returned by the setup.
        group_ep: as given to the setup.
        ep_world_size: as given to the setup.
        ep_rank_id: as given to the setup.
        moe_expert_num: as given to the setup.
        x_active_mask: [BS] bool, as given to dispatch_setup. Tokens that take no part get zeros.
        shared_expert_x: [BS, H], or [a, b, H] with a * b = BS, in the dtype of expand_x: rows that are added unweighted, of a shared
            expert that the caller computes. Only when R_s is 0.
        expert_shard_type: as given to the setup.
        shared_expert_num: as given to the setup.
        shared_expert_rank_num: as given to the setup.
        global_bs: as given to the setup.
        comm_quant_mode: as given to the setup.
        comm_type: as given to the setup.
        comm_alg: as given to the setup.

    Returns:
        x: [BS, H] expand_x.dtype: the sum of each token's rows, in float32, rounded once.

    Raises:
        ArgumentError: an argument breaks a rule or is not that of the setup, or this is not the teardown of the oldest setup: on this
            rank alone, and the right call can follow. The rows that came are not those that expert_ids and x_active_mask announce: on
            this rank alone, and the operation is over. Or a rank refused its setup: on every rank, and the operation is over.
        MismatchError: setups of different ranks do not agree; on every rank, and the operation is over.
        GroupError: the group does not exist in this process.
        ExchangeError: a peer died or did not answer in time.
    """
    return call("npu_moe_distribute_combine_teardown", locals())  # type: ignore[no-any-return]
