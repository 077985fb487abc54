"""What the local operators check their arguments with: every broken rule of a call in one message."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ..errors import ArgumentError

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
INDICES = (torch.int32, torch.int64)

_LONGEST = 32  # values of a list that a message prints

# torch_npu passes element types as numbers in graph mode; these are torch's own.
_DTYPE_OF_CODE = {
    0: torch.uint8,
    1: torch.int8,
    2: torch.int16,
    3: torch.int32,
    4: torch.int64,
    5: torch.float16,
    6: torch.float32,
    15: torch.bfloat16,
    16: torch.quint4x2,
}


class Rules:
    """Collects the broken rules of one call, so that one error names them all."""

    def __init__(self, operator: str, **inputs: object) -> None:
        self._operator = operator
        self._inputs = inputs
        self._broken: list[str] = []

    def need(self, holds: bool, subject: str, value: object, allowed: str, remedy: str, *sizes: object) -> bool:
        """Note a broken rule unless ``holds``; return ``holds``, so that dependent rules can be skipped.

        ``sizes`` fill the ``{}`` of ``allowed`` and then of ``remedy``: they become text only if the rule is
        broken, because text made of a size would pin that size in compiled code.
        """
        if not holds:
            rule = f"must be {allowed}; {remedy}".format(*sizes)
            self._broken.append(f"{subject} = {show(value)}: {rule}")
        return holds

    def tensor(self, value: object, name: str, dims: Sequence[int], dtypes: Sequence[torch.dtype]) -> TypeGuard[Tensor]:
        """Require one of ``dims`` dimensions and one of ``dtypes``; return whether the dimensions fit."""
        if not isinstance(value, Tensor):
            return self.need(False, name, value, "a tensor", "this form needs it")
        if value.dtype not in dtypes:
            remedy = f"convert it with .to({dtypes[0]})"
            self.need(False, f"{name}.dtype", value.dtype, _or([show(d) for d in dtypes]), remedy)
        holds = value.dim() in dims
        return self.need(holds, f"{name}.dim()", value.dim(), "" if holds else _or(dims), "reshape it")

    def shape(self, name: str, value: Tensor, meaning: str, *wanted: tuple[int, ...]) -> bool:
        """Require one of the shapes ``wanted``; ``meaning`` is the shape in symbols."""
        found = tuple(value.shape)
        holds = any(found == shape for shape in wanted)
        places = " or ".join("{}" for _ in wanted)
        return self.need(holds, f"{name}.shape", found, f"{meaning} = {places}", "reshape it", *wanted)

    def equal(self, subject: str, found: int, wanted: int, remedy: str) -> bool:
        """Require two sizes to be equal; ``remedy`` says where ``wanted`` comes from."""
        return self.need(found == wanted, subject, found, "{}", remedy, wanted)

    def only(self, name: str, value: object, allowed: Sequence[object], remedy: str) -> bool:
        """Require one of a few values; the others are forms that this package does not compute."""
        holds = not isinstance(value, Tensor) and value in allowed
        text = "" if holds else _or([show(a) for a in allowed])
        return self.need(holds, name, value, text, remedy)

    def counts(self, name: str, counts: list[int], num_rows: int) -> bool:
        """Require counts that are not negative and fit into ``num_rows``."""
        holds = min(counts, default=0) >= 0 and sum(counts) <= num_rows
        allowed = "counts of at least 0 with a sum of at most {} rows"
        return self.need(holds, name, counts, allowed, "give the number of rows of each group", num_rows)

    def ends(self, name: str, ends: list[int], num_rows: int) -> bool:
        """Require an inclusive prefix sum of group sizes that fits into ``num_rows``."""
        holds = all(a <= b for a, b in zip([0, *ends], [*ends, num_rows], strict=True))
        allowed = "at least 0, not decreasing, at most {} rows"
        return self.need(holds, name, ends, allowed, "give the prefix sum of the group sizes", num_rows)

    def raise_broken(self) -> None:
        """Raise what has been noted.

        Raises:
            ArgumentError: if any rule is broken; the message lists the inputs and every broken rule.
        """
        if self._broken:
            inputs = [f"    {name:<12} {show(value)}" for name, value in self._inputs.items()]
            count = "1 broken rule" if len(self._broken) == 1 else f"{len(self._broken)} broken rules"
            lines = [f"{self._operator}: {count}", *inputs, *(f"  {text}" for text in self._broken)]
            raise ArgumentError("\n".join(lines))


def readable(*tensors: Tensor | None) -> bool:
    """Return whether values may be looked at: not while compiling, and not in tensors without data."""
    if torch.compiler.is_compiling():
        return False
    return not any(isinstance(t, FakeTensor) or t.is_meta for t in tensors if t is not None)


def as_dtype(value: Any) -> Any:
    """Return the dtype that a torch_npu element type code stands for; anything else unchanged."""
    return _DTYPE_OF_CODE.get(value, value) if isinstance(value, int) else value


def show(value: object) -> str:
    """Return a short text: shape and dtype of a tensor, not its values."""
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {_name(value.dtype)}"
    if isinstance(value, torch.dtype):
        return _name(value)
    if isinstance(value, list | tuple) and any(isinstance(v, Tensor) for v in value):
        shown = ", ".join(show(v) for v in value[:4])
        return f"[{shown}{', ...' if len(value) > 4 else ''}] ({len(value)} tensors)"
    if isinstance(value, list) and len(value) > _LONGEST:
        return f"[{', '.join(map(str, value[:_LONGEST]))}, ...] ({len(value)} values)"
    return repr(value)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _or(values: Sequence[object]) -> str:
    return " or ".join(str(v) for v in values)
