"""The signatures that torch_npu publishes, written down from its pages and schemas: what ours must equal, name for name.

Where a page and the schema differ, the note says which one stands here. The newest keyword arguments are included.
"""

from __future__ import annotations

import re

# npu_moe_distribute_dispatch_v2: the page ends at const_expert_num; the three dtypes are in the schema.
# npu_moe_distribute_combine_v2: performance_info is in the schema, not on the page.
# npu_moe_distribute_combine_setup: the page calls the first argument expend_x, and prints no "*" where the schema has one after
# moe_expert_num. The schema's name and the page's order without "*" stand here, which allows both ways of calling.
# npu_moe_distribute_combine_teardown: an older page has comm_cmd_info last; the schema stands here.
# npu_all_gather_base_mm, npu_mm_reduce_scatter_base: the schema calls the first argument self, a newer page x1 (see ALIASES).
# npu_mm_all_reduce_base: the page prints comm_turn before antiquant_group_size; the schema stands here.
_TEXT = """
npu_moe_distribute_dispatch_v2(x, expert_ids, group_ep, ep_world_size, ep_rank_id, moe_expert_num, *, scales=None,
    x_active_mask=None, expert_scales=None, elastic_info=None, performance_info=None, group_tp='', tp_world_size=0,
    tp_rank_id=0, expert_shard_type=0, shared_expert_num=1, shared_expert_rank_num=0, quant_mode=0, global_bs=0,
    expert_token_nums_type=1, comm_alg='', zero_expert_num=0, copy_expert_num=0, const_expert_num=0, y_dtype=None,
    x_dtype=None, scales_dtype=None)
npu_moe_distribute_combine_v2(expand_x, expert_ids, assist_info_for_combine, ep_send_counts, expert_scales, group_ep,
    ep_world_size, ep_rank_id, moe_expert_num, *, tp_send_counts=None, x_active_mask=None, expand_scales=None,
    shared_expert_x=None, elastic_info=None, ori_x=None, const_expert_alpha_1=None, const_expert_alpha_2=None,
    const_expert_v=None, performance_info=None, group_tp='', tp_world_size=0, tp_rank_id=0, expert_shard_type=0,
    shared_expert_num=1, shared_expert_rank_num=0, global_bs=0, comm_quant_mode=0, comm_alg='', zero_expert_num=0,
    copy_expert_num=0, const_expert_num=0)
npu_gmm_alltoallv(gmm_x, gmm_weight, hcom, ep_world_size, send_counts, recv_counts, *, send_counts_tensor=None,
    recv_counts_tensor=None, mm_x=None, mm_weight=None, trans_gmm_weight=False, trans_mm_weight=False, comm_mode=None)
npu_alltoallv_gmm(gmm_x, gmm_weight, hcom, ep_world_size, send_counts, recv_counts, *, send_counts_tensor=None,
    recv_counts_tensor=None, mm_x=None, mm_weight=None, trans_gmm_weight=False, trans_mm_weight=False,
    permute_out_flag=False, comm_mode=None)
npu_all_gather_base_mm(input, x2, hcom, world_size, *, bias=None, x1_scale=None, x2_scale=None, gather_index=0,
    gather_output=True, comm_turn=0, output_dtype=None, comm_mode=None)
npu_mm_reduce_scatter_base(input, x2, hcom, world_size, *, reduce_op='sum', bias=None, x1_scale=None, x2_scale=None,
    comm_turn=0, output_dtype=None, comm_mode=None)
npu_mm_all_reduce_base(x1, x2, hcom, *, reduce_op='sum', bias=None, antiquant_scale=None, antiquant_offset=None, x3=None,
    dequant_scale=None, pertoken_scale=None, comm_quant_scale_1=None, comm_quant_scale_2=None, antiquant_group_size=0,
    comm_turn=0)
npu_moe_distribute_dispatch_setup(x, expert_ids, group_ep, ep_world_size, ep_rank_id, moe_expert_num, *, scales=None,
    x_active_mask=None, expert_shard_type=0, shared_expert_num=1, shared_expert_rank_num=0, quant_mode=0, global_bs=0,
    comm_type=0, comm_alg='', y_dtype=None)
npu_moe_distribute_dispatch_teardown(x, y, expert_ids, comm_cmd_info, group_ep, ep_world_size, ep_rank_id, moe_expert_num, *,
    expert_shard_type=0, shared_expert_num=1, shared_expert_rank_num=0, quant_mode=0, global_bs=0, expert_token_nums_type=1,
    comm_type=0, comm_alg='')
npu_moe_distribute_combine_setup(expand_x, expert_ids, assist_info_for_combine, group_ep, ep_world_size, ep_rank_id,
    moe_expert_num, expert_shard_type=0, shared_expert_num=1, shared_expert_rank_num=0, global_bs=0, comm_quant_mode=0,
    comm_type=0, comm_alg='')
npu_moe_distribute_combine_teardown(expand_x, quant_expand_x, expert_ids, expand_idx, expert_scales, comm_cmd_info, group_ep,
    ep_world_size, ep_rank_id, moe_expert_num, *, x_active_mask=None, shared_expert_x=None, expert_shard_type=0,
    shared_expert_num=1, shared_expert_rank_num=0, global_bs=0, comm_quant_mode=0, comm_type=0, comm_alg='')
npu_moe_distribute_dispatch(x, expert_ids, group_ep, ep_world_size, ep_rank_id, moe_expert_num, *, scales=None,
    x_active_mask=None, expert_scales=None, group_tp='', tp_world_size=0, tp_rank_id=0, expert_shard_type=0,
    shared_expert_num=1, shared_expert_rank_num=0, quant_mode=0, global_bs=0, expert_token_nums_type=1)
npu_moe_distribute_combine(expand_x, expert_ids, expand_idx, ep_send_counts, expert_scales, group_ep, ep_world_size,
    ep_rank_id, moe_expert_num, *, tp_send_counts=None, x_active_mask=None, activation_scale=None, weight_scale=None,
    group_list=None, expand_scales=None, shared_expert_x=None, group_tp='', tp_world_size=0, tp_rank_id=0,
    expert_shard_type=0, shared_expert_num=1, shared_expert_rank_num=0, global_bs=0, out_dtype=0, comm_quant_mode=0,
    group_list_type=0)
npu_moe_distribute_combine_add_rms_norm(expand_x, expert_ids, expand_idx, ep_send_counts, expert_scales, residual_x, gamma,
    group_ep, ep_world_size, ep_rank_id, moe_expert_num, *, tp_send_counts=None, x_active_mask=None, activation_scale=None,
    weight_scale=None, group_list=None, expand_scales=None, shared_expert_x=None, elastic_info=None, ori_x=None,
    const_expert_alpha_1=None, const_expert_alpha_2=None, const_expert_v=None, group_tp='', tp_world_size=0, tp_rank_id=0,
    expert_shard_type=0, shared_expert_num=1, shared_expert_rank_num=0, global_bs=0, out_dtype=0, comm_quant_mode=0,
    group_list_type=0, comm_alg='', norm_eps=1e-06, zero_expert_num=0, copy_expert_num=0, const_expert_num=0)
_npu_distribute_barrier(x_ref, group, world_size, *, time_out=None, elastic_info=None)
"""

PUBLISHED = {found[1]: " ".join(found[2].split()) for found in re.finditer(r"^(\w+)\((.*?)\)$", _TEXT, re.MULTILINE | re.DOTALL)}

# Other names under which published pages and schemas have an argument.
ALIASES = {
    ("npu_all_gather_base_mm", "input"): ("self", "x1"),
    ("npu_mm_reduce_scatter_base", "input"): ("self", "x1"),
}
