"""The "hccl" backend on four forked ranks: names, collectives, sub-groups, meshes. Arguments: port, backend."""

# mypy: ignore-errors

import sys

import torch
import torch.distributed as dist
import torch_npu
from torch.distributed.distributed_c10d import _get_default_group, _resolve_process_group
from torch.multiprocessing import Process

WORLD = 4


def comm_name(rank, group):
    if torch.__version__ > "2.0.1":
        return group._get_backend(torch.device("npu")).get_hccl_comm_name(rank)
    return group.get_hccl_comm_name(rank)


def check_names(rank, group):
    name = comm_name(rank, group)
    assert name == group.group_name == group.get_hccl_comm_name(rank)
    assert name == comm_name(10_000, group)  # the rank selects nothing
    assert _resolve_process_group(name) is group
    names = [None] * dist.get_world_size(group)
    dist.all_gather_object(names, name, group=group)
    assert len(set(names)) == 1, names
    return name


def collectives(rank, group):
    size, me = dist.get_world_size(group), dist.get_rank(group)
    x = torch.full((2,), me + 1.0).npu()
    dist.all_reduce(x, group=group)
    assert x.tolist() == [size * (size + 1) / 2] * 2
    parts = [torch.empty(1, dtype=torch.int64, device="npu") for _ in range(size)]
    dist.all_gather(parts, torch.tensor([me]).npu(), group=group)
    assert [int(part) for part in parts] == list(range(size))
    sent = torch.arange(size, device="npu") + 10 * me
    got = torch.empty_like(sent)
    dist.all_to_all_single(got, sent, group=group)
    assert got.tolist() == [10 * q + me for q in range(size)]
    first = dist.get_global_rank(group, 0)
    y = torch.tensor([me + 5], device="npu")
    dist.broadcast(y, first, group=group)
    assert y.item() == 5
    objects = [f"from {me}"]
    dist.broadcast_object_list(objects, first, group=group, device=torch.device("npu"))
    assert objects == ["from 0"]
    ring(me, size, group)
    dist.barrier(group)
    dist.barrier(group=group, device_ids=[rank])


def ring(me, size, group):
    got = torch.zeros(1)
    peers = [dist.get_global_rank(group, (me + step) % size) for step in (1, -1)]
    sends = [dist.P2POp(dist.isend, torch.tensor([float(me)]), peers[0], group)]
    receives = [dist.P2POp(dist.irecv, got, peers[1], group)]
    for work in dist.batch_isend_irecv(sends + receives):
        work.wait()
    assert got.item() == (me - 1) % size


def run(rank, port, backend):
    torch_npu.npu.set_device(rank)
    options = torch_npu._C._distributed_c10d.ProcessGroupHCCL.Options()
    options.hccl_config = {"hccl_buffer_size": 200}
    options.is_high_priority_stream = True
    dist.init_process_group(
        backend=backend,
        rank=rank,
        world_size=WORLD,
        init_method="tcp://127.0.0.1:" + port,
        pg_options=options,
    )
    assert dist.get_backend() == backend
    dist.barrier()
    everyone = check_names(rank, _get_default_group())
    collectives(rank, _get_default_group())
    halves = [dist.new_group(ranks=[i, i + 2], backend="hccl", pg_options=options) for i in range(2)]
    mine = halves[rank % 2]
    assert dist.get_backend(mine) == "hccl"
    assert check_names(rank, mine) != everyone
    collectives(rank, mine)
    alone = [dist.new_group(ranks=[i], backend="hccl") for i in range(WORLD)][rank]
    assert check_names(rank, alone) == alone.group_name
    dist.barrier(alone)
    if backend == "hccl":
        mesh = dist.init_device_mesh("npu", (2, 2), mesh_dim_names=("dp", "ep"))
        collectives(rank, mesh.get_group("ep"))
        check_names(rank, mesh.get_group("ep"))
    dist.barrier()  # rank 0 serves the store, which the last groups of the others still need
    dist.destroy_process_group()
    sys.stdout.write(f"groups: rank {rank} done\n")


if __name__ == "__main__":
    ranks = [Process(target=run, args=(rank, *sys.argv[1:])) for rank in range(WORLD)]
    for p in ranks:
        p.start()
    for p in ranks:
        p.join()
