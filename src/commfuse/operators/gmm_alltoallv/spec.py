"""npu_gmm_alltoallv and its inverse npu_alltoallv_gmm as rows."""

from __future__ import annotations

from ...spec.model import (
    HALF,
    HARDWARE,
    ON_A2,
    ON_A3,
    ROWS,
    Attr,
    Operator,
    Output,
    Rule,
    Symbol,
    Tensor,
    at_least,
    between,
    holds,
    one_of,
)
from . import steps
from .reference import alltoallv_gmm, gmm_alltoallv

_FORMULA = "the formula itself"
_MM = "mm_x is not None and mm_weight is not None"


def _args(permute: bool) -> tuple[Tensor | Attr, ...]:
    flag = Attr(name="permute_out_flag", schema="bool", default=False, meaning="also return the received rows, by local expert")
    return (
        Tensor(
            name="gmm_x",
            shapes=(("A", "H1"),),
            dtype=ROWS,
            meaning="this rank's rows, by (destination rank, expert there)"
            if permute
            else "this rank's rows, by (local expert, destination)",
        ),
        Tensor(
            name="gmm_weight",
            shapes=(("e", "weight_1", "weight_2"),),
            dtype=ROWS,
            meaning="the local experts' weights: [e, H1, N1], or [e, N1, H1] with trans_gmm_weight",
        ),
        Attr(
            name="hcom",
            schema="group",
            required=True,
            positional=True,
            meaning="the expert-parallel domain: name or ProcessGroup",
        ),
        Attr(name="ep_world_size", schema="int", required=True, positional=True, meaning="W, ranks in the domain"),
        Attr(
            name="send_counts",
            schema="int[]",
            required=True,
            positional=True,
            meaning="rows sent, at [peer * e + expert of the rank that holds it]",
        ),
        Attr(name="recv_counts", schema="int[]", required=True, positional=True, meaning="rows received, in the same order"),
        Tensor(
            name="send_counts_tensor",
            shapes=(("e * ep_world_size",),),
            dtype=("int64",),
            optional=True,
            when="False",
            meaning="reserved; None",
        ),
        Tensor(
            name="recv_counts_tensor",
            shapes=(("e * ep_world_size",),),
            dtype=("int64",),
            optional=True,
            when="False",
            meaning="reserved; None",
        ),
        Tensor(
            name="mm_x",
            shapes=(("BS", "H2"),),
            dtype=ROWS,
            optional=True,
            meaning="the shared expert's rows; nothing of them travels",
        ),
        Tensor(
            name="mm_weight",
            shapes=(("mm_weight_1", "mm_weight_2"),),
            dtype=ROWS,
            optional=True,
            meaning="its weight: [H2, N2], or [N2, H2] with trans_mm_weight",
        ),
        Attr(name="trans_gmm_weight", schema="bool", default=False, meaning="gmm_weight is stored transposed"),
        Attr(name="trans_mm_weight", schema="bool", default=False, meaning="mm_weight is stored transposed"),
        *((flag,) if permute else ()),
        Attr(name="comm_mode", schema="str?", default=None, meaning="newer: None, 'ai_cpu' or 'aiv'; the result is the same"),
    )


_SYMBOLS = (
    Symbol(
        name="weight_in", formula="weight_2 if trans_gmm_weight else weight_1", meaning="width of a row that gmm_weight takes"
    ),
    Symbol(name="N1", formula="weight_1 if trans_gmm_weight else weight_2", meaning="width of an output row"),
    Symbol(
        name="mm_in", formula="mm_weight_2 if trans_mm_weight else mm_weight_1", meaning="width of a row that mm_weight takes"
    ),
    Symbol(name="N2", formula="mm_weight_1 if trans_mm_weight else mm_weight_2", meaning="width of an mm_y row"),
    Symbol(name="BSK", formula="sum(recv_counts)", meaning="rows received"),
    Symbol(name="top_k", formula="BSK // BS", meaning="experts per token, as the hardware infers it"),
)


def _rules(page: str) -> tuple[Rule, ...]:
    return (
        at_least("ep_world_size", 1, _FORMULA),
        holds("ep_world_size", "ep_world_size == group_size", "the size of hcom = {group_size}", _FORMULA),
        holds("hcom", "1 <= len(hcom) <= 127", "1 to 127 characters", page + "hcom"),
        holds(
            "weight_in",
            "weight_in == H1",
            "the width of gmm_x's rows, H1 = {H1}",
            page + "gmm_weight",
        ),
        at_least("e", 1, page + "gmm_weight", says="E_ep[…] should be in (0, 32]!"),
        *(
            holds(
                f"len({name})",
                f"len({name}) == e * ep_world_size",
                "e * ep_world_size = {e * ep_world_size}",
                page + name,
                says="The length of recvCnts[…] should be equal to E_ep * epworldSize[…]",
            )
            for name in ("send_counts", "recv_counts")
        ),
        holds(
            "sum(send_counts)",
            "sum(send_counts) == A",
            "the rows of gmm_x = {A}",
            page + "send_counts",
            says="A[…] should be equal to the sum of sendCounts[…]!",
        ),
        holds("gmm_weight.dtype", "gmm_weight.dtype == gmm_x.dtype", "gmm_x.dtype = {gmm_x.dtype}", page + "gmm_weight"),
        *(
            holds(
                name,
                f"{name} is None",
                "None",
                page + name,
                says="sendCountsTensor and recvCountsTensor should all be nullptr now!",
            )
            for name in ("send_counts_tensor", "recv_counts_tensor")
        ),
        holds(
            "mm_weight",
            "(mm_x is None) == (mm_weight is None)",
            "given if and only if mm_x is",
            page + "mm_x",
            says="mmX, mmWeight and mmY should all be nullptr or all be not nullptr!",
        ),
        holds("mm_in", "mm_in == H2", "the width of mm_x's rows, H2 = {H2}", page + "mm_weight", when=_MM),
        holds("mm_weight.dtype", "mm_weight.dtype == mm_x.dtype", "mm_x.dtype = {mm_x.dtype}", page + "mm_weight", when=_MM),
        holds(
            "trans_mm_weight",
            "not trans_mm_weight",
            "False",
            page + "trans_mm_weight",
            when="mm_x is None",
            says="transMmWeightPtr should not be true when mmX is null!",
        ),
        one_of("comm_mode", (None, "ai_cpu", "aiv"), page + "comm_mode"),
        *_hardware(page),
    )


