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
from .local import (
    npu_dequant_swiglu_quant,
    npu_dynamic_quant,
    npu_grouped_matmul,
    npu_moe_finalize_routing,
    npu_moe_gating_top_k,
    npu_moe_gating_top_k_softmax,
    npu_moe_init_routing_v2,
    npu_moe_re_routing,
    npu_moe_token_permute,
    npu_moe_token_unpermute,
    npu_swiglu,
)
from .observe.statistics import OperatorStats, Stats, stats
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
from .survival import alive, elastic_info, reset
from .windows import window_empty

__version__ = "0.1.0"

__all__ = [
    "ArgumentError",
    "BackendError",
    "CommfuseError",
    "CommfuseWarning",
    "ExchangeError",
    "GroupError",
    "MismatchError",
    "OperatorStats",
    "Stats",
    "__version__",
    "_npu_distribute_barrier",
    "alive",
    "config",
    "elastic_info",
    "npu_all_gather_base_mm",
    "npu_alltoallv_gmm",
    "npu_dequant_swiglu_quant",
    "npu_dynamic_quant",
    "npu_gmm_alltoallv",
    "npu_grouped_matmul",
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
    "npu_moe_finalize_routing",
    "npu_moe_gating_top_k",
    "npu_moe_gating_top_k_softmax",
    "npu_moe_init_routing_v2",
    "npu_moe_re_routing",
    "npu_moe_token_permute",
    "npu_moe_token_unpermute",
    "npu_swiglu",
    "product",
    "reset",
    "stats",
    "window_empty",
]
