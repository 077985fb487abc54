"""One call of an operator: arguments bound to names and symbols, and everything that is wrong with them.

Binding never raises for a wrong argument. It lists what is wrong, so that the rank can tell its peers before all of them raise.
"""

from __future__ import annotations

import operator as builtin
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
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

_Shape = tuple[tuple[int, ...], torch.dtype]


@dataclass(frozen=True, eq=False, kw_only=True, slots=True)
class Form:
    """What a call shares with every other whose tensors have the same sizes and whose other arguments are equal: all checks but those
    of the data, and what follows from them. A repeated call finds it again and pays for nothing of it.
    """

    product: str
    scope: Scope
    plain: Mapping[str, Any]  # the arguments that are not tensors
    found: tuple[Violation, ...]
    shapes: tuple[_Shape | None, ...]  # per output; empty when broken
    blanks: tuple[
        tuple[str, tuple[int, ...], torch.Tensor], ...
    ]  # the outputs that are given: name, shape, a tensor to make it from
    agreed: Mapping[str, Any]  # what must be equal on all ranks; empty when broken
    has_partner: bool  # whether a second domain is used
    kept: dict[Any, Any]  # what the checks of the data keep for the next call; nothing that belongs to a group


@dataclass(eq=False, kw_only=True, slots=True)  # not frozen, which makes it three times faster to build; nobody changes it
class Call:
    """A bound call. ``call["x"]`` is the argument x, ``call["BS"]`` the symbol BS."""

    operator: Operator
    args: Mapping[str, Any]
    form: Form
    group: Group
    partner: Group | None  # the tensor-parallel domain, when the call uses one
    broken: tuple[str, ...]  # every broken rule, in words
    agreed: Mapping[str, Any]  # as in the form, and which ranks are alive where the data say so; empty when broken

    def __getitem__(self, name: str) -> Any:
        return self.args[name] if name in self.args else self.form.scope[name]

    @property
    def product(self) -> str:
        """The name of the product whose rules apply."""
        return self.form.product

    @property
    def scope(self) -> Scope:
        """The names that expressions see."""
        return self.form.scope

    @property
    def shapes(self) -> tuple[_Shape | None, ...]:
        """Shape and dtype of each output, None for one that is not given; empty when broken."""
        return self.form.shapes

    def outputs(self) -> dict[str, torch.Tensor]:
        """Allocate the outputs that the call gives, by name; ``COMMFUSE_POISON=1`` fills them, so that a reader of a tail is caught."""
        made = {name: blank.new_empty(*shape) for name, shape, blank in self.form.blanks}
        if config.get("poison"):
            for tensor in made.values():
                tensor.fill_(float("nan") if tensor.is_floating_point() else 0x7F)
        return made


def bind(operator: Operator, args: Mapping[str, Any], group: Group, partner_of: Callable[[Any], Group]) -> Call:
    """Bind ``args`` (every argument by name) to a `Call` in ``group``; ``partner_of`` finds the second domain if one is used."""
    product = config.get("product")
    form, plain = _form(operator, args, group, product.name)
    call = Call(
        operator=operator,
        args=plain,
        form=form,
        group=group,
        partner=None,
        broken=_report(operator, form.found, product) if form.found else (),
        agreed=form.agreed,
    )
    if form.has_partner:
        call = _with_partner(call, partner_of)
    if call.broken:
        return call
    found = operator.values(call)
    if found:
        return replace(call, broken=tuple(found), agreed={})
    alive = operator.alive(call)
    return call if alive is None else replace(call, agreed={**form.agreed, "ranks alive": alive})


def _with_partner(call: Call, partner_of: Callable[[Any], Group]) -> Call:
    """Find the second domain, for a refused call too as far as it can be: its other rank waits to hear of the refusal."""
    name = call.operator.partner_group
    try:
        partner = partner_of(call.args[name])
    except KeyError:
        return call  # the argument that names it has the wrong kind, which has been reported
    except GroupError as error:
        return call if call.broken else replace(call, broken=(f"{name}: {error}",))
    return call if partner is call.group else replace(call, partner=partner)


# --- forms -------------------------------------------------------------------------------------------------------------------

_forms: dict[tuple[Any, ...], Form] = {}
_KEEP = 4096


def _form(operator: Operator, args: Mapping[str, Any], group: Group, product: str) -> tuple[Form, Mapping[str, Any]]:
    """Return the form of a call and its arguments as plain values."""
    try:
        around = _texts() if product != config.PORTABLE else ()
        key = _reader(operator)(args), group.size, group.rank, product, around
        known = _forms.get(key)
    except TypeError:  # an argument of a wrong kind, or one that cannot be compared
        return _check(operator, args, group, product)
    if known is not None:
        return known, {**args, **known.plain}
    form, plain = _check(operator, args, group, product)
    if all(row.name in form.plain and _stays(row, args[row.name]) for row in operator.attrs):
        if len(_forms) >= _KEEP:
            _forms.clear()
        _forms[key] = form
    return form, plain


