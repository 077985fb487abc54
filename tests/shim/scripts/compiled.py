"""torch.compile of code that names the device, with the look-alike's backend and torch's own, and torch.export."""

# mypy: ignore-errors

import torch
import torch_npu
import torchair

torch.set_num_threads(1)


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)
        self.register_buffer("mask", torch.ones(4, device="npu"))

    def forward(self, x):
        return self.linear(x) * self.mask


def moves(x):
    return x.npu() + x.to("npu:1", torch.float64)


def makes(x):
    new = torch.zeros_like(x, device="npu") + torch.full((4,), 2.0, device="npu") + torch.tensor([1, 2, 3, 4], device="npu")
    return x + new + torch.arange(4, device=torch.device("npu:2")) + torch.zeros(4, device=x.device)


def asks(x):
    torch_npu.npu.synchronize()
    return x + torch.npu.current_device() if x.is_npu else x


config = torchair.CompilerConfig()
config.mode = "max-autotune"
config.experimental_config.frozen_parameter = True
x = torch.randn(2, 4).npu()
model = Model().npu()


def check(eager, backend, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(eager, backend=backend, dynamic=dynamic, fullgraph=True)
    for batch in (x, torch.randn(5, 4)):
        torch.testing.assert_close(compiled.forward(batch) if eager is model else compiled(batch), eager(batch))


for eager in (model, moves, makes, asks):
    for dynamic in (False, True):
        check(eager, torchair.get_npu_backend(compiler_config=config), dynamic)
check(model, torchair.get_npu_backend(), None)
check(makes, "inductor", True)
check(moves, "inductor", False)
exported = torch.export.export(model, (x,)).module()
torch.testing.assert_close(exported(x), model(x))
print("compiled: done")
