"""Grouped matmul and AlltoAllV in the idiom of the published scripts: torch's spawn, count lists, eager and compiled.

Every rank makes every rank's input from its seed, so that it knows what must arrive. Argument: port.
"""

# mypy: ignore-errors

import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch_npu
import torchair
from torch.distributed.distributed_c10d import _get_default_group

e, h1, n1 = 2, 16, 8
ROWS = [[[3, 0], [1, 4]], [[2, 5], [0, 1]]]  # [rank][its local expert][destination rank]


class Model(torch.nn.Module):
    def forward(self, gmm_x, gmm_weight, hcom, ep_world_size, send_counts, recv_counts):
        return torch_npu.npu_gmm_alltoallv(
            gmm_x=gmm_x,
            gmm_weight=gmm_weight,
            hcom=hcom,
            ep_world_size=ep_world_size,
            send_counts=list(send_counts),
            recv_counts=list(recv_counts),
            send_counts_tensor=None,
            recv_counts_tensor=None,
            mm_x=None,
            mm_weight=None,
            trans_gmm_weight=False,
            trans_mm_weight=False,
        )


def inputs(rank):
    generator = torch.Generator().manual_seed(rank)
    blocks = [[torch.randn(rows, h1, generator=generator).half() for rows in expert] for expert in ROWS[rank]]
    return blocks, torch.randn(e, h1, n1, generator=generator).half()


def run_npu_gmm_alltoallv(rank, ep_world_size, port):
    torch_npu.npu.set_device(rank)
    dist.init_process_group(backend="hccl", rank=rank, world_size=ep_world_size, init_method="tcp://127.0.0.1:" + port)
    hcom_info = _get_default_group()._get_backend(torch.device("npu")).get_hccl_comm_name(rank)
    blocks, weight = inputs(rank)
    arguments = {
        "gmm_x": torch.cat([block for expert in blocks for block in expert]).npu(),
        "gmm_weight": weight.npu(),
        "hcom": hcom_info,
        "ep_world_size": ep_world_size,
        "send_counts": [ROWS[rank][expert][to] for to in range(ep_world_size) for expert in range(e)],
        "recv_counts": [ROWS[source][expert][rank] for source in range(ep_world_size) for expert in range(e)],
    }
    y, mm_y = Model()(**arguments)
    assert mm_y is None
    wanted = []
    for source in range(ep_world_size):
        theirs, their_weight = inputs(source)
        wanted += [theirs[expert][rank].float() @ their_weight[expert].float() for expert in range(e)]
    torch.testing.assert_close(y.float(), torch.cat(wanted), rtol=2**-8, atol=2**-6)
    model = torch.compile(Model(), backend=torchair.get_npu_backend(compiler_config=None), dynamic=False)
    assert torch.equal(model(**arguments)[0], y)
    sys.stdout.write(f"rank {rank} npu finished!\n")


if __name__ == "__main__":
    ep_world_size = 2
    mp.spawn(run_npu_gmm_alltoallv, args=(ep_world_size, sys.argv[1]), nprocs=ep_world_size)
