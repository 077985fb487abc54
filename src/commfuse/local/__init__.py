"""The local operators around an MoE layer, under torch_npu's names: plain torch, no communication.

One file per theme: gating chooses experts; routing, permute and finalize move rows; grouped_matmul, activation
and quant compute on them.
"""

from .activation import npu_swiglu
from .finalize import npu_moe_finalize_routing
from .gating import npu_moe_gating_top_k, npu_moe_gating_top_k_softmax
from .grouped_matmul import npu_grouped_matmul
from .permute import npu_moe_token_permute, npu_moe_token_unpermute
from .quant import npu_dequant_swiglu_quant, npu_dynamic_quant
from .routing import npu_moe_init_routing_v2, npu_moe_re_routing

__all__ = [
    "npu_dequant_swiglu_quant",
    "npu_dynamic_quant",
    "npu_grouped_matmul",
    "npu_moe_finalize_routing",
    "npu_moe_gating_top_k",
    "npu_moe_gating_top_k_softmax",
    "npu_moe_init_routing_v2",
    "npu_moe_re_routing",
    "npu_moe_token_permute",
    "npu_moe_token_unpermute",
    "npu_swiglu",
]
