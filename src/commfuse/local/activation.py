"""The gated activation between the two products of an expert."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu

from ._check import FLOATS, Rules


def npu_swiglu(input: Tensor, dim: int = -1) -> Tensor:
    """Split ``input`` into halves A and B along ``dim`` and return ``silu(A) * B``.

    Computed in float32 and rounded once to the type of ``input``. Differentiable.

    Args:
        input: 1 to 8 dimensions, float16, bfloat16 or float32; its size along ``dim`` is even.
        dim: the dimension that is halved, negative counts from the end.

    Returns:
        A tensor of ``input``'s shape with ``dim`` halved, of the same type.

    Raises:
        ArgumentError: for another type, an odd size, or a ``dim`` that ``input`` does not have.

    Example:
        >>> npu_swiglu(torch.tensor([[0.0, 1.0, 5.0, 2.0]]))
        tensor([[0.0000, 1.4621]])
    """
    rules = Rules("npu_swiglu", input=input)
    if rules.tensor(input, "input", range(1, 9), FLOATS):
        remedy = "name a dimension of input"
        has_dim = -input.dim() <= dim < input.dim()
        if rules.need(has_dim, "dim", dim, "{}..{}", remedy, -input.dim(), input.dim() - 1):
            size = input.size(dim)
            rules.need(size % 2 == 0, "input.size(dim)", size, "even", "it holds the two halves side by side")
    rules.raise_broken()
    return swiglu(input.float(), dim).to(input.dtype)


def swiglu(rows: Tensor, dim: int = -1, *, activate_left: bool = True) -> Tensor:
    """Return silu of one half times the other half, without conversions."""
    left, right = torch.chunk(rows, 2, dim)
    return silu(left) * right if activate_left else silu(right) * left
