"""Every public function has the arguments of its operator's rows, and both have torch_npu's."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest

import commfuse
from commfuse import torch_ops
from commfuse.operators import OPERATORS
from commfuse.spec.model import Attr, Operator, Tensor

from .published_signatures import ALIASES, PUBLISHED

PUBLIC = [name for name in OPERATORS if name in commfuse.__all__]


def function(name: str) -> Callable[..., Any]:
    return getattr(commfuse, name)  # type: ignore[no-any-return]


def plain(parameters: list[inspect.Parameter]) -> str:
    """Names, order, keyword-only mark and defaults as text, without types."""
    return str(inspect.Signature([p.replace(annotation=inspect.Parameter.empty) for p in parameters]))[1:-1]


def from_rows(operator: Operator) -> str:
    first = operator.names.index(operator.first_keyword) if operator.first_keyword else len(operator.args)
    kinds = [inspect.Parameter.POSITIONAL_OR_KEYWORD] * first + [inspect.Parameter.KEYWORD_ONLY] * (len(operator.args) - first)
    return plain(
        [inspect.Parameter(row.name, kind, default=default(row)) for row, kind in zip(operator.args, kinds, strict=True)]
    )


def default(row: Tensor | Attr) -> Any:
    if isinstance(row, Tensor):
        return None if row.optional else inspect.Parameter.empty
    return inspect.Parameter.empty if row.required else row.default


def from_function(name: str) -> str:
    """The function's own signature; what takes other names of an argument (``**others``) is not an argument of its own."""
    parameters = inspect.signature(function(name)).parameters.values()
    return plain([p for p in parameters if p.kind is not inspect.Parameter.VAR_KEYWORD])


@pytest.mark.parametrize("name", PUBLIC)
def test_the_function_has_the_arguments_of_the_rows(name: str) -> None:
    assert from_rows(OPERATORS[name]) == from_function(name)


@pytest.mark.parametrize("name", OPERATORS)
def test_the_rows_have_the_published_arguments(name: str) -> None:
    assert PUBLISHED[name] == from_rows(OPERATORS[name])


@pytest.mark.parametrize(("name", "argument"), [key for key in ALIASES if key[0] in OPERATORS])
def test_other_published_names_of_an_argument_are_known(name: str, argument: str) -> None:
    row = next(row for row in OPERATORS[name].tensors if row.name == argument)
    assert set(ALIASES[name, argument]) <= set(row.aliases)


@pytest.mark.parametrize("name", PUBLIC)
def test_every_argument_is_typed_and_described(name: str) -> None:
    text = inspect.getdoc(function(name)) or ""
    described = text.partition("Args:")[2].partition("Returns:")[0]
    for parameter in inspect.signature(function(name)).parameters.values():
        assert parameter.annotation is not inspect.Parameter.empty, parameter.name
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD:
            assert re.search(rf"^    {parameter.name}: \S", described, re.MULTILINE), parameter.name


@pytest.mark.parametrize("name", PUBLIC)
def test_every_error_is_described(name: str) -> None:
    raised = (inspect.getdoc(function(name)) or "").partition("Raises:")[2]
    for error in ("ArgumentError", "MismatchError", "GroupError", "ExchangeError"):
        assert re.search(rf"^    {error}: \S", raised, re.MULTILINE), error


@pytest.mark.parametrize("name", OPERATORS)
def test_the_internal_operator_has_the_same_arguments_and_an_order(name: str) -> None:
    arguments = re.search(r"\((.*)\) ->", torch_ops.schema(OPERATORS[name]))
    assert arguments is not None
    names = [text.split()[-1] for text in arguments[1].split(", ")]
    assert names == [*OPERATORS[name].names, "order"]
