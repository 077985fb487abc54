"""The fused communication-and-compute operators of torch_npu, on any machine that runs PyTorch.

``import commfuse as torch_npu`` is a faithful stand-in for the names below.
"""

from . import config
from .errors import (
    ArgumentError,
    BackendError,
    CommfuseError,
    CommfuseWarning,
    ExchangeError,
    GroupError,
    MismatchError,
)
from .ops import (
    _npu_distribute_barrier,
    npu_all_gather_base_mm,
    npu_alltoallv_gmm,
    npu_gmm_alltoallv,
    npu_mm_all_reduce_base,
    npu_mm_reduce_scatter_base,
    npu_moe_distribute_combine,
    npu_moe_distribute_combine_add_rms_norm,
    npu_moe_distribute_combine_setup,
    npu_moe_distribute_combine_teardown,
    npu_moe_distribute_combine_v2,
    npu_moe_distribute_dispatch,
    npu_moe_distribute_dispatch_setup,
    npu_moe_distribute_dispatch_teardown,
    npu_moe_distribute_dispatch_v2,
)
from .products import product

__version__ = "0.1.0"

__all__ = [
    "ArgumentError",
    "BackendError",
    "CommfuseError",
    "CommfuseWarning",
    "ExchangeError",
    "GroupError",
    "MismatchError",
    "__version__",
    "_npu_distribute_barrier",
    "config",
    "npu_all_gather_base_mm",
    "npu_alltoallv_gmm",
    "npu_gmm_alltoallv",
    "npu_mm_all_reduce_base",
    "npu_mm_reduce_scatter_base",
    "npu_moe_distribute_combine",
    "npu_moe_distribute_combine_add_rms_norm",
    "npu_moe_distribute_combine_setup",
    "npu_moe_distribute_combine_teardown",
    "npu_moe_distribute_combine_v2",
    "npu_moe_distribute_dispatch",
    "npu_moe_distribute_dispatch_setup",
    "npu_moe_distribute_dispatch_teardown",
    "npu_moe_distribute_dispatch_v2",
    "product",
]
