"""What is computed: one folder per family, and the one list of all operators."""

from __future__ import annotations

from ..spec.model import Operator
from .all_gather_mm.spec import ALL_GATHER_BASE_MM, DISTRIBUTE_BARRIER, MM_ALL_REDUCE_BASE, MM_REDUCE_SCATTER_BASE
from .gmm_alltoallv.spec import ALLTOALLV_GMM, GMM_ALLTOALLV
from .moe_distribute.spec_combine import COMBINE_V2
from .moe_distribute.spec_companions import COMBINE, COMBINE_ADD_RMS_NORM, DISPATCH
from .moe_distribute.spec_dispatch import DISPATCH_V2
from .moe_distribute.spec_split import COMBINE_SETUP, COMBINE_TEARDOWN, DISPATCH_SETUP, DISPATCH_TEARDOWN

OPERATORS: dict[str, Operator] = {
    operator.name: operator
    for operator in (
        DISPATCH_V2,
        COMBINE_V2,
        COMBINE_ADD_RMS_NORM,
        DISPATCH_SETUP,
        DISPATCH_TEARDOWN,
        COMBINE_SETUP,
        COMBINE_TEARDOWN,
        DISPATCH,
        COMBINE,
        GMM_ALLTOALLV,
        ALLTOALLV_GMM,
        ALL_GATHER_BASE_MM,
        MM_REDUCE_SCATTER_BASE,
        MM_ALL_REDUCE_BASE,
        DISTRIBUTE_BARRIER,
    )
}
