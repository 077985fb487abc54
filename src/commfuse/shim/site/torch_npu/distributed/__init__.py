"""Names around hccl groups."""

from commfuse.shim.hccl import ProcessGroupHCCL as ProcessGroupHCCL
from commfuse.shim.hccl import is_hccl_available as is_hccl_available
