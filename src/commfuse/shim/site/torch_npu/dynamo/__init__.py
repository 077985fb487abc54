"""Where scripts look for torchair as well."""

from typing import Any

from commfuse.shim import surface


def __getattr__(name: str) -> Any:
    if name == "torchair":  # loaded when asked for: it brings torch's whole compiler
        import torchair  # type: ignore[import-not-found]

        return torchair
    raise surface.missing("torch_npu.dynamo", name)
