"""Golden of the split operators: dispatch_setup + dispatch_teardown, and combine_setup + combine_teardown.

`ranks` holds one dict per rank with the arguments of both halves by their public names. What travels between the
halves (`y`, `comm_cmd_info`, `quant_expand_x`) is opaque, so only what a caller can rely on is here. Results are as in
`reference`.
"""

from __future__ import annotations

import torch

from .reference import Output, accumulate, expert_token_nums, receive
from .reference_return import gather_back
from .reference_routes import Args, Roles, Row, buffer_sizes, domains, expand_idx, padded, routes, running_counts


def split_dispatch(ranks: list[Args]) -> list[list[Output]]:
    """Golden of `npu_moe_distribute_dispatch_setup` and `npu_moe_distribute_dispatch_teardown`.

    Returns, per rank: `expand_idx` (of setup), `expand_x`, `dynamic_scales`, `assist_info_for_combine`,
    `expert_token_nums` (of teardown). `assist_info_for_combine` begins with the running receive counts, W*L ints on a
    MoE rank and W on a shared-expert rank.

    Raises ValueError when the ranks' arguments do not fit together.
    """
    roles, groups = domains(ranks)
    calls = groups[0]
    return [_outputs(calls, routes(calls, roles), roles, int(args["ep_rank_id"])) for args in ranks]


def split_combine(ranks: list[Args]) -> list[list[Output]]:
    """Golden of `npu_moe_distribute_combine_setup` and `npu_moe_distribute_combine_teardown`.

    Per rank one output, (BS, H) in the dtype of `expand_x`. Raises ValueError when `expand_idx` or the counts in
    `assist_info_for_combine` do not fit the ids and the mask.
    """
    calls = [_with_counts(args) for args in ranks]
    all_returned = gather_back(calls, counts="assist_info_for_combine", assist="expand_idx", by_index=True)
    results: list[list[Output]] = []
    for args, returned in zip(calls, all_returned, strict=True):
        total = accumulate(args, returned)
        results.append([(total.to(args["expand_x"].dtype), total.size(0))])
    return results


def _outputs(calls: list[Args], rows: list[list[Row]], roles: Roles, rank: int) -> list[Output]:
    args = calls[rank]
    num_rows, _ = buffer_sizes(args)
    counts = running_counts(rows[rank], roles.world_size, roles.local_experts(rank))
    received = receive(calls, roles, rank, rows[rank], counts, first_moe_scale=_first_moe_scale(args, roles))
    index = expand_idx(args, roles)
    scales, valid = padded(received.scales, num_rows, "dynamic_scales")
    return [
        (index, index.size(0)),
        padded(received.x, num_rows, "expand_x"),
        (scales, valid if args["quant_mode"] == 2 else 0),
        # Without any token anywhere A is 0, and so is the room for the counts.
        padded(counts if num_rows else counts[:0], num_rows * 128, "assist_info_for_combine"),
        expert_token_nums(args, roles, rank, [counts]),
    ]


def _first_moe_scale(args: Args, roles: Roles) -> int:
    """The row of `scales` that belongs to MoE expert 0.

    Tables with and without rows for `shared_expert_num` experts are both in use, whether or not there are ranks for
    shared experts.
    """
    if args["scales"] is None:
        return 0
    first = int(args["scales"].size(0)) - roles.expert_num
    if first not in (0, int(args["shared_expert_num"])):
        raise ValueError(
            f"scales has {args['scales'].size(0)} rows; {roles.expert_num} MoE experts and "
            f"{args['shared_expert_num']} shared ones need {roles.expert_num} or both together."
        )
    return first


def _with_counts(args: Args) -> Args:
    """The call with counts of 0 where `assist_info_for_combine` had no room for any."""
    if args["assist_info_for_combine"].numel():
        return args
    counts = torch.zeros(int(args["ep_world_size"]) * buffer_sizes(args)[1], dtype=torch.int32)
    return {**args, "assist_info_for_combine": counts}
