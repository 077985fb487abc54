"""What the ``torchair`` package offers under the look-alike: a torch.compile backend and its configuration object.

Importing this loads torch's compiler (a second), as the real torchair does: scripts import torchair before they fork their
ranks, and one load before is much shorter than one in each of sixteen ranks after.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._dynamo import lookup_backend

_aot_eager = lookup_backend("aot_eager")


class CompilerConfig:
    """Takes any attribute at any depth, as ``config.debug.graph_dump.type = "txt"``; nothing reads them."""

    def __getattr__(self, name: str) -> CompilerConfig:
        if name.startswith("__"):  # not a setting: Python looks for these when copying and pickling
            raise AttributeError(name)
        part = CompilerConfig()
        setattr(self, name, part)
        return part


def get_npu_backend(*, compiler_config: CompilerConfig | None = None, **options: Any) -> Callable[..., Any]:
    """Return a backend for ``torch.compile``: traces like the real one, then runs the traced operators eagerly.

    No C++ compiler is needed. ``compiler_config`` and ``options`` are accepted and not used.
    """
    return _backend


def _backend(graph: torch.fx.GraphModule, example_inputs: list[torch.Tensor], **options: Any) -> Callable[..., Any]:
    compiled: Callable[..., Any] = _aot_eager(graph, example_inputs)
    return compiled
