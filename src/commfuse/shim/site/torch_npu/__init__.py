"""commfuse's look-alike of torch_npu; importable only under ``commfuse run``."""

from __future__ import annotations

import sys
from typing import Any


def _autoload() -> None:
    """What ``import torch`` calls; importing this module has done everything already."""


from commfuse import shim  # noqa: E402  - importing torch calls _autoload, which must exist by then

shim.install()

from commfuse.shim import npu, operators  # noqa: E402

from . import _C, contrib, distributed, dynamo  # noqa: E402, F401
from ._formats import get_npu_format, npu_format_cast, npu_format_cast_  # noqa: E402, F401

__version__ = shim.version()
sys.modules["torch_npu.npu"] = npu


def __getattr__(name: str) -> Any:
    operator = operators.find(name)
    globals()[name] = operator
    return operator


def __dir__() -> list[str]:
    return sorted({*globals(), *operators.names()})
