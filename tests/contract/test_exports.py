"""What ``import commfuse`` offers: the sorted list, all of it there, and nothing besides."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

import commfuse
from commfuse import local
from commfuse.operators import OPERATORS

ROOT = Path(__file__).parents[2]


def test_the_list_is_sorted_and_without_repetition() -> None:
    assert commfuse.__all__ == sorted(set(commfuse.__all__))


def test_everything_listed_is_there() -> None:
    missing = [name for name in commfuse.__all__ if not hasattr(commfuse, name)]
    assert missing == []


def test_nothing_else_is_public() -> None:
    """Besides the list only the package's own modules are visible."""
    others = {name: value for name, value in vars(commfuse).items() if not name.startswith("_") and name not in commfuse.__all__}
    leaked = [
        name
        for name, value in others.items()
        if not (isinstance(value, ModuleType) and value.__name__ == f"commfuse.{name}" and _is_ours(value))
    ]
    assert leaked == []


def test_every_operator_is_public() -> None:
    assert [name for name in OPERATORS if name not in commfuse.__all__] == []


def test_every_public_operator_has_rows_or_is_local() -> None:
    operators = [name for name in commfuse.__all__ if name.startswith(("npu_", "_npu_"))]
    assert [name for name in operators if name not in OPERATORS and name not in local.__all__] == []


def test_the_package_is_marked_as_typed() -> None:
    assert (Path(commfuse.__file__).parent / "py.typed").is_file()


def test_the_version_is_the_same_everywhere() -> None:
    stated = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert stated is not None
    assert commfuse.__version__ == stated[1]
    assert f"## [{stated[1]}]" in (ROOT / "CHANGELOG.md").read_text()


def _is_ours(module: ModuleType) -> bool:
    return Path(module.__file__ or "").is_relative_to(Path(commfuse.__file__).parent)
