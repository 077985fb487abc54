"""Operators under ``torch_npu``: exactly commfuse's public functions of those names, found when first asked for."""

from __future__ import annotations

from typing import Any

from . import surface


def names() -> list[str]:
    """Return the operators there are: commfuse's public names that start with ``npu_`` or ``_npu_``."""
    import commfuse

    return [name for name in commfuse.__all__ if name.startswith(("npu_", "_npu_"))]


def find(name: str) -> Any:
    """Return the operator ``name``.

    Raises:
        AttributeError: there is none; the message names those that come near, or all.
    """
    there = names()
    if name not in there:
        raise surface.missing("torch_npu", name, there)
    import commfuse

    return getattr(commfuse, name)
