"""Nothing is offered here; the reasons are in the rows of the surface."""

from typing import Any

from commfuse.shim import surface


def __getattr__(name: str) -> Any:
    raise surface.missing("torch_npu.contrib", name)
