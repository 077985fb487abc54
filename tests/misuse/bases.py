"""The valid calls that the misuse cases change: small ones, one per corner of the arguments."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from commfuse.operators.moe_distribute.cases import RoundTrip

PLAIN = RoundTrip(id="plain", num_tokens=(3,) * 4, hidden=8)


def _base(name: str, **changes: Any) -> RoundTrip:
    return replace(PLAIN, id=name, **changes)


PAIR = _base("pair", world_size=2, num_tokens=(3, 3))
INT8 = _base("int8", quant_mode=2, smooth=True)
SPECIAL = _base("special", zero_expert_num=1, copy_expert_num=1, const_expert_num=1)
SHARED = _base("shared", shared_expert_rank_num=1, moe_expert_num=6)
TWO_SHARED = _base("two-shared", shared_expert_num=2, shared_expert_rank_num=2, moe_expert_num=4)
MASKED = _base("masked", mask="1d", seed=1)
MASKED_PAIRS = _base("masked-pairs", mask="2d")
TP_ONE = _base("tp-one", tp_world_size=1)  # what callers without tensor parallelism pass
SHARED_ROWS = _base("shared-rows", shared_expert_x=2)

ELASTIC = _base("elastic", alive=(0, 1, 2, 3))  # the table says that nobody is missing
ELASTIC_SHARED = _base("elastic-shared", alive=(0, 1, 2, 3), alive_shared_rank_num=1, shared_expert_rank_num=1, moe_expert_num=6)
NOT_SHRUNK = _base("not-shrunk", elastic_flag_zero=True)
SHRUNK = _base("shrunk", alive=(0, 1, 3))  # rank 2 is gone and does not call

PARTNERS = _base("partners", world_size=2, num_tokens=(3, 3), tp_world_size=2, moe_expert_num=2, top_k=2)

A3 = _base("a3", num_tokens=(2,) * 4, hidden=1024)
A3_V2 = _base("a3-v2", num_tokens=(2,) * 4, hidden=1024, comm_alg="fullmesh_v2")
A3_ALONE = _base("a3-alone", world_size=1, num_tokens=(2,), hidden=1024)
A3_PARTNERS = replace(PARTNERS, id="a3-partners", hidden=1024)
A2 = _base("a2", num_tokens=(2,) * 4, hidden=64)
A2_HIERARCHY = _base("a2-hierarchy", num_tokens=(2,) * 4, hidden=64, comm_alg="hierarchy", with_expert_scales=True)
