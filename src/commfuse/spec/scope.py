"""Names to values: the namespace in which the expressions of the rows are evaluated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from types import CodeType
from typing import Any

import torch

from .model import Symbol


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What an expression may ask of a tensor argument: sizes (ints or SymInts), dimensions, dtype name."""

    shape: tuple[Any, ...]
    dtype: str
    contiguous: bool = True

    def __str__(self) -> str:
        return f"a tensor {self.shape} {self.dtype}{'' if self.contiguous else ', not contiguous'}"

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    @classmethod
    def of(cls, tensor: torch.Tensor) -> TensorInfo:
        """Describe ``tensor``; the layout of a fake one is not asked for, since that would guard on its sizes."""
        layout = True if torch.compiler.is_compiling() else tensor.is_contiguous()
        return cls(tuple(tensor.shape), dtype_name(tensor.dtype), layout)


@cache
def dtype_name(dtype: torch.dtype) -> str:
    """'bfloat16' for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def ceil_div(a: Any, b: Any) -> Any:
    """Return a / b rounded up, for non-negative a."""
    return (a + b - 1) // b


def align(multiple: int, value: Any) -> Any:
    """``value`` rounded up to a multiple of ``multiple``."""
    return ceil_div(value, multiple) * multiple


def _largest(*values: Any) -> Any:
    out = values[0]
    for value in values[1:]:
        out = torch.sym_max(out, value)
    return out


def _smallest(*values: Any) -> Any:
    out = values[0]
    for value in values[1:]:
        out = torch.sym_min(out, value)
    return out


def peer_bytes(counts: tuple[int, ...], world_size: int, experts: int, width: int) -> list[int]:
    """Bytes of 2-byte rows of ``width`` to (or from) each peer; ``counts`` is [peer * experts + expert]."""
    return [sum(counts[p * experts : (p + 1) * experts]) * width * 2 for p in range(world_size)]


FUNCTIONS: dict[str, Any] = {
    "__builtins__": {},
    "max": _largest,
    "min": _smallest,
    "sum": sum,
    "len": len,
    "all": all,
    "ceil_div": ceil_div,
    "align": align,
    "peer_bytes": peer_bytes,
    "min_of": min,
    "max_of": max,
    "dtype_name": dtype_name,
}


class Scope(dict[str, Any]):
    """Argument values plus symbols, the latter computed when first asked for."""

    def __init__(self, values: Mapping[str, Any], symbols: tuple[Symbol, ...]) -> None:
        super().__init__(values)
        self.origin: dict[str, str] = {}  # symbol -> the dimension that defined it
        self._formulas = {symbol.name: symbol.formula for symbol in symbols}

    def __missing__(self, name: str) -> Any:
        if name not in self._formulas:
            raise KeyError(name)  # eval then looks among FUNCTIONS, and says NameError
        self[name] = value = self.eval(self._formulas[name])
        return value

    def formula(self, name: str) -> str:
        """The formula of a derived symbol, '' for anything else."""
        return self._formulas.get(name, "")

    def eval(self, expression: str) -> Any:
        """Evaluate ``expression``; NameError, AttributeError, TypeError or ZeroDivisionError if an input is missing or broken."""
        return eval(_compiled(expression), FUNCTIONS, self)

    def sizes(self, shape: tuple[str, ...]) -> tuple[Any, ...]:
        """Evaluate a shape; an element ``"*expression"`` stands for all sizes that the expression gives."""
        out: list[Any] = []
        for size in shape:
            out.extend(self.eval(size[1:]) if size.startswith("*") else (self.eval(size),))
        return tuple(out)


@cache
def _compiled(expression: str) -> CodeType:
    return compile(expression, f"<{expression}>", "eval")
