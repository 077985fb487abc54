"""Dispatch and combine in two halves each, in the idiom of the published script: spawned processes that answer by queues.

The experts return what they get, so each token must come back as itself times the sum of its weights. Argument: port.
"""

# mypy: ignore-errors

import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch_npu

ep_world_size = 2
bs, h, k = 8, 64, 2
moe_expert_num = 4


def dispatch_combine(rank, port, c2p, p2c):
    torch_npu.npu.set_device(rank)
    dist.init_process_group(backend="hccl", world_size=ep_world_size, rank=rank, init_method="tcp://127.0.0.1:" + port)
    ep_group = dist.new_group(backend="hccl", ranks=range(ep_world_size))
    x = torch.randn(bs, h, dtype=torch.bfloat16).npu()
    expert_ids = torch.stack([torch.randperm(moe_expert_num)[:k] for _ in range(bs)]).to(torch.int32).npu()
    expert_scales = torch.rand(bs, k, dtype=torch.float32).npu()
    common = {
        "expert_ids": expert_ids,
        "group_ep": ep_group._get_backend(torch.device("npu")).get_hccl_comm_name(rank),
        "ep_world_size": ep_world_size,
        "ep_rank_id": rank,
        "moe_expert_num": moe_expert_num,
        "global_bs": bs * ep_world_size,
    }
    y, expand_idx, comm_cmd_info = torch_npu.npu_moe_distribute_dispatch_setup(x=x, quant_mode=0, **common)
    torch.npu.synchronize()
    expand_x, _, assist_info, _ = torch_npu.npu_moe_distribute_dispatch_teardown(
        x=x, y=y, comm_cmd_info=comm_cmd_info, quant_mode=0, **common
    )
    quant_expand_x, comm_cmd_info = torch_npu.npu_moe_distribute_combine_setup(
        expand_x=expand_x, assist_info_for_combine=assist_info, **common
    )
    torch.npu.synchronize()
    out = torch_npu.npu_moe_distribute_combine_teardown(
        expand_x=expand_x,
        quant_expand_x=quant_expand_x,
        expand_idx=expand_idx,
        expert_scales=expert_scales,
        comm_cmd_info=comm_cmd_info,
        **common,
    )
    c2p.put((rank, out.cpu(), x.float().cpu() * expert_scales.sum(1, keepdim=True)))
    p2c.get()


if __name__ == "__main__":
    ctx = mp.get_context("spawn")
    c2p, p2c = ctx.Queue(), ctx.Queue()
    p_list = [ctx.Process(target=dispatch_combine, args=(rank, sys.argv[1], c2p, p2c)) for rank in range(ep_world_size)]
    for p in p_list:
        p.start()
    answers = [c2p.get() for _ in p_list]
    for _ in p_list:
        p2c.put(0)
    for p in p_list:
        p.join()
    for rank, out, wanted in answers:
        torch.testing.assert_close(out.float(), wanted, rtol=2**-7, atol=2**-7)
        print(f"rank {rank} npu finished!")
