"""One call of an operator: arguments bound to names and symbols, and everything that is wrong with them.

Binding never raises for a wrong argument. It lists what is wrong, so that the rank can tell its peers before all of them raise.
"""

from __future__ import annotations

import operator as builtin
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from . import config
from .errors import CommfuseWarning, GroupError
from .groups import Group
from .spec.check import Violation, bind_dimensions, violations
from .spec.model import Attr, Operator
from .spec.scope import Scope, TensorInfo


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """A bound call. ``call["x"]`` is the argument x, ``call["BS"]`` the symbol BS."""

    operator: Operator
    args: Mapping[str, Any]
    scope: Scope
    group: Group
    partner: Group | None  # the tensor-parallel domain, when the call uses one
    product: str
    broken: tuple[str, ...]  # every broken rule, in words
    shapes: tuple[tuple[tuple[int, ...], torch.dtype] | None, ...]  # per output; empty when broken
    agreed: Mapping[str, Any]  # what must be equal on all ranks; empty when broken

    def __getitem__(self, name: str) -> Any:
        return self.args[name] if name in self.args else self.scope[name]

    def outputs(self) -> dict[str, torch.Tensor]:
        """Allocate the outputs that the call gives, by name; ``COMMFUSE_POISON=1`` fills them, so that a reader of a tail is caught."""
        device = next((value.device for value in self.args.values() if isinstance(value, torch.Tensor)), None)
        made = {
            row.name: torch.empty(shape[0], dtype=shape[1], device=device)
            for row, shape in zip(self.operator.outputs, self.shapes, strict=True)
            if shape is not None
        }
        if config.get("poison"):
            for tensor in made.values():
                tensor.fill_(float("nan") if tensor.is_floating_point() else 0x7F)
        return made


@dataclass(frozen=True, slots=True)
class _Checked:
    """What depends on the arguments' kinds and sizes only, and is therefore kept for the next call like it."""

    scope: Scope
    found: tuple[Violation, ...]
    shapes: tuple[tuple[tuple[int, ...], torch.dtype] | None, ...]
    agreed: Mapping[str, Any]


_checked: dict[tuple[Any, ...], _Checked] = {}
_KEEP = 4096


def bind(operator: Operator, args: Mapping[str, Any], group: Group, partner_of: Callable[[Any], Group]) -> Call:
    """Bind ``args`` (every argument by name) to a `Call` in ``group``; ``partner_of`` finds the second domain if one is used."""
    product = config.get("product")
    plain, kinds, odd = _normalise(operator, args)
    around, unreadable = _environment(product.name)
    odd += unreadable
    key = (operator.name, product.name, group.size, group.rank, tuple(kinds.items()), tuple(odd), tuple(around.items()))
    known = _checked.get(key)
    if known is None:
        if len(_checked) >= _KEEP:
            _checked.clear()
        known = _checked[key] = _check(operator, kinds, group, product.name, around, odd)
    broken = _report(operator, known.found, product)
    call = Call(
        operator=operator,
        args=plain,
        scope=known.scope,
        group=group,
        partner=None,
        product=product.name,
        broken=broken,
        shapes=known.shapes,
        agreed=known.agreed,
    )
    call = _with_partner(call, partner_of)
    if call.broken:
        return call
    found = operator.values(call)
    return replace(call, broken=tuple(found), agreed={} if found else _with_alive(call))


def _with_partner(call: Call, partner_of: Callable[[Any], Group]) -> Call:
    """Find the second domain, for a refused call too as far as it can be: its other rank waits to hear of the refusal."""
    name = call.operator.partner_group
    try:
        if not (name and call.scope.eval(call.operator.partner_when)):
            return call
        partner = partner_of(call.args[name])
    except (NameError, KeyError):
        return call  # the argument that names it has the wrong kind, which has been reported
    except GroupError as error:
        return call if call.broken else replace(call, broken=(f"{name}: {error}",))
    return call if partner is call.group else replace(call, partner=partner)


def fake_outputs(operator: Operator, args: Mapping[str, Any]) -> list[tuple[tuple[Any, ...], torch.dtype] | None]:
    """Shapes and dtypes of the outputs for arguments whose sizes may be symbolic; no rule is checked."""
    _, kinds, _ = _normalise(operator, args)
    scope = Scope({**kinds, "product": config.get("product").name}, operator.symbols)
    bind_dimensions(operator, scope)
    return _shapes(operator, scope)


