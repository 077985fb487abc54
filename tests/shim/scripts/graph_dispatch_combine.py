"""The same exchange in the idiom of the published graph scripts: a model compiled by torchair's backend. Argument: port."""

# mypy: ignore-errors

import sys

import torch
import torch.distributed as dist
import torch_npu
import torchair
from torch.multiprocessing import Process

world_size = 4
bs, h, k = 8, 64, 2
moe_expert_num = 8


class Model(torch.nn.Module):
    def forward(self, x, expert_ids, expert_scales, group_ep, ep_world_size, ep_rank_id, moe_expert_num, quant_mode, global_bs):
        expand_x, scales, assist, _, ep_counts, tp_counts, _ = torch_npu.npu_moe_distribute_dispatch_v2(
            x=x,
            expert_ids=expert_ids,
            group_ep=group_ep,
            ep_world_size=ep_world_size,
            ep_rank_id=ep_rank_id,
            moe_expert_num=moe_expert_num,
            quant_mode=quant_mode,
            global_bs=global_bs,
        )
        if expand_x.dtype == torch.int8:
            expand_x = (expand_x.float() * scales.unsqueeze(1)).to(x.dtype)
        return torch_npu.npu_moe_distribute_combine_v2(
            expand_x=expand_x,
            expert_ids=expert_ids,
            assist_info_for_combine=assist,
            ep_send_counts=ep_counts,
            tp_send_counts=tp_counts,
            expert_scales=expert_scales,
            group_ep=group_ep,
            ep_world_size=ep_world_size,
            ep_rank_id=ep_rank_id,
            moe_expert_num=moe_expert_num,
            global_bs=global_bs,
        )


def run_npu_process(rank, port):
    torch_npu.npu.set_device(rank)
    dist.init_process_group(backend="hccl", rank=rank, world_size=world_size, init_method=f"tcp://127.0.0.1:{port}")
    ep_group = dist.new_group(backend="hccl", ranks=range(world_size))
    name = ep_group._get_backend(torch.device("npu")).get_hccl_comm_name(rank)
    config = torchair.CompilerConfig()
    config.mode = "max-autotune"
    eager = Model().npu()
    model = torch.compile(eager, backend=torchair.get_npu_backend(compiler_config=config), dynamic=False, fullgraph=True)
    for quant_mode in (0, 2):
        x = torch.randn(bs, h, dtype=torch.bfloat16).npu()
        expert_ids = torch.stack([torch.randperm(moe_expert_num)[:k] for _ in range(bs)]).to(torch.int32).npu()
        expert_scales = torch.rand(bs, k).npu()
        args = (x, expert_ids, expert_scales, name, world_size, rank, moe_expert_num, quant_mode, bs * world_size)
        assert torch.equal(model.forward(*args), eager(*args))
    torch.npu.synchronize()
    sys.stdout.write(f"rank {rank} npu finished!\n")


if __name__ == "__main__":
    p_list = [Process(target=run_npu_process, args=(rank, sys.argv[1])) for rank in range(world_size)]
    for p in p_list:
        p.start()
    for p in p_list:
        p.join()
    print("run npu success.")