def _stays(row: Attr, value: Any) -> bool:
    """Whether what a key holds of ``value`` cannot change."""
    return row.schema in _BY_VALUE or isinstance(value, (int, float, str, torch.dtype, np.generic, type(None)))


def _reader(operator: Operator) -> Callable[[Mapping[str, Any]], tuple[Any, ...]]:
    """Return a function that gives all that a form depends on; it raises TypeError for arguments of a wrong kind."""
    known = _readers.get(operator.name)
    if known is not None:
        return known
    tensors = _values_of(row.name for row in operator.tensors)
    named = [(row.name, _PLAIN[row.schema]) for row in operator.attrs if row.schema in _BY_VALUE]
    others = _values_of(row.name for row in operator.attrs if row.schema not in _BY_VALUE)

    def read(args: Mapping[str, Any]) -> tuple[Any, ...]:
        values = others(args)
        sizes = [None if tensor is None else _sizes(tensor) for tensor in tensors(args)]
        return operator.name, *map(type, values), *values, *[plain(args[name]) for name, plain in named], *sizes

    return _readers.setdefault(operator.name, read)


_readers: dict[str, Callable[[Mapping[str, Any]], tuple[Any, ...]]] = {}
_BY_VALUE = ("group", "int[]")  # a group must not be kept alive by a key, and a list can change


def _values_of(names: Iterable[str]) -> Callable[[Mapping[str, Any]], tuple[Any, ...]]:
    wanted = tuple(names)
    many: Callable[[Mapping[str, Any]], tuple[Any, ...]] = (
        builtin.itemgetter(*wanted) if len(wanted) > 1 else lambda args: tuple(args[name] for name in wanted)
    )
    return many


def _sizes(value: Any) -> tuple[Any, ...]:
    if isinstance(value, torch.Tensor) and value.is_cpu and value.layout is _STRIDED:
        return value.shape, value.dtype, value.is_contiguous()
    raise TypeError


_STRIDED = torch.strided


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
        elif isinstance(value, torch.Tensor) and value.is_cpu and value.layout is torch.strided:
            plain[row.name], kinds[row.name] = value, TensorInfo.of(value)
        else:
            kinds[row.name] = ()  # neither absent nor a tensor that can be used: rows that need it do not apply
            odd.append(f"{row.name} = {_not_usable(value, ' or None' * row.optional)}")
    return plain, kinds, odd


def _not_usable(value: Any, or_none: str) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor on {value.device} of layout {value.layout}: must be a dense tensor on the CPU{or_none}"
    return f"{_short(value)}: must be a tensor{or_none}, got {type(value).__name__}"


def _check(operator: Operator, args: Mapping[str, Any], group: Group, product: str) -> tuple[Form, Mapping[str, Any]]:
    """Make the form of a call; return it and the arguments as plain values, without those of a wrong kind."""
    plain, kinds, odd = _normalise(operator, args)
    around, unreadable = _environment(product)
    where = {"group_size": group.size, "group_rank": group.rank, "product": product}
    scope = Scope({**kinds, **where, **around}, operator.symbols)
    bind_dimensions(operator, scope)
    found = tuple(violations(operator, scope, product, odd + unreadable))
    is_broken = any(not violation.hardware for violation in found)
    shapes = () if is_broken else tuple(_shapes(operator, scope))
    agreed = () if is_broken else ("product", *operator.agree)
    form = Form(
        product=product,
        scope=scope,
        plain={row.name: plain[row.name] for row in operator.attrs if row.name in plain},
        found=found,
        shapes=shapes,
        blanks=tuple(
            (row.name, shape[0], torch.empty(0, dtype=shape[1]))  # new_empty takes half the time of torch.empty
            for row, shape in zip(operator.outputs, shapes, strict=False)
            if shape is not None
        ),
        agreed={expression: scope.eval(expression) for expression in agreed},
        has_partner=_has_partner(operator, scope),
        kept={},
    )
    return form, plain


def _has_partner(operator: Operator, scope: Scope) -> bool:
    try:
        return bool(operator.partner_group and scope.eval(operator.partner_when))
    except NameError:
        return False  # what decides it has the wrong kind, which has been reported


def _environment(product: str) -> tuple[dict[str, int], list[str]]:
    """What a product's rules read from the environment, with that product's defaults, and what of it is not a number."""
    read: dict[str, int] = {}
    odd: list[str] = []
    for name, text in zip(_READ, _texts(), strict=True) if product != config.PORTABLE else ():
        try:
            read[name] = int(text)
        except ValueError:
            odd.append(f"{name} = {text!r} (environment variable): must be an integer")
    return read, odd


def _texts() -> tuple[str, ...]:
    return tuple(os.environ.get(name, default) for name, default in _READ.items())


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