def _normalise(operator: Operator, args: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """Return plain Python values, what rows see of them (TensorInfo for tensors), and what has the wrong kind."""
    plain: dict[str, Any] = {}
    kinds: dict[str, Any] = {}
    odd: list[str] = []
    for row in operator.args:
        value = args[row.name]
        if isinstance(row, Attr):
            try:
                plain[row.name] = kinds[row.name] = _PLAIN[row.schema](value)
            except (TypeError, ValueError):
                odd.append(f"{row.name} = {_short(value)}: must be {_KIND[row.schema]}, got {type(value).__name__}")
        elif value is None:
            plain[row.name] = kinds[row.name] = None
        elif isinstance(value, torch.Tensor) and value.layout is torch.strided and value.device.type == "cpu":
            plain[row.name], kinds[row.name] = value, TensorInfo.of(value)
        else:
            kinds[row.name] = ()  # neither absent nor a tensor that can be used: rows that need it do not apply
            odd.append(f"{row.name} = {_not_usable(value, ' or None' * row.optional)}")
    return plain, kinds, odd


def _not_usable(value: Any, or_none: str) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor on {value.device} of layout {value.layout}: must be a dense tensor on the CPU{or_none}"
    return f"{_short(value)}: must be a tensor{or_none}, got {type(value).__name__}"


def _check(
    operator: Operator, kinds: Mapping[str, Any], group: Group, product: str, around: Mapping[str, int], odd: list[str]
) -> _Checked:
    where = {"group_size": group.size, "group_rank": group.rank, "product": product}
    scope = Scope({**kinds, **where, **around}, operator.symbols)
    bind_dimensions(operator, scope)
    found = tuple(violations(operator, scope, product, odd))
    if any(not violation.hardware for violation in found):
        return _Checked(scope, found, (), {})
    agreed = {expression: scope.eval(expression) for expression in ("product", *operator.agree)}
    return _Checked(scope, found, tuple(_shapes(operator, scope)), agreed)


def _environment(product: str) -> tuple[dict[str, int], list[str]]:
    """What a product's rules read from the environment, with that product's defaults, and what of it is not a number."""
    read: dict[str, int] = {}
    odd: list[str] = []
    for name, default in _READ.items() if product != config.PORTABLE else ():
        text = os.environ.get(name, default)
        try:
            read[name] = int(text)
        except ValueError:
            odd.append(f"{name} = {text!r} (environment variable): must be an integer")
    return read, odd


_READ = {"HCCL_BUFFSIZE": "200", "HCCL_INTRA_PCIE_ENABLE": "0", "HCCL_INTRA_ROCE_ENABLE": "0"}


def _shapes(operator: Operator, scope: Scope) -> list[tuple[tuple[Any, ...], torch.dtype] | None]:
    return [
        (scope.sizes(row.shape), getattr(torch, scope.eval(row.dtype))) if scope.eval(row.given) else None
        for row in operator.outputs
    ]


def _report(operator: Operator, found: tuple[Violation, ...], product: config.Product) -> tuple[str, ...]:
    if product.warn:
        for violation in found:
            if violation.hardware:
                text = f"{operator.name}: {product.name} would refuse this call: {violation.text}"
                warnings.warn(text, CommfuseWarning, stacklevel=6)  # the line that calls the operator
        found = tuple(violation for violation in found if not violation.hardware)
    return tuple(violation.text for violation in found)


def _with_alive(call: Call) -> Mapping[str, Any]:
    alive = call.operator.alive(call)
    return call.agreed if alive is None else {**call.agreed, "ranks alive": alive}


def _group_name(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, torch.distributed.ProcessGroup):
        return str(value.group_name)
    raise TypeError


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _optional(plain: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: None if value is None else plain(value)


def _flag(value: Any) -> bool:
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if builtin.index(value) in (0, 1):
        return bool(value)
    raise ValueError


def _real(value: Any) -> float:
    if isinstance(value, (str, bytes)):
        raise TypeError
    return float(value)


def _int(value: Any) -> Any:
    return value if isinstance(value, (int, torch.SymInt)) else builtin.index(value)


def _ints(value: Any) -> tuple[Any, ...]:
    if isinstance(value, (str, bytes)):
        raise TypeError
    if isinstance(value, torch.Tensor):
        value = value.tolist()
    return tuple(_int(item) for item in value)


def _dtype(value: Any) -> Any:
    return value if isinstance(value, torch.dtype) else _int(value)


_PLAIN: dict[str, Callable[[Any], Any]] = {
    "int": _int,
    "int?": _optional(_dtype),
    "bool": _flag,
    "float": _real,
    "str": _text,
    "str?": _optional(_text),
    "group": _group_name,
    "int[]": _ints,
    "ScalarType?": _optional(_dtype),
}
_KIND = {
    "int": "an int",
    "int?": "None, an int or a torch.dtype",
    "bool": "a bool",
    "float": "a number",
    "str": "a str",
    "str?": "a str or None",
    "group": "the name of a group or a ProcessGroup",
    "int[]": "a sequence of ints",
    "ScalarType?": "None or a torch.dtype",
}


def _short(value: Any) -> str:
    text = " ".join(repr(value).split())  # arrays print on several lines
    return text if len(text) <= 60 else text[:57] + "..."
