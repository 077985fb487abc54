"""The place at which scripts find the options of hccl groups."""

from commfuse.shim.hccl import ProcessGroupHCCL as ProcessGroupHCCL
