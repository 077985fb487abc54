"""What one can write wrongly in npu_gmm_alltoallv and npu_alltoallv_gmm, and what one reads."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

import commfuse
from commfuse.operators.gmm_alltoallv.cases import GmmCase

from .case import Calls, Misuse

GMM, BACK = "npu_gmm_alltoallv", "npu_alltoallv_gmm"

_CASE = GmmCase(id="plain", pattern="uniform", BS=3)  # two ranks, two experts each, four rows for every (rank, expert)


def _base(name: str, **changes: Any) -> Calls:
    case = replace(_CASE, id=name, **changes)
    back = replace(case, operator="alltoallv_gmm", permute_out_flag=True)
    return Calls(id=name, cases=((GMM, case), (BACK, back)))


PLAIN = _base("gmm")
ALONE = _base("gmm-without-shared-expert", BS=0)
SINGLE = _base("gmm-float32", dtype=torch.float32)


def both(name: str, wrong: str, *says: str, **more: Any) -> list[Misuse]:
    """The same in both operators. Under the rules of A3 the plain call only warns: it wants 8 ranks."""
    if more.get("product"):
        more["settings"] = {"product": f"{more['product']},warn"}
    return [
        Misuse(id=f"{short}-{name}", operator=operator, wrong=wrong, says=says, **{"base": PLAIN, **more})
        for short, operator in (("gmm", GMM), ("back", BACK))
    ]


def only(operator: str, name: str, wrong: str, *says: str, **more: Any) -> list[Misuse]:
    return [case for case in both(name, wrong, *says, **more) if case.operator == operator]


KINDS = [
    *both("rows-a-list", "gmm_x = gmm_x.tolist()", "gmm_x = [[", "must be a tensor, got list"),
    *both("rows-none", "gmm_x = None", "gmm_x = None: must be a tensor (A, H1), 2-D"),
    *both("weight-an-array", "gmm_weight = np.ones((2, 8, 6))", "gmm_weight = array(", "must be a tensor, got ndarray"),
    *both("weight-none", "gmm_weight = None", "gmm_weight = None: must be a tensor (e, weight_1, weight_2), 3-D"),
    *both("world-size-text", "ep_world_size = '2'", "ep_world_size = '2': must be an int, got str"),
    *both("send-counts-none", "send_counts = None", "send_counts = None: must be a sequence of ints, got NoneType"),
    *both("send-counts-fractions", "send_counts = [4.0] * 4", "send_counts = [4.0, 4.0, 4.0, 4.0]: must be a sequence of ints"),
    *both("recv-counts-a-number", "recv_counts = 16", "recv_counts = 16: must be a sequence of ints, got int"),
    *both("recv-counts-text", "recv_counts = '4444'", "recv_counts = '4444': must be a sequence of ints, got str"),
    *both("recv-counts-floats", "recv_counts = torch.full((4,), 4.0)", "recv_counts = tensor(", "must be a sequence of ints"),
    *both(
        "recv-counts-in-two-dimensions", "recv_counts = np.full((2, 2), 4)", "recv_counts = array(", "must be a sequence of ints"
    ),
    *both(
        "send-tensor-a-list",
        "send_counts_tensor = [4] * 4",
        "send_counts_tensor = [4, 4, 4, 4]: must be a tensor or None, got list",
    ),
    *both("recv-tensor-a-list", "recv_counts_tensor = [4] * 4", "recv_counts_tensor = [4, 4, 4, 4]: must be a tensor or None"),
    *both("shared-rows-a-list", "mm_x = [1.0]", "mm_x = [1.0]: must be a tensor or None, got list"),
    *both("shared-weight-a-number", "mm_weight = 2", "mm_weight = 2: must be a tensor or None, got int"),
    *both("trans-gmm-none", "trans_gmm_weight = None", "trans_gmm_weight = None: must be a bool, got NoneType"),
    *both("trans-gmm-two", "trans_gmm_weight = 2", "trans_gmm_weight = 2: must be a bool"),
    *both("trans-mm-text", "trans_mm_weight = 'no'", "trans_mm_weight = 'no': must be a bool, got str"),
    *both("comm-mode-a-number", "comm_mode = 0", "comm_mode = 0: must be a str or None, got int"),
    *only(BACK, "permute-flag-none", "permute_out_flag = None", "permute_out_flag = None: must be a bool, got NoneType"),
]

SHAPES = [
    *both("rows-1d", "gmm_x = gmm_x[0]", "gmm_x.shape = (8,): must be (A, H1), 2-D"),
    *both("weight-2d", "gmm_weight = gmm_weight[0]", "gmm_weight.shape = (8, 6): must be (e, weight_1, weight_2), 3-D"),
    *both("weight-of-another-width", "gmm_weight = gmm_weight[:, :5]", "weight_in = 5", "the width of gmm_x's rows, H1 = 8"),
    *both("weight-not-transposed", "trans_gmm_weight = True", "weight_in = 6", "the width of gmm_x's rows, H1 = 8"),
    *both("no-experts", "gmm_weight = gmm_weight[:0]", "e = 0 (gmm_weight.shape[0]): must be at least 1", "E_ep"),
    *both("shared-rows-3d", "mm_x = mm_x[None]", "mm_x.shape = (1, 3, 5): must be (BS, H2), 2-D"),
    *both("shared-weight-1d", "mm_weight = mm_weight[0]", "mm_weight.shape = (7,): must be (mm_weight_1, mm_weight_2), 2-D"),
    *both("shared-weight-of-another-width", "mm_weight = mm_weight[1:]", "mm_in = 4", "the width of mm_x's rows, H2 = 5"),
    *both("shared-weight-not-transposed", "trans_mm_weight = True", "mm_in = 7", "the width of mm_x's rows, H2 = 5"),
]

DTYPES = [
    *both("rows-of-ints", "gmm_x = gmm_x.int()", "gmm_x.dtype = int32: must be bfloat16 or float16 or float32"),
    *both("rows-in-double", "gmm_x = gmm_x.double()", "gmm_x.dtype = float64: must be bfloat16 or float16 or float32"),
    *both("weight-int8", "gmm_weight = gmm_weight.char()", "gmm_weight.dtype = int8: must be bfloat16 or float16 or float32"),
    *both("weight-of-another-dtype", "gmm_weight = gmm_weight.half()", "gmm_weight.dtype = 'float16'", "gmm_x.dtype = bfloat16"),
    *both("shared-rows-bool", "mm_x = mm_x > 0", "mm_x.dtype = bool: must be bfloat16 or float16 or float32"),
    *both("shared-weight-int8", "mm_weight = mm_weight.char()", "mm_weight.dtype = int8: must be bfloat16 or float16 or float32"),
    *both(
        "shared-weight-of-another-dtype", "mm_weight = mm_weight.float()", "mm_weight.dtype = 'float32'", "mm_x.dtype = bfloat16"
    ),
]

VALUES = [
    *both("world-size-zero", "ep_world_size = 0", "ep_world_size = 0: must be at least 1"),
    *both("world-size-of-another-group", "ep_world_size = 4", "ep_world_size = 4: must be the size of hcom = 2"),
    *both("too-few-send-counts", "send_counts = [8, 8]", "len(send_counts) = 2: must be e * ep_world_size = 4"),
    *both(
        "too-many-recv-counts", "recv_counts += [0]", "len(recv_counts) = 5: must be e * ep_world_size = 4", "E_ep * epworldSize"
    ),
    *both("rows-left-over", "send_counts[3] = 3", "sum(send_counts) = 15: must be the rows of gmm_x = 16", "A[…]"),
    *both("rows-missing", "gmm_x = gmm_x[:-1]", "sum(send_counts) = 16: must be the rows of gmm_x = 15"),
    *both("negative-send-count", "send_counts[:2] = [9, -1]", "send_counts[1] = -1: must be at least 0"),
    *both("negative-recv-count", "recv_counts[2] = -4", "recv_counts[2] = -4: must be at least 0"),
    *both(
        "send-tensor", "send_counts_tensor = torch.tensor(send_counts)", "send_counts_tensor = a tensor (4,) int64: must be None"
    ),
    *both("recv-tensor", "recv_counts_tensor = torch.tensor(recv_counts)", "should all be nullptr now!"),
    *both("shared-rows-alone", "mm_weight = None", "mm_weight = None: must be given if and only if mm_x is"),
    *both("shared-weight-alone", "mm_x = None", "must be given if and only if mm_x is", "all be nullptr or all be not nullptr!"),
    *both(
        "trans-mm-without-shared-rows",
        "trans_mm_weight = True",
        "trans_mm_weight = True: must be False when mm_x is None",
        base=ALONE,
    ),
    *both("comm-mode-unknown", "comm_mode = 'ccu'", "comm_mode = 'ccu': must be one of None, 'ai_cpu', 'aiv'"),
    *both(
        "three-mistakes-at-once",
        "comm_mode = ''; recv_counts = []; gmm_x = gmm_x[0]",
        "comm_mode = ''",
        "len(recv_counts) = 0",
        "gmm_x.shape = (8,)",
    ),
]

COUNTS = [
    *both(
        "sends-what-the-peer-does-not-expect",
        "send_counts[:] = [5, 3, 4, 4]",
        "refused on rank 1 of 2",
        "send_counts[0] = 5 on rank 1: must equal recv_counts[2] = 4 on rank 0",
        on_rank=1,
    ),
    *both(
        "expects-what-nobody-sends",
        "recv_counts[3] = 5",
        "refused on rank 1 of 2",
        "send_counts[1] = 4 on rank 1: must equal recv_counts[3] = 5 on rank 0",
        on_rank=0,
    ),
    *both(
        "counts-by-expert-and-peer",
        "send_counts[:] = [6, 2, 4, 4]; recv_counts[:] = [6, 4, 2, 4]",
        "refused on rank 0 of 2",
        "send_counts[1] = 2 on rank 0: must equal recv_counts[1] = 4 on rank 0",
        "refused on rank 1 of 2",
        on_rank=None,
    ),
]

ON_A3 = [
    *both("a3-float32", "pass", "gmm_x.dtype = 'float32'", "gmmx only support float16 and bf16!", base=SINGLE, product="A3"),
    *both("a3-world-size", "pass", "under the rules of A3", "ep_world_size = 2: must be one of 8, 16, 32, 64", product="A3"),
    *both("a3-world-size-zero", "ep_world_size = 0", "ep_world_size = 0: must be one of 8, 16, 32, 64", product="A3"),
    *both(
        "a3-experts",
        "gmm_weight = gmm_weight[:1].expand(33, -1, -1); send_counts += [0] * 62; recv_counts += [0] * 62",
        "e = 33 (gmm_weight.shape[0]): must be in 1..32",
        product="A3",
    ),
    *both(
        "a3-count-lists",
        "gmm_weight = gmm_weight[:1].expand(129, -1, -1); send_counts += [0] * 254; recv_counts += [0] * 254",
        "e * ep_world_size = 258: must be in 1..256",
        product="A3",
    ),
    *both("a3-receives-nothing", "recv_counts[:] = [0] * 4", "BSK = 0 (sum(recv_counts)): must be in 1..52428799", product="A3"),
    *both("a3-receives-too-much", "recv_counts[0] = 52428788", "BSK = 52428800", "must be in 1..52428799", product="A3"),
    *both(
        "a3-wide-rows",
        "gmm_x = gmm_x[:, :1].expand(-1, 65536); gmm_weight = gmm_weight[:, :1].expand(-1, 65536, -1)",
        "H1 = 65536 (gmm_x.shape[1]): must be in 1..65535",
        product="A3",
    ),
    *both("a3-wide-output", "gmm_weight = gmm_weight[..., :1].expand(-1, -1, 65536)", "N1 = 65536", "in 1..65535", product="A3"),
    *both(
        "a3-wide-shared-rows",
        "mm_x = mm_x[:, :1].expand(-1, 12289); mm_weight = mm_weight[:1].expand(12289, -1)",
        "H2 = 12289 (mm_x.shape[1]): must be in 1..12288",
        product="A3",
    ),
    *both("a3-wide-shared-output", "mm_weight = mm_weight[:, :1].expand(-1, 65536)", "N2 = 65536", "in 1..65535", product="A3"),
    *both("a3-no-shared-rows", "mm_x = mm_x[:0]", "BS = 0 (mm_x.shape[0]): must be at least 1", product="A3"),
    *both(
        "a3-shared-rows-of-another-dtype",
        "mm_x = mm_x.half(); mm_weight = mm_weight.half()",
        "mm_x.dtype = 'float16': must be gmm_x.dtype = bfloat16",
        product="A3",
    ),
    *both("a3-top-k", "mm_x = mm_x[:1]", "top_k = 16 (BSK // BS): must be in 2..8", "K[…] should be in [2, 8]!", product="A3"),
    *both(
        "a3-small-volume",
        "pass",
        "peer_bytes(send_counts, ep_world_size, e, H1) = [128, 128]: must be 2 MB to 100 MB",
        "peer_bytes(recv_counts, ep_world_size, e, H1) = [128, 128]: must be 2 MB to 100 MB",
        product="A3",
    ),
]

ON_A2 = both("a2", "pass", "product = 'A2': must be 'A3' (A2 does not have this operator)", product="A2")

MISMATCHES = [
    *both(
        "other-number-of-experts",
        "gmm_weight = gmm_weight[:1]; send_counts[:] = [8, 8]; recv_counts[:] = [8, 8]",
        "e: 2 on rank 0 of 2; 1 on rank 1 of 2",
        on_rank=1,
        error=commfuse.MismatchError,
    ),
    *both(
        "other-dtype",
        "gmm_x = gmm_x.half(); gmm_weight = gmm_weight.half()",
        "gmm_x.dtype: 'bfloat16' on rank 0 of 2; 'float16' on rank 1 of 2",
        on_rank=1,
        error=commfuse.MismatchError,
    ),
    *only(
        GMM,
        "other-output-width",
        "gmm_weight = gmm_weight[..., :5]",
        "N1: 5 on rank 0 of 2; 6 on rank 1 of 2",
        on_rank=0,
        error=commfuse.MismatchError,
    ),
    *only(
        BACK,
        "other-row-width",
        "gmm_x = gmm_x[:, :5]; gmm_weight = gmm_weight[:, :5]",
        "H1: 5 on rank 0 of 2; 8 on rank 1 of 2",
        on_rank=0,
        error=commfuse.MismatchError,
    ),
    *both(
        "other-product",
        "commfuse.config.set(product='A3,warn')",
        "product: 'portable' on rank 0 of 2; 'A3' on rank 1 of 2",
        on_rank=1,
        error=commfuse.MismatchError,
    ),
    *only(
        GMM,
        "other-operator",
        "pass",
        "npu_alltoallv_gmm / npu_gmm_alltoallv: ranks of group",
        "operator: 'npu_gmm_alltoallv' on rank 0 of 2; 'npu_alltoallv_gmm' on rank 1 of 2",
        on_rank=1,
        calls=BACK,
        error=commfuse.MismatchError,
    ),
]

CASES = [*KINDS, *SHAPES, *DTYPES, *VALUES, *COUNTS, *ON_A3, *ON_A2, *MISMATCHES]
