"""A small MoE exchange in the idiom of the published eager scripts: forked ranks, hccl groups, dispatch, combine.

The experts return what they get, so each token must come back as itself times the sum of its weights. Argument: port.
"""

# mypy: ignore-errors

import sys

import torch
import torch.distributed as dist
import torch_npu
from torch.multiprocessing import Process

world_size = 4
bs, h, k = 8, 64, 2
moe_expert_num = 8
dtype = torch.bfloat16


def get_hcomm_info(rank, comm_group):
    if torch.__version__ > "2.0.1":
        return comm_group._get_backend(torch.device("npu")).get_hccl_comm_name(rank)
    return comm_group.get_hccl_comm_name(rank)


def run_npu_process(rank, port):
    torch_npu.npu.set_device(rank)
    dist.init_process_group(backend="hccl", rank=rank, world_size=world_size, init_method=f"tcp://127.0.0.1:{port}")
    ep_group = dist.new_group(backend="hccl", ranks=range(world_size))
    torch.npu.manual_seed(rank)
    x = torch.randn(bs, h, dtype=dtype).npu()
    expert_ids = torch.stack([torch.randperm(moe_expert_num)[:k] for _ in range(bs)]).to(torch.int32).npu()
    expert_scales = torch.rand(bs, k, dtype=torch.float32).npu()
    common = {
        "group_ep": get_hcomm_info(rank, ep_group),
        "ep_world_size": world_size,
        "ep_rank_id": rank,
        "moe_expert_num": moe_expert_num,
        "global_bs": bs * world_size,
    }
    expand_x, _, assist, token_nums, ep_counts, tp_counts, expand_scales = torch_npu.npu_moe_distribute_dispatch_v2(
        x=x, expert_ids=expert_ids, quant_mode=0, **common
    )
    torch.npu.synchronize()
    out = torch_npu.npu_moe_distribute_combine_v2(
        expand_x=expand_x,
        expert_ids=expert_ids,
        assist_info_for_combine=assist,
        ep_send_counts=ep_counts,
        tp_send_counts=tp_counts,
        expert_scales=expert_scales,
        expand_scales=expand_scales,
        **common,
    )
    wanted = x.float() * expert_scales.sum(1, keepdim=True)
    torch.testing.assert_close(out.float(), wanted, rtol=2**-7, atol=2**-7)
    received = token_nums.sum()
    dist.all_reduce(received)
    assert received.item() == bs * k * world_size
    sys.stdout.write(f"rank {rank} npu finished!\n")


if __name__ == "__main__":
    p_list = [Process(target=run_npu_process, args=(rank, sys.argv[1])) for rank in range(world_size)]
    for p in p_list:
        p.start()
    for p in p_list:
        p.join()
    print("run npu success.")
