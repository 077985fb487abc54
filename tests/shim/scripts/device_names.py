"""Every way in which scripts name the device, each checked. It never imports torch_npu: `import torch` is enough."""

# mypy: ignore-errors

import io
import time

import pytest
import torch

npu = torch.device("npu")
x = torch.randn(3, 4)


def same(made, wanted):
    assert made.device.type == "cpu", made.device
    assert made.dtype == wanted.dtype, (made.dtype, wanted.dtype)
    assert torch.equal(made, wanted), (made, wanted)


def moving():
    for moved in (x.npu(), x.npu(3), x.npu("npu:2"), x.to("npu"), x.to(npu), x.to("npu:1"), x.to(device="npu")):
        same(moved, x)
        assert moved.data_ptr() != x.data_ptr()  # a copy, as on the device
        assert moved.is_npu
    same(x.to("npu", torch.float16), x.half())
    same(x.to(npu, non_blocking=True).cpu(), x)
    same(x.t().npu(), x.t())
    same(torch.arange(3).bool().npu(), torch.tensor([False, True, True]))
    same(x.pin_memory(), x)


def making():
    for device in ("npu", "npu:7", npu, torch.device("npu", 3)):
        same(torch.zeros(2, device=device), torch.zeros(2))
        same(torch.tensor([1, 2], device=device), torch.tensor([1, 2]))
        same(torch.arange(5, device=device), torch.arange(5))
        same(torch.full((2,), 1.5, dtype=torch.bfloat16, device=device), torch.full((2,), 1.5, dtype=torch.bfloat16))
    same(torch.tril_indices(3, 3, device="npu"), torch.tril_indices(3, 3))
    same(torch.eye(2, device="npu"), torch.eye(2))
    same(torch.zeros_like(x, device="npu"), torch.zeros(3, 4))
    same(x.new_ones(2, device="npu"), torch.ones(2))
    same(torch.as_tensor([1.0], device="npu"), torch.tensor([1.0]))
    same(torch.zeros(3, device="npu", pin_memory=True), torch.zeros(3))
    assert torch.empty(2, 3, device="npu").shape == (2, 3)
    assert torch.empty_strided((2, 3), (1, 2), device="npu").stride() == (1, 2)


def defaults():
    with npu:
        same(torch.ones(2), torch.ones(2, device="cpu"))
    torch.set_default_device("npu")
    same(torch.tensor([2]), torch.tensor([2], device="cpu"))
    assert torch.nn.Linear(2, 2).weight.device.type == "cpu"
    torch.set_default_device(None)


def modules():
    linear = torch.nn.Linear(4, 2)
    wanted = linear(x)
    assert linear.npu() is linear
    same(linear.to("npu:0")(x.npu()), wanted)
    same(torch.nn.Linear(4, 2, device="npu").to("npu", torch.float64)(x.double()).new_zeros(1), torch.zeros(1).double())


def gradients():
    weight = torch.ones(4, device="npu", requires_grad=True)
    (x.npu() @ (weight * 2).npu()).sum().backward()
    assert torch.allclose(weight.grad, 2 * x.sum(0))


def random_numbers():
    for seed in (torch.npu.manual_seed, torch.npu.manual_seed_all, torch.manual_seed):
        seed(7)
        first = torch.rand(3, device="npu")
        seed(7)
        same(torch.rand(3, device="npu"), first)
    state = torch.npu.get_rng_state()
    first = torch.randn(3, device="npu")
    torch.npu.set_rng_state(state)
    same(torch.randn(3, device="npu"), first)


def saving():
    file = io.BytesIO()
    torch.save({"x": x}, file)
    for where in ("npu", "npu:1", npu):
        file.seek(0)
        same(torch.load(file, map_location=where)["x"], x)


def devices():
    assert torch.npu.is_available()
    assert torch.npu.device_count() == 16
    torch.npu.set_device(2)
    assert torch.npu.current_device() == 2
    torch.npu.set_device("npu:5")
    with torch.npu.device(torch.device("npu:9")):
        assert torch.npu.current_device() == 9
    assert torch.npu.current_device() == 5
    assert torch.get_device_module("npu") is torch.npu
    with pytest.raises(RuntimeError, match="0 or more, got -1"):
        torch.npu.set_device(-1)
    free, total = torch.npu.mem_get_info()
    assert 0 < free <= total
    held = torch.ones(1 << 24, device="npu")
    assert held.nbytes < torch.npu.memory_allocated() < total
    assert held.nbytes < torch.npu.max_memory_allocated() < total


def streams():
    begin, end = torch.npu.Event(enable_timing=True), torch.npu.Event(enable_timing=True)
    with torch.npu.stream(torch.npu.Stream()):
        begin.record()
        time.sleep(0.02)
        end.record(torch.npu.current_stream())
    torch.npu.current_stream().wait_event(end)
    torch.npu.synchronize()
    torch.accelerator.synchronize()
    assert 15 < begin.elapsed_time(end) < 5000


def others_are_left_alone():
    assert torch.device("cpu") == torch.zeros(1).device
    assert torch.zeros(1, device="meta").device.type == "meta"
    assert not torch.zeros(1, device="meta").is_npu
    assert torch.get_default_device().type == "cpu"


for part in (moving, making, defaults, modules, gradients, random_numbers, saving, devices, streams, others_are_left_alone):
    part()
print("device names: done")
