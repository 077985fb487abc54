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
from .ops import npu_moe_distribute_combine_v2, npu_moe_distribute_dispatch_v2
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
    "config",
    "npu_moe_distribute_combine_v2",
    "npu_moe_distribute_dispatch_v2",
    "product",
]
