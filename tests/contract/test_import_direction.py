"""Imports run one way: every module imports only from rooms to the left of its own in `ORDER`, or from its own."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import commfuse

PACKAGE = Path(commfuse.__file__).parent

# A room is a module, or a package with all that is in it; the longest match counts. `spec.docs` is a command.
ORDER = (
    "_core",
    "errors",
    "config",
    "observe.ranges",
    "spec",
    "products",
    "compare",
    "notes",
    "works",
    "peers",
    "exchanges",
    "groups",
    "causes",
    "call",
    "observe",
    "agreement",
    "operators",
    "backends",
    "repeats",
    "engine",
    "torch_ops",
    "ops",
    "local",
    "survival",
    "windows",
    "",  # commfuse itself: the public names
    "ranks",
    "moe",
    "planning",
    "checking",
    "integrations",
    "shim",
    "cli",
    "pytest_plugin",
    "__main__",
    "spec.docs",
)

MODULES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))
REFERENCES = [path for path in MODULES if path.parts[0] == "operators" and path.name.startswith("reference")]


def module_name(path: Path) -> str:
    """'spec.model' for spec/model.py, 'spec' for spec/__init__.py, '' for the package itself."""
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {module_name(path) for path in MODULES} | {"_core"}


def room(module: str) -> str:
    """The room of a module; LookupError if nobody has given it a place."""
    fitting = [name for name in ORDER if module == name or (name and module.startswith(name + "."))]
    if not fitting:
        raise LookupError(f"commfuse.{module} has no place in ORDER: give it one")
    return max(fitting, key=len)


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of everything that a module imports, wherever in the file; `from a import b` gives a.b if that is a module."""
    package = ["commfuse", *path.parts[:-1]]
    for node in ast.walk(ast.parse((PACKAGE / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) + 1 - node.level] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield node.lineno, inner if inner.removeprefix("commfuse.") in NAMES else base


def own(name: str) -> str | None:
    """The module within commfuse, '' for commfuse itself, None for anything else."""
    return name.removeprefix("commfuse").lstrip(".") if name == "commfuse" or name.startswith("commfuse.") else None


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_a_module_imports_only_from_the_left(path: Path) -> None:
    here = ORDER.index(room(module_name(path)))
    wrong = []
    for line, name in imported(path):
        module = own(name)
        if module is not None and ORDER.index(room(module)) > here:
            wrong.append(f"{path}:{line} imports commfuse.{module}")
    assert wrong == []


@pytest.mark.parametrize("path", REFERENCES, ids=str)
def test_a_golden_shares_nothing_with_what_it_judges(path: Path) -> None:
    """torch, the standard library, and the golden's own files beside it."""
    beside = "commfuse." + ".".join(path.parts[:-1])
    foreign = [
        f"{path}:{line} imports {name}"
        for line, name in imported(path)
        if name.partition(".")[0] not in {"torch", *sys.stdlib_module_names} and not name.startswith(f"{beside}.reference")
    ]
    assert foreign == []


def test_there_are_goldens() -> None:
    assert len(REFERENCES) >= 3


def test_every_room_is_needed() -> None:
    """A name in ORDER is a module, or one that is planned and has its place already."""
    planned = {"moe", "planning", "checking", "integrations", "pytest_plugin", "__main__"}
    assert [name for name in ORDER if name not in NAMES and name not in planned] == []
