"""Matmul fused with a collective (all-gather before it, reduce-scatter or all-reduce after it), and the group barrier."""

from __future__ import annotations

import torch
from torch import Tensor

from ._aliases import first_by_any_name
from ._call import call


@first_by_any_name
def npu_all_gather_base_mm(
    input: Tensor,
    x2: Tensor,
    hcom: str | torch.distributed.ProcessGroup,
    world_size: int,
    *,
    bias: Tensor | None = None,
    x1_scale: Tensor | None = None,
    x2_scale: Tensor | None = None,
    gather_index: int = 0,
    gather_output: bool = True,
    comm_turn: int = 0,
    output_dtype: torch.dtype | None = None,
    comm_mode: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Gather the rows of all ranks and multiply them with the local weight: ``cat(input of ranks 0..W-1) @ x2 + bias``.

    Letters: W = world_size ranks, m rows of each rank, k inner width, n output width. Every rank of the domain calls it, in the same
    order of calls. Accumulated in float32 (int8 products in int32), rounded once.

    Args:
        input: [m, k] bfloat16, float16, int8 or (portable rules) float32; m, k and dtype equal on all ranks. May also be given as
            ``self=`` or ``x1=``. May be non-contiguous under portable rules.
        x2: [k, n] of input's dtype, this rank's weight; a transposed view such as ``weight.t()`` is fine.
        hcom: the communication domain, as torch's ``group.group_name`` or a ProcessGroup.
        world_size: W, the size of the domain.
        bias: [n] of input's dtype, added to every row.
        x1_scale: [m, 1] float32, the factor of each int8 row; given on all ranks or on none.
        x2_scale: [1, n] float32, or int64 that carries float32 bits: the factor of each column; given if and only if input is int8.
        gather_index: 0 (input is gathered).
        gather_output: also return the gathered rows.
        comm_turn: 0.
        output_dtype: of the int8 form: torch.float16 or torch.bfloat16 (None: bfloat16); otherwise None.
        comm_mode: None, "ai_cpu" (not with int8) or "aiv"; the result is the same.

    Returns:
        output: [W * m, n] of input's dtype; in the int8 form float16 if x2_scale is int64, otherwise output_dtype.
        gather_out: [W * m, k] of input's dtype, exact copies in rank order; an empty tensor of shape (0,) without gather_output.

    Raises:
        ArgumentError: an argument breaks a rule, here or on another rank; nothing has been sent. All ranks raise the same text.
            Also when the first argument is given under two names, on this rank alone.
        MismatchError: ranks disagree on the operator or on an argument that must be equal.
        GroupError: the group does not exist in this process.
        ExchangeError: a peer died or did not answer in time.
    """
    return call("npu_all_gather_base_mm", locals())  # type: ignore[no-any-return]


@first_by_any_name
def npu_mm_reduce_scatter_base(
    input: Tensor,
    x2: Tensor,
    hcom: str | torch.distributed.ProcessGroup,
    world_size: int,
    *,
    reduce_op: str = "sum",
    bias: Tensor | None = None,
    x1_scale: Tensor | None = None,
    x2_scale: Tensor | None = None,
    comm_turn: int = 0,
    output_dtype: torch.dtype | None = None,
    comm_mode: str | None = None,
) -> Tensor:
    """Sum ``input @ x2 + bias`` over the ranks and give rank r the rows r * m / W to (r + 1) * m / W - 1 of the sum.

    Letters: W = world_size ranks, m rows, k inner width (may differ between ranks), n output width. Every rank of the domain calls
    it, in the same order of calls. Products and the sum, in ascending order of rank, are float32 and rounded once.

    Args:
        input: [m, k] bfloat16, float16, int8 or (portable rules) float32; W divides m. May also be given as ``self=`` or ``x1=``.
        x2: [k, n] of input's dtype, this rank's weight; a transposed view is fine.
        hcom: the communication domain, as torch's ``group.group_name`` or a ProcessGroup.
        world_size: W, the size of the domain.
        reduce_op: "sum".
        bias: [n] of input's dtype, added by every rank before the sum, so that equal ones count W times.
        x1_scale: [m, 1] float32, the factor of each int8 row.
        x2_scale: [1, n] float32, or int64 that carries float32 bits: the factor of each column; given if and only if input is int8.
        comm_turn: 0.
        output_dtype: of the int8 form: torch.float16 or torch.bfloat16 (None: bfloat16); otherwise None.
        comm_mode: None, "ai_cpu" (not with int8) or "aiv"; the result is the same.

    Returns:
        [m / W, n] of input's dtype; in the int8 form float16 if x2_scale is int64, otherwise output_dtype.

    Raises:
        ArgumentError: an argument breaks a rule, here or on another rank; nothing has been sent. All ranks raise the same text.
            Also when the first argument is given under two names, on this rank alone.
        MismatchError: ranks disagree on the operator or on an argument that must be equal.
        GroupError: the group does not exist in this process.
        ExchangeError: a peer died or did not answer in time.
    """
    return call("npu_mm_reduce_scatter_base", locals())  # type: ignore[no-any-return]


def npu_mm_all_reduce_base(
    x1: Tensor,
    x2: Tensor,
    hcom: str | torch.distributed.ProcessGroup,
    *,
    reduce_op: str = "sum",
    bias: Tensor | None = None,
    antiquant_scale: Tensor | None = None,
    antiquant_offset: Tensor | None = None,
    x3: Tensor | None = None,
    dequant_scale: Tensor | None = None,
    pertoken_scale: Tensor | None = None,
    comm_quant_scale_1: Tensor | None = None,
    comm_quant_scale_2: Tensor | None = None,
    antiquant_group_size: int = 0,
    comm_turn: int = 0,
) -> Tensor:
    """Sum ``x1 @ x2 + bias + x3`` over the ranks; every rank gets the whole sum.

    Letters: k inner width (may differ between ranks), n output width. Every rank of the domain calls it, in the same order of calls.
    Products and the sum, in ascending order of rank, are float32 and rounded once. Three forms:

    * x1 and x2 of one floating dtype.
    * x1 floating, x2 int8: x2 stands for ``(x2 + antiquant_offset) * antiquant_scale``.
    * x1 and x2 int8: ``(x1 @ x2 + bias) * dequant_scale * pertoken_scale``, the product and bias in int32.

    Args:
        x1: [m, k] or [b, s, k] bfloat16, float16, int8 or (portable rules) float32; leading dimensions equal on all ranks.
        x2: [k, n], this rank's weight, of x1's dtype or int8; a transposed view is fine.
        hcom: the communication domain, as torch's ``group.group_name`` or a ProcessGroup.
        reduce_op: "sum".
        bias: [n] of x1's dtype (int32 if x1 is int8), added by every rank, so that equal ones count once per rank.
        antiquant_scale: [1], [n] or [1, n] floating; with antiquant_group_size: [ceil(k / antiquant_group_size), n].
        antiquant_offset: shaped likewise; None means 0.
        x3: of the output's shape and dtype, added by every rank.
        dequant_scale: [1], [n] or [1, n], floating, or int64 that carries float32 bits; given if and only if x1 is int8.
        pertoken_scale: [rows of x1, leading dimensions flattened] float32; only with dequant_scale.
        comm_quant_scale_1: [n] or [1, n] of the output's dtype; accepted and not needed: it lowers the precision on a device.
        comm_quant_scale_2: likewise; both or none.
        antiquant_group_size: rows of x2 that share a row of antiquant_scale; 0: all of them.
        comm_turn: 0.

    Returns:
        [m, n] or [b, s, n] of x1's dtype; if that is int8, bfloat16 if dequant_scale is, otherwise float16.

    Raises:
        ArgumentError: an argument breaks a rule, here or on another rank; nothing has been sent. All ranks raise the same text.
        MismatchError: ranks disagree on the operator or on an argument that must be equal.
        GroupError: the group does not exist in this process.
        ExchangeError: a peer died or did not answer in time.
    """
    return call("npu_mm_all_reduce_base", locals())  # type: ignore[no-any-return]


def _npu_distribute_barrier(
    x_ref: Tensor,
    group: str | torch.distributed.ProcessGroup,
    world_size: int,
    *,
    time_out: Tensor | None = None,
    elastic_info: Tensor | None = None,
) -> Tensor:
    """Return ``x_ref``'s values once every rank of the domain has called.

    Args:
        x_ref: any tensor, of any shape on each rank; it gives the call its place among the operations around it.
        group: the communication domain, as torch's ``group.group_name`` or a ProcessGroup.
        world_size: the size of the domain.
        time_out: accepted and not needed: ``COMMFUSE_TIMEOUT`` bounds every wait.
        elastic_info: [4 + 2 * world_size] int32, the ranks that are left after shrinking, as in `npu_moe_distribute_dispatch_v2`;
            only they are waited for.

    Returns:
        A new tensor with the shape, dtype and values of x_ref.

    Raises:
        ArgumentError: an argument breaks a rule, here or on another rank. All ranks raise the same text.
        MismatchError: ranks disagree on the operator or on an argument that must be equal.
        GroupError: the group does not exist in this process.
        ExchangeError: a peer died or did not answer in time.
    """
    return call("_npu_distribute_barrier", locals())  # type: ignore[no-any-return]
