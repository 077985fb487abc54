"""Which operators a script names."""

from __future__ import annotations

import re
from pathlib import Path

import commfuse

_OPERATOR = re.compile(r"\btorch_npu\.(_?npu_\w+)\s*\(")


def named_operators(script: Path) -> set[str]:
    """Return the operators that ``script`` calls as ``torch_npu.<operator>(...)``."""
    return set(_OPERATOR.findall(script.read_text()))


def missing_operators(script: Path) -> list[str]:
    """Return those of them that commfuse does not have."""
    return sorted(name for name in named_operators(script) if name not in commfuse.__all__)
