"""Rows against a call: every broken rule as one sentence."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ..config import PORTABLE
from .model import Operator, Rule, Tensor
from .scope import Scope, TensorInfo

_UNKNOWN = (NameError, AttributeError, TypeError, ZeroDivisionError, IndexError)


@dataclass(frozen=True, slots=True)
class Violation:
    """A broken rule; ``hardware`` marks the ones that only a product's rules forbid."""

    text: str
    hardware: bool = False


def bind_dimensions(operator: Operator, scope: Scope) -> None:
    """Define the symbols that tensor dimensions name (BS, H, K ...), and remember where each came from."""
    derived = {symbol.name for symbol in operator.symbols}
    for row in operator.tensors:
        info = scope[row.name]
        shape = _alternative(row, info)
        for axis, name in enumerate(shape or ()):
            if name.isidentifier() and name not in derived and name not in scope:
                scope[name] = info.shape[axis]
                scope.origin[name] = f"{row.name}.shape[{axis}]"


def violations(operator: Operator, scope: Scope, product: str, odd: Iterable[str] = ()) -> list[Violation]:
    """Return every broken rule of ``operator`` under ``product``; ``odd`` are findings made before the scope existed."""
    found = [Violation(text) for text in odd]
    for row in operator.tensors:
        found += [Violation(text) for text in _tensor(row, scope)]
    told = {violation.text.partition(" = ")[0] for violation in found}  # a wrong dtype is said once, by the argument's own row
    for rule in operator.rules:
        if product in rule.on and not (rule.subject.endswith(".dtype") and rule.subject in told):
            text = broken(rule, scope)
            if text:
                found.append(Violation(text, hardware=PORTABLE not in rule.on))
    return list({violation.text: violation for violation in found}.values())


def broken(rule: Rule, scope: Scope) -> str:
    """Return what is wrong, or '' if ``rule`` holds, does not apply, or needs something that is itself missing."""
    try:
        if not scope.eval(rule.when) or scope.eval(rule.test) or _empty_range(rule, scope):
            return ""
        value = scope.eval(rule.subject)
    except _UNKNOWN:
        return ""  # what is missing has been reported by the row that defines it
    condition = f" when {rule.when}" if rule.when != "True" else ""
    says = f'; torch_npu: "{rule.says}"' if rule.says else ""
    must = re.sub(r"{([^}]*)}", lambda found: str(scope.eval(found[1])), rule.must)
    return f"{rule.subject} = {_show(value)}{_where(rule, scope)}: must be {must}{condition}{says}  [{rule.source}]"


def _empty_range(rule: Rule, scope: Scope) -> bool:
    """Whether no value could satisfy ``rule``, because a size that its ends depend on is itself out of range."""
    return bool(rule.low and rule.high) and bool(scope.eval(rule.low) > scope.eval(rule.high))


def _tensor(row: Tensor, scope: Scope) -> list[str]:
    info = scope[row.name]
    if info is None:
        return [] if row.optional else [f"{row.name} = None: must be a tensor {_shapes(row)}"]
    if not isinstance(info, TensorInfo) or not _applies(row, scope):
        return []
    found = []
    if info.dtype not in row.dtype:
        found.append(f"{row.name}.dtype = {info.dtype}: must be {' or '.join(row.dtype)}")
    shape = _alternative(row, info)
    if shape is None:
        found.append(f"{row.name}.shape = {tuple(info.shape)}: must be {_shapes(row)}")
        return found
    try:
        wanted = tuple(scope.eval(size) for size in shape)
    except _UNKNOWN:
        return found
    if wanted != tuple(info.shape):
        found.append(f"{row.name}.shape = {tuple(info.shape)}: must be {_tuple(shape)} = {wanted}")
    return found


def _applies(row: Tensor, scope: Scope) -> bool:
    try:
        return bool(scope.eval(row.when))
    except _UNKNOWN:
        return False


def _alternative(row: Tensor, info: Any) -> tuple[str, ...] | None:
    if not isinstance(info, TensorInfo):
        return None
    return next((shape for shape in row.shapes if len(shape) == info.ndim), None)


def _shapes(row: Tensor) -> str:
    return " or ".join(f"{_tuple(shape)}, {len(shape)}-D" for shape in row.shapes)


def _tuple(shape: tuple[str, ...]) -> str:
    return f"({', '.join(shape)}{',' if len(shape) == 1 else ''})"


def _where(rule: Rule, scope: Scope) -> str:
    origin = scope.origin.get(rule.subject) or scope.formula(rule.subject)
    return f" ({origin})" if origin else ""


def _show(value: Any) -> str:
    if isinstance(value, TensorInfo):
        return f"a tensor {tuple(value.shape)} {value.dtype}{'' if value.contiguous else ', not contiguous'}"
    return repr(value) if isinstance(value, str) else str(value)
