"""Dispatch tokens to their experts on two ranks, and combine what the experts made of them.

python examples/two_ranks.py
"""

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import commfuse as torch_npu

WORLD_SIZE, MOE_EXPERT_NUM, HIDDEN = 2, 4, 8


def run(rank: int) -> None:
    dist.init_process_group("gloo", init_method="tcp://127.0.0.1:29611", rank=rank, world_size=WORLD_SIZE)
    group = dist.group.WORLD.group_name

    # Token t of rank r is 100 r + 10 t + (0, 1, 2, ...); each has two experts. Experts 0, 1 live on rank 0, experts 2, 3 on rank 1.
    x = (100 * rank + 10 * torch.arange(3)[:, None] + torch.arange(HIDDEN)).to(torch.bfloat16)
    expert_ids = torch.tensor([[[0, 2], [3, 1], [2, 3]], [[1, 0], [2, 0], [3, 1]]][rank], dtype=torch.int32)
    weights = torch.tensor([[0.5, 0.25], [0.75, 0.125], [1.0, 0.5]])

    expand_x, _, assist, expert_token_nums, counts, _, _ = torch_npu.npu_moe_distribute_dispatch_v2(
        x, expert_ids, group, WORLD_SIZE, rank, MOE_EXPERT_NUM
    )

    # Rows arrive grouped by local expert; expert j multiplies its rows by j + 1.
    y, begin = torch.empty_like(expand_x), 0
    for local, num_rows in enumerate(expert_token_nums.tolist()):
        expert = rank * len(expert_token_nums) + local
        y[begin : begin + num_rows] = expand_x[begin : begin + num_rows] * (expert + 1)
        begin += num_rows

    out = torch_npu.npu_moe_distribute_combine_v2(y, expert_ids, assist, counts, weights, group, WORLD_SIZE, rank, MOE_EXPERT_NUM)
    expected = x.float() * (weights * (expert_ids + 1)).sum(1, keepdim=True)
    difference = (out.float() - expected).abs().max().item()
    print(
        f"rank {rank}: expert_token_nums {expert_token_nums.tolist()}, first column of the sums {out[:, 0].tolist()}", flush=True
    )
    assert difference <= 2**-7 * expected.abs().max().item(), difference
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.spawn(run, nprocs=WORLD_SIZE)
