"""The public operators: torch_npu's names and signatures, one function each, a file per family."""

from .all_gather_mm import (
    _npu_distribute_barrier,
    npu_all_gather_base_mm,
    npu_mm_all_reduce_base,
    npu_mm_reduce_scatter_base,
)
from .gmm_alltoallv import npu_alltoallv_gmm, npu_gmm_alltoallv
from .moe_distribute import npu_moe_distribute_combine_v2, npu_moe_distribute_dispatch_v2
from .moe_distribute_companions import (
    npu_moe_distribute_combine,
    npu_moe_distribute_combine_add_rms_norm,
    npu_moe_distribute_dispatch,
)
from .moe_distribute_split import (
    npu_moe_distribute_combine_setup,
    npu_moe_distribute_combine_teardown,
    npu_moe_distribute_dispatch_setup,
    npu_moe_distribute_dispatch_teardown,
)

__all__ = [
    "_npu_distribute_barrier",
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
]
