"""Looks up every row of the surface and prints how many there are."""

# mypy: ignore-errors

import importlib

import torch
import torch_npu
import torchair

from commfuse.shim import surface

assert torch_npu.npu is torch.npu
assert torch_npu.dynamo.torchair is torchair


def owner_of(path):
    value = importlib.import_module(path.split(".")[0])
    for part in path.split(".")[1:]:
        value = getattr(value, part)
    return value


def check(row):
    owner = owner_of(row.owner)
    if row.kind == surface.REFUSED:
        assert not hasattr(owner, row.name), row
        return
    value = getattr(owner, row.name)
    if row.kind == surface.NOTHING and row.owner == "torch.npu":
        assert value() is None, row


for row in surface.ROWS:
    check(row)
assert hasattr(torch_npu, "npu_moe_distribute_dispatch_v2")
assert not hasattr(torch_npu, "npu_no_such_operator")
assert "npu_moe_distribute_combine_v2" in dir(torch_npu)
print(len(surface.ROWS))
