"""The comparison at the end of the demo: every token of the ranks against one process, and the bound it has to keep."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .layer import Layer
from .one_process import Exact, Whole
from .rank import Report

HALF_STEP = 2.0**-8  # bfloat16 keeps 8 significant bits: rounding moves a number by at most this part of it
FLOAT32_SUMS = 2.0**-16  # room for the float32 sums of 7168 products, as a part of the row's largest element

BOUND = (
    "per element 2^-8 x (sum of |terms| + |result|): every expert's row and the result are rounded once to bfloat16, which keeps "
    "8 bits; plus 2^-16 of the token's largest sum of |terms|: sums in float32"
)
INT8_BOUND = (
    "per token 2 x step / sqrt(12) / RMS of its row, with step = max|row| / 127: what rounding to int8 errs by, on gate and up; "
    "plus 2^-7 for the roundings to bfloat16"
)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The largest difference of an element, where it is, and the element that comes closest to its bound."""

    largest: float
    rank: int
    token: int
    column: int
    bound_there: float
    closest: float  # |difference| / bound, the largest of all
    tokens_within: int


@dataclass(frozen=True, kw_only=True)
class Int8Cost:
    """What int8 rows change, per token: the L2 norm of the change as a part of the token's norm."""

    largest: float
    bound_there: float
    closest: float
    tokens_within: int


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether the ranks did what one process does."""

    tokens: int
    other_choice: int  # tokens for which the router chose other experts
    difference: Difference
    int8: Int8Cost | None

    @property
    def passed(self) -> bool:
        """Every token within every bound."""
        held = [self.difference.tokens_within] + ([self.int8.tokens_within] if self.int8 else [])
        return self.other_choice == 0 and all(count == self.tokens for count in held)


def judge(layer: Layer, reports: Sequence[Report], whole: Whole) -> Verdict:
    """Compare what the ranks reported with the layer in one process."""
    out = torch.cat([report.out for report in reports]).double()
    ids = torch.cat([report.expert_ids for report in reports])
    other = (ids.sort(1).values != whole.expert_ids.sort(1).values).any(1)
    return Verdict(
        tokens=layer.all_tokens,
        other_choice=int(other.sum()),
        difference=_difference(layer, out, whole.as_sent),
        int8=None if whole.unquantised is None else _int8_cost(out, whole.x, whole.unquantised),
    )


def bound(exact: Exact) -> torch.Tensor:
    """Return the bound of each element, see `BOUND`."""
    rounded_rows = HALF_STEP * exact.size
    rounded_sum = HALF_STEP * (exact.out.abs() + rounded_rows)
    return rounded_rows + rounded_sum + FLOAT32_SUMS * exact.size.amax(1, keepdim=True)


def int8_bound(x: torch.Tensor) -> torch.Tensor:
    """Return the bound of each token's relative change, see `INT8_BOUND`."""
    step = x.abs().amax(1) / 127
    return 2 * step / math.sqrt(12) / x.square().mean(1).sqrt() + 2**-7


def _difference(layer: Layer, out: torch.Tensor, exact: Exact) -> Difference:
    far, allowed = (out - exact.out).abs(), bound(exact)
    part = torch.nan_to_num(far / allowed, nan=math.inf)
    place = int(torch.nan_to_num(far, nan=math.inf).argmax())
    token, column = divmod(place, out.shape[1])
    return Difference(
        largest=float(far[token, column]),
        rank=token // layer.tokens,
        token=token % layer.tokens,
        column=column,
        bound_there=float(allowed[token, column]),
        closest=float(part.max()),
        tokens_within=int((part <= 1).all(1).sum()),
    )


def _int8_cost(out: torch.Tensor, x: torch.Tensor, exact: Exact) -> Int8Cost:
    changed = (out - exact.out).norm(dim=1) / exact.out.norm(dim=1)
    allowed = int8_bound(x)
    part = torch.nan_to_num(changed / allowed, nan=math.inf)
    token = int(torch.nan_to_num(changed, nan=math.inf).argmax())
    return Int8Cost(
        largest=float(changed[token]),
        bound_there=float(allowed[token]),
        closest=float(part.max()),
        tokens_within=int((part <= 1).sum()),
    )