def _hardware(page: str) -> tuple[Rule, ...]:
    volume = "2 MB to 100 MB (bytes to or from each peer)"
    return (
        holds("product", "False", "'A3' (A2 does not have this operator)", page + "products", on=ON_A2),
        one_of(
            "gmm_x.dtype", HALF, page + "gmm_x", on=HARDWARE, says="Unsupported dataType, gmmx only support float16 and bf16!"
        ),
        one_of(
            "ep_world_size", (8, 16, 32, 64), page + "ep_world_size", on=ON_A3, says="epWorldSize[…] should be 8\\16\\32\\64!"
        ),
        between("e", 1, 32, page + "gmm_weight", on=ON_A3, says="E_ep[…] should be in (0, 32]!"),
        between("e * ep_world_size", 1, 256, page + "send_counts", on=ON_A3),
        between("BSK", 1, 52428799, page + "recv_counts", on=ON_A3, says="BsK[…] should be equal to the sum of recvCounts[…]!"),
        between("H1", 1, 65535, page + "gmm_x", on=ON_A3),
        between("N1", 1, 65535, page + "gmm_weight", on=ON_A3),
        between("H2", 1, 12288, page + "mm_x", on=ON_A3, when=_MM),
        between("N2", 1, 65535, page + "mm_weight", on=ON_A3, when=_MM),
        at_least("BS", 1, page + "mm_x", on=ON_A3, when=_MM),
        holds("mm_x.dtype", "mm_x.dtype == gmm_x.dtype", "gmm_x.dtype = {gmm_x.dtype}", page + "mm_x", on=ON_A3, when=_MM),
        between("top_k", 2, 8, page + "mm_x", on=ON_A3, when=_MM, says="K[…] should be in [2, 8]!"),
        *(
            holds(
                f"peer_bytes({name}, ep_world_size, e, H1)",
                f"2 * 2**20 <= min_of(peer_bytes({name}, ep_world_size, e, H1)) and "
                f"max_of(peer_bytes({name}, ep_world_size, e, H1)) <= 100 * 2**20",
                volume,
                page + name,
                on=ON_A3,
                when="ep_world_size > 0",
                says="rank …:sum(recvCounts[…]) * H1 * sizeof dtype(gmmx) should be [2MB, 100MB]",
            )
            for name in ("send_counts", "recv_counts")
        ),
    )


def _operator(name: str, summary: str, permute: bool) -> Operator:
    page = f"{name} page, "
    rows_out = Output(
        name="gmm_y" if permute else "y",
        shape=("BSK", "N1"),
        dtype="gmm_x.dtype",
        meaning="by (local expert, source rank)" if permute else "by (source rank, expert there): ascending global expert id",
    )
    shared = Output(name="mm_y", shape=("BS", "N2"), dtype="mm_x.dtype", given=_MM, meaning="mm_x @ mm_weight")
    received = Output(
        name="permute_out",
        shape=("BSK", "H1"),
        dtype="gmm_x.dtype",
        given="permute_out_flag",
        meaning="the received rows in the order of gmm_y",
    )
    return Operator(
        name=name,
        summary=summary,
        args=_args(permute),
        first_keyword="send_counts_tensor",
        symbols=_SYMBOLS,
        rules=_rules(page),
        outputs=(rows_out, shared, received) if permute else (rows_out, shared),
        group="hcom",
        agree=("ep_world_size", "e", "gmm_x.dtype", "H1" if permute else "N1"),
        world_size="ep_world_size",
        values=steps.negative_counts,
        steps=steps.alltoallv_gmm if permute else steps.gmm_alltoallv,
        golden=(lambda ranks, call: alltoallv_gmm(ranks)) if permute else (lambda ranks, call: gmm_alltoallv(ranks)),
    )


GMM_ALLTOALLV = _operator(
    "npu_gmm_alltoallv",
    "multiply every local expert's rows with its weight, then send each row to its rank",
    permute=False,
)
ALLTOALLV_GMM = _operator(
    "npu_alltoallv_gmm",
    "send each row to the rank of its expert, then multiply every local expert's rows with its weight",
    permute=True,
)
