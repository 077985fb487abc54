"""torch.library: for every operator its internal operator ``commfuse::<name>``, made from the rows in one loop.

Compiled code calls these; eager code does not pay for them. Each has a last argument ``Tensor(a!) order``, one small tensor per
process: because every operator claims to write it, a compiler neither drops nor reorders nor merges calls, which would leave
ranks waiting for each other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import engine
from .call import fake_outputs
from .operators import OPERATORS
from .spec.model import Attr, Operator
from .spec.model import Tensor as TensorRow

NAMESPACE = "commfuse"
ORDER = torch.zeros(1, dtype=torch.int32)

_library = torch.library.Library(NAMESPACE, "DEF")


def schema(operator: Operator) -> str:
    """Return the schema of the internal operator, in torch's language."""
    parts = [_argument(operator, i) for i in range(len(operator.args))]
    results = ", ".join("Tensor" for _ in operator.outputs)
    return f"{operator.name}({', '.join(parts)}, Tensor(order!) order) -> ({results})"


def _argument(operator: Operator, index: int) -> str:
    row = operator.args[index]
    if isinstance(row, TensorRow):
        alias = f"({chr(ord('b') + index % 20)}{index}!)" if row.written else ""
        return f"Tensor{alias}{'?' * row.optional} {row.name}"
    return f"{_TYPES.get(row.schema, row.schema)} {row.name}"


_TYPES = {"group": "str", "int[]": "SymInt[]"}  # counts differ from call to call and must not compile anew


def _implementation(operator: Operator) -> Callable[..., Any]:
    names = operator.names

    def run(*values: Any) -> Any:
        outputs = engine.run(operator, dict(zip(names, values[:-1], strict=True)))
        made = tuple(torch.empty(0) if tensor is None else tensor for tensor in outputs)
        return made if len(made) > 1 else made[0]

    return run


def _fake(operator: Operator) -> Callable[..., Any]:
    names = operator.names

    def run(*values: Any) -> Any:
        args = dict(zip(names, values[:-1], strict=True))
        device = next(value.device for value in values if isinstance(value, torch.Tensor))
        made = tuple(
            torch.empty(0, device=device) if shape is None else torch.empty(shape[0], dtype=shape[1], device=device)
            for shape in fake_outputs(operator, args)
        )
        return made if len(made) > 1 else made[0]

    return run


def call(operator: Operator, args: dict[str, Any]) -> tuple[Any, ...]:
    """Call the internal operator, as compiled code does; outputs that are not given are None again."""
    plain = {row.name: _plain(row, args[row.name]) for row in operator.args}
    outputs = getattr(torch.ops.commfuse, operator.name)(*plain.values(), ORDER)
    outputs = outputs if len(operator.outputs) > 1 else (outputs,)
    given = _given[operator.name](**plain)
    return tuple(tensor if there else None for tensor, there in zip(outputs, given, strict=True))


def _which_are_given(operator: Operator) -> Callable[..., tuple[Any, ...]]:
    """Return a function of all arguments by name that tells which outputs are given; unlike `fake_outputs`, a compiler can trace it."""
    conditions = "".join(f"{row.given}, " for row in operator.outputs)
    found: Callable[..., tuple[Any, ...]] = eval(f"lambda {', '.join(operator.names)}: ({conditions})")
    return found


def _plain(row: TensorRow | Attr, value: Any) -> Any:
    if isinstance(row, Attr) and row.schema == "group" and not isinstance(value, str):
        return value.group_name
    return value


def _register(operator: Operator) -> None:
    _library.define(schema(operator))
    _library.impl(operator.name, _implementation(operator), "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{operator.name}", _fake(operator), lib=_library)


_given = {operator.name: _which_are_given(operator) for operator in OPERATORS.values()}
for _operator in OPERATORS.values():
    _register(_operator)
