"""Arguments that callers may name in several ways, because the published pages name them differently."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from ..errors import ArgumentError
from ..operators import OPERATORS

P = ParamSpec("P")
R = TypeVar("R")


def first_by_any_name(function: Callable[P, R]) -> Callable[P, R]:
    """Let ``function``'s first argument be given positionally or under any name that the operator's rows list for it.

    Two of them at once raise an ArgumentError that names both.
    """
    name = function.__name__
    first = OPERATORS[name].tensors[0]

    @wraps(function)
    def renamed(*args: Any, **more: Any) -> Any:
        given = [alias for alias in (first.name, *first.aliases) if alias in more]
        if len(given) + bool(args) > 1:
            ways = [*(["the first positional argument"] if args else []), *(f"{alias}=" for alias in given)]
            raise ArgumentError(f"{name}: {' and '.join(ways)} mean the same argument: give one of them")
        if given:
            more[first.name] = more.pop(given[0])
        return function(*args, **more)

    return renamed
