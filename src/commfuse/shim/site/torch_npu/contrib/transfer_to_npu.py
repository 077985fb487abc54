"""Refused at import."""

from commfuse.shim import surface

# An ImportError, since `from torch_npu.contrib import transfer_to_npu` drops the text of an AttributeError.
raise ImportError(str(surface.missing("torch_npu.contrib", "transfer_to_npu")))
