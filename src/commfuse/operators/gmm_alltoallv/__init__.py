"""Grouped matmul fused with AlltoAllV, in both orders: `gmm_alltoallv` and `alltoallv_gmm`."""
