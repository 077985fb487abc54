"""Matmul and a collective over the exchanges of a group: the portable way, and the pure parts that every way shares."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ..moe_distribute import values as moe_values
from ..products import product, wide_product

if TYPE_CHECKING:
    from ...call import Call
    from ...groups import Group
from ...observe.ranges import phase

Outputs = tuple[torch.Tensor | None, ...]


def all_gather_base_mm(call: Call, members: Group, waited_us: list[float]) -> Outputs:
    """Carry out npu_all_gather_base_mm: gather, then one product."""
    made = call.outputs()
    output, gather_out = made["output"], made["gather_out"]
    gathered = gather_out if call["gather_output"] else gather_out.new_empty((call["m"] * call["world_size"], call["k"]))
    mine = call["input"].contiguous()
    members.exchange([mine] * call["world_size"], list(gathered.view(call["world_size"], call["m"], call["k"])))
    scale = call["x1_scale"]
    multiply(call, gathered, None if scale is None else members.gather(scale).flatten(0, 1), output)
    return (output, gather_out)


def mm_reduce_scatter_base(call: Call, members: Group, waited_us: list[float]) -> Outputs:
    """Carry out npu_mm_reduce_scatter_base: product, exchange of row blocks, sum in rank order in float32, one rounding."""
    output = call.outputs()["output"]
    world_size, share = call["world_size"], call["m"] // call["world_size"]
    partial = scaled_product(call, call["input"], call["x1_scale"])
    blocks = members.all_to_all(partial, [share] * world_size, [share] * world_size)
    output.copy_(sum_in_order(blocks.view(world_size, share, call["n"]).unbind()))
    return (output,)


def mm_all_reduce_base(call: Call, members: Group, waited_us: list[float]) -> Outputs:
    """Carry out npu_mm_all_reduce_base: product, sum of each rank's rows at one rank, rounded, gathered."""
    output = call.outputs()["output"]
    partial = reduced_term(call)
    shares = [len(part) for part in partial.tensor_split(len(members.members))]
    mine = shares[members.index]
    blocks = members.all_to_all(partial, shares, [mine] * len(shares))
    total = sum_in_order(blocks.view(len(shares), mine, call["n"]).unbind()).to(output.dtype)
    members.exchange([total] * len(shares), list(output.view(partial.shape).split(shares)))
    return (output,)


def distribute_barrier(call: Call, members: Group, waited_us: list[float]) -> Outputs:
    """Carry out _npu_distribute_barrier: the exchange at the start of the call was the barrier."""
    return (call["x_ref"].clone(memory_format=torch.contiguous_format),)


def barrier_alive(call: Call) -> tuple[int, ...] | None:
    """Return the living ranks that elastic_info names, None for all."""
    return moe_values.alive(call)


def barrier_table(call: Call) -> list[str]:
    """Return what is wrong with elastic_info."""
    shrunk = moe_values.elastic(call)
    return [] if shrunk is None else moe_values.living_table(shrunk, call["world_size"], call["group_rank"])


def is_plain(call: Call) -> bool:
    """Whether the product of ``call`` is rounded as it is: no scale and no bias comes before the rounding."""
    return call["x2_scale"] is None and call["bias"] is None


def multiply(call: Call, gathered: torch.Tensor, row_scale: torch.Tensor | None, output: torch.Tensor) -> None:
    """Write the product of the ranks' rows with x2 into ``output``; ``row_scale``: x1_scale of all ranks, [rows, 1], or None."""
    if is_plain(call):
        product(gathered, call["x2"], output)
    else:
        output.copy_(scaled_product(call, gathered, row_scale))


@phase("sum")
def sum_in_order(terms: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the sum of ``terms``, from the first to the last, so that the bits do not depend on the number of columns."""
    total = terms[0].clone()
    for term in terms[1:]:
        total += term
    return total


def scaled_product(
    call: Call, rows: torch.Tensor, row_scale: torch.Tensor | None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Return ``rows @ x2``, scaled in the int8 form, plus bias, before rounding: float32, in ``out`` if that is given."""
    wide = wide_product(rows, call["x2"], out)
    if call["x2_scale"] is not None:
        scale = float_scale(call["x2_scale"]).view(1, -1)
        wide = torch.mul(wide, scale if row_scale is None else row_scale * scale, out=out)
    return wide if call["bias"] is None else wide.add_(call["bias"].to(wide.dtype))


def reduced_term(call: Call, out: torch.Tensor | None = None) -> torch.Tensor:
    """Return this rank's term of the all-reduce before rounding: [rows, n] float32, in ``out`` if that is given."""
    x1: torch.Tensor = call["x1"]
    wide = wide_product(x1.reshape(call["rows"], call["k"]), _weight(call), out)
    if call["bias"] is not None:
        wide.add_(call["bias"].to(wide.dtype))
    if call["dequant_scale"] is not None:
        wide = torch.mul(wide, float_scale(call["dequant_scale"]).view(1, -1), out=out)
    if call["pertoken_scale"] is not None:
        wide.mul_(call["pertoken_scale"].view(-1, 1))
    return wide if call["x3"] is None else wide.add_(call["x3"].reshape(wide.shape))


def _weight(call: Call) -> torch.Tensor:
    """x2, or what its int8 values stand for."""
    weight: torch.Tensor = call["x2"]
    if call["antiquant_scale"] is None:
        return weight
    weight = weight.float()
    if call["antiquant_offset"] is not None:
        weight = weight + _per_row(call, call["antiquant_offset"])
    return weight * _per_row(call, call["antiquant_scale"])


def _per_row(call: Call, values: torch.Tensor) -> torch.Tensor:
    """Antiquant values in a shape that broadcasts to x2."""
    size = call["antiquant_group_size"]
    if size == 0:
        return values.float().reshape(1, -1)
    return values.float().repeat_interleave(size, dim=0)[: call["k"]]


def float_scale(scale: torch.Tensor) -> torch.Tensor:
    """Return a scale as float32; an int64 one carries the bits of a float32 in its low half."""
    if scale.dtype != torch.int64:
        return scale.float()
    return (scale & 0xFFFFFFFF).to(torch.uint32).view(torch.float32)
