"""What looks wrong and is not: real callers write it, and it gives what the plain call gives."""

from __future__ import annotations

from commfuse.operators.moe_distribute.cases import RoundTrip

from . import all_gather_mm, gmm_alltoallv
from .bases import INT8, MASKED, MASKED_PAIRS, NOT_SHRUNK, PARTNERS, PLAIN, SHARED, SHARED_ROWS, SHRUNK, TP_ONE
from .case import COMBINE, DISPATCH, Calls, Odd

_NUMPY = "; ".join(
    f"{name} = np.{kind}({name})"
    for name, kind in (
        ("ep_world_size", "int64"),
        ("ep_rank_id", "int32"),
        ("moe_expert_num", "int16"),
        ("tp_world_size", "int8"),
        ("tp_rank_id", "uint8"),
        ("global_bs", "int64"),
        ("shared_expert_num", "int64"),
        ("shared_expert_rank_num", "int64"),
        ("zero_expert_num", "int64"),
    )
)
_RESOLVE = "torch.distributed.distributed_c10d._resolve_process_group"


def _case(operator: str, name: str, written: str, base: RoundTrip = PLAIN, product: str = "portable") -> Odd:
    return Odd(
        id=f"{'dispatch' if operator == DISPATCH else 'combine'}-{name}",
        operator=operator,
        wrong=written,
        base=base,
        product=product,
    )


BOTH = [
    case
    for operator in (DISPATCH, COMBINE)
    for case in (
        _case(operator, "numpy-ints", _NUMPY),
        _case(operator, "numpy-ints-shared", _NUMPY, SHARED),
        _case(operator, "process-group", f"group_ep = {_RESOLVE}(group_ep)"),
        _case(operator, "two-process-groups", f"group_ep = {_RESOLVE}(group_ep); group_tp = {_RESOLVE}(group_tp)", PARTNERS),
        _case(operator, "same-group-twice-with-tp-world-size-1", "group_tp = group_ep", TP_ONE),
        _case(operator, "group-tp-unknown-without-tp", "group_tp = 'nowhere'"),
        _case(operator, "ids-of-masked-tokens", "expert_ids[x_active_mask.sum():] = -7", MASKED),
        _case(operator, "ids-of-masked-pairs-all-alike", "expert_ids[~x_active_mask] = 0", MASKED_PAIRS),
        _case(operator, "mask-order-unchecked", "x_active_mask = x_active_mask.flip(0)", MASKED),
        _case(operator, "elastic-info-not-shrunk", "elastic_info[1:] = -99", NOT_SHRUNK),
        _case(operator, "elastic-info-after-the-survivors", "elastic_info[-1] = 99", SHRUNK),
        _case(operator, "shared-expert-num-without-shared-ranks", "shared_expert_num = 4"),
        _case(operator, "global-bs-of-equal-batches", "global_bs = 12"),
        _case(operator, "tiny-buffer-in-portable", "os.environ['HCCL_BUFFSIZE'] = '0'"),
        _case(operator, "buffer-not-a-number-in-portable", "os.environ['HCCL_BUFFSIZE'] = 'plenty'"),
        _case(operator, "ids-transposed-in-memory", "expert_ids = expert_ids.t().contiguous().t()"),
    )
]

IN_DISPATCH = [
    _case(DISPATCH, "rows-of-masked-tokens", "x[x_active_mask.sum():] = float('inf')", MASKED),
    _case(DISPATCH, "rows-transposed-in-memory", "x = x.t().contiguous().t()"),
    _case(DISPATCH, "rows-that-require-grad", "x.requires_grad_()"),
    _case(DISPATCH, "smooth-factors-not-contiguous", "scales = scales.t().contiguous().t()", INT8),
    _case(DISPATCH, "comm-alg-that-changes-nothing", "comm_alg = 'ccu'"),
]

