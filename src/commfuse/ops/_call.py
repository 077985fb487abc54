"""The one line behind every public operator."""

from __future__ import annotations

from typing import Any

import torch

from .. import engine, torch_ops
from ..operators import OPERATORS


def call(name: str, args: dict[str, Any]) -> Any:
    """Carry out operator ``name``; ``args`` holds every argument by name. One output comes alone, several as a tuple."""
    operator = OPERATORS[name]
    outputs = torch_ops.call(operator, args) if torch.compiler.is_compiling() else engine.run(operator, args)
    return outputs if len(outputs) > 1 else outputs[0]
