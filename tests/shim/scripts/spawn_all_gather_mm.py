"""All-gather and matmul in the idiom of the published scripts: torch's spawn, the default group, eager and compiled.

Argument: port.
"""

# mypy: ignore-errors

import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch_npu
from torch.distributed.distributed_c10d import _get_default_group


class Model(torch.nn.Module):
    def forward(self, input, weight, hcomm_info, world_size, gather_output):
        return torch_npu.npu_all_gather_base_mm(input, weight, hcomm_info, world_size, gather_output=gather_output)


def define_model(model):
    import torchair

    return torch.compile(model, backend=torchair.get_npu_backend(compiler_config=None), dynamic=True)


def run_all_gather_base_mm(rank, world_size, port, m, k, n, dtype):
    torch_npu.npu.set_device(rank)
    dist.init_process_group(backend="hccl", rank=rank, world_size=world_size, init_method="tcp://127.0.0.1:" + port)
    hcomm_info = _get_default_group()._get_backend(torch.device("npu")).get_hccl_comm_name(rank)
    everything = torch.randn(m, k, generator=torch.Generator().manual_seed(1)).to(dtype)
    shard = everything.chunk(world_size)[rank].npu()
    weight = torch.randn(k, n, generator=torch.Generator().manual_seed(2)).to(dtype).npu()
    output, gather_out = torch_npu.npu_all_gather_base_mm(shard, weight, hcomm_info, world_size)
    assert torch.equal(gather_out, everything)
    torch.testing.assert_close(output.float(), everything.float() @ weight.float(), rtol=2**-8, atol=2**-5)
    compiled = define_model(Model())(shard, weight, hcomm_info, world_size, gather_output=True)
    assert torch.equal(compiled[0], output)
    assert torch.equal(compiled[1], gather_out)
    sys.stdout.write(f"rank {rank} npu finished!\n")


if __name__ == "__main__":
    worksize = 2
    mp.spawn(run_all_gather_base_mm, args=(worksize, sys.argv[1], 32, 64, 16, torch.float16), nprocs=worksize)
