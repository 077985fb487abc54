"""The stub says what the module has: every name, every method, every argument name in order."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import commfuse

from .core import _core

STUB = ast.parse((Path(commfuse.__file__).parent / "_core.pyi").read_text())
IMPLICIT = {"__init__", "__buffer__", "__len__"}  # special methods that the stub spells out


def arguments(function: ast.FunctionDef) -> list[str]:
    return [argument.arg for argument in function.args.args if argument.arg != "self"]


def real_arguments(function: object) -> list[list[str]]:
    """Argument names of each overload, from the signatures that nanobind writes (``\\0``, ``\\1`` stand for defaults)."""
    signatures = [re.sub(r"\\\d+", "...", signature) for signature, *_ in function.__nb_signature__]  # type: ignore[attr-defined]
    definitions = [ast.parse(f"{signature}: ...").body[0] for signature in signatures]
    return [arguments(node) for node in definitions if isinstance(node, ast.FunctionDef)]


def functions_of(body: list[ast.stmt]) -> dict[str, list[list[str]]]:
    found: dict[str, list[list[str]]] = {}
    for node in body:
        if isinstance(node, ast.FunctionDef):
            found.setdefault(node.name, []).append(arguments(node))
    return found


def names_of(body: list[ast.stmt]) -> set[str]:
    plain = {node.target.id for node in body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)}
    return plain | {node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)}


def test_names_are_the_same() -> None:
    assert {name for name in dir(_core) if not name.startswith("_")} == names_of(STUB.body)


def test_class_members_are_the_same() -> None:
    for node in STUB.body:
        if isinstance(node, ast.ClassDef) and not node.name.endswith("Error"):
            real = {name for name in vars(getattr(_core, node.name)) if not name.startswith("__")}
            assert real == names_of(node.body) - IMPLICIT, node.name


def test_argument_names_are_the_same() -> None:
    num_compared = 0
    for owner, body in [(_core, STUB.body)] + [
        (getattr(_core, n.name), n.body) for n in STUB.body if isinstance(n, ast.ClassDef)
    ]:
        for name, stub in functions_of(body).items():
            function = vars(owner).get(name)
            if hasattr(function, "__nb_signature__"):
                assert real_arguments(function) == stub, name
                num_compared += 1
    assert num_compared > 40