IN_COMBINE = [
    _case(COMBINE, "tp-counts-uninitialised", "tp_send_counts = torch.tensor([-1234567], dtype=torch.int32)"),
    _case(COMBINE, "tp-counts-of-any-kind", "tp_send_counts = torch.randn(2, 3)"),
    _case(
        COMBINE,
        "special-tensors-without-special-experts",
        "ori_x = torch.ones(1); const_expert_alpha_1 = torch.ones(9, 9, 9); const_expert_alpha_2 = torch.ones(0); "
        "const_expert_v = torch.ones(5).int()",
    ),
    _case(COMBINE, "expand-scales-of-any-length", "expand_scales = torch.full((5,), float('nan'))"),
    _case(COMBINE, "rows-behind-the-received-ones", "expand_x[ep_send_counts[-1]:] = float('inf')"),
    _case(COMBINE, "received-rows-only", "expand_x = expand_x[:ep_send_counts[-1]]"),
    _case(COMBINE, "assist-info-behind-the-triplets", "assist_info_for_combine[3 * ep_send_counts[-1]:] = -1"),
    _case(
        COMBINE, "assist-info-of-received-rows-only", "assist_info_for_combine = assist_info_for_combine[:3 * ep_send_counts[-1]]"
    ),
    _case(
        COMBINE,
        "counts-with-more-entries",
        "ep_send_counts = torch.cat([ep_send_counts, torch.full((9,), -1, dtype=torch.int32)])",
    ),
    _case(COMBINE, "weights-of-masked-pairs", "expert_scales[~x_active_mask] = float('inf')", MASKED_PAIRS),
    _case(COMBINE, "shared-rows-3d", "shared_expert_x = shared_expert_x[:, None]", SHARED_ROWS),
    _case(COMBINE, "other-comm-alg-than-dispatch", "comm_alg = 'fullmesh_v2'"),
    _case(COMBINE, "rows-transposed-in-memory", "expand_x = expand_x.t().contiguous().t()"),
]


def _matmul(operator: str, name: str, written: str, base: Calls) -> Odd:
    return Odd(id=f"{operator.removeprefix('_').removeprefix('npu_')}-{name}", operator=operator, wrong=written, base=base)


WITH_MATMUL = [
    *(
        _matmul(operator, name, written, gmm_alltoallv.PLAIN)
        for operator in (gmm_alltoallv.GMM, gmm_alltoallv.BACK)
        for name, written in (
            (
                "counts-in-arrays",
                "send_counts = np.array(send_counts); recv_counts = torch.tensor(recv_counts, dtype=torch.int32)",
            ),
            ("counts-of-numpy-ints", "send_counts = tuple(map(np.int16, send_counts)); ep_world_size = np.int64(ep_world_size)"),
            ("flags-as-ints", "trans_gmm_weight = 0; trans_mm_weight = np.bool_(False)"),
            ("process-group", f"hcom = {_RESOLVE}(hcom)"),
            ("rows-transposed-in-memory", "gmm_x = gmm_x.t().contiguous().t()"),
            ("weight-stored-transposed", "gmm_weight = gmm_weight.mT.contiguous(); trans_gmm_weight = True"),
            ("that-require-grad", "gmm_x.requires_grad_(); gmm_weight.requires_grad_(); mm_weight.requires_grad_()"),
            ("comm-mode-that-changes-nothing", "comm_mode = 'aiv'"),
        )
    ),
    *(
        _matmul(operator, name, written, all_gather_mm.PLAIN)
        for operator in (all_gather_mm.GATHER, all_gather_mm.SCATTER)
        for name, written in (
            ("numpy-ints", "world_size = np.int32(world_size); comm_turn = np.int8(0)"),
            ("process-group", f"hcom = {_RESOLVE}(hcom)"),
            ("rows-transposed-in-memory", "input = input.t().contiguous().t()"),
            ("weight-transposed-in-memory", "x2 = x2.t().contiguous().t()"),
            ("that-require-grad", "input.requires_grad_(); x2.requires_grad_()"),
        )
    ),
    _matmul(all_gather_mm.REDUCE, "comm-quant-scales", "comm_quant_scale_1 = comm_quant_scale_2 = x2[:1]", all_gather_mm.PLAIN),
    _matmul(all_gather_mm.REDUCE, "bias-of-zeros", "bias = torch.zeros(5, dtype=x1.dtype)", all_gather_mm.PLAIN),
    _matmul(all_gather_mm.BARRIER, "time-out", "time_out = torch.tensor([-1])", all_gather_mm.PLAIN),
    _matmul(
        all_gather_mm.BARRIER,
        "table-of-nobody-gone",
        "elastic_info = torch.full((8,), -9).int(); elastic_info[0] = 0",
        all_gather_mm.PLAIN,
    ),
]

CASES = [*BOTH, *IN_DISPATCH, *IN_COMBINE, *WITH_MATMUL]
