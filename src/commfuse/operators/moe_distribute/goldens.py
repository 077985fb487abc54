"""The goldens as the reference backend calls them: with what the call's configuration says."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ... import config
from . import reference, reference_split, reference_v1

if TYPE_CHECKING:
    from ...call import Call

Results = list[list[tuple[torch.Tensor | None, int]]]


def dispatch_v2(ranks: list[dict[str, Any]], call: Call) -> Results:
    """See `reference.dispatch_v2`."""
    return reference.dispatch_v2(ranks, product=call.product)


def combine_v2(ranks: list[dict[str, Any]], call: Call) -> Results:
    """See `reference.combine_v2`."""
    return reference.combine_v2(ranks, product=call.product, const_expert=config.get("const_expert"))


def dispatch(ranks: list[dict[str, Any]], call: Call) -> Results:
    """See `reference_v1.dispatch`."""
    return reference_v1.dispatch(ranks)


def combine(ranks: list[dict[str, Any]], call: Call) -> Results:
    """See `reference_v1.combine`."""
    return reference_v1.combine(ranks)


def combine_add_rms_norm(ranks: list[dict[str, Any]], call: Call) -> Results:
    """See `reference.combine_add_rms_norm`."""
    return reference.combine_add_rms_norm(ranks, product=call.product, const_expert=config.get("const_expert"))


def split_dispatch(ranks: list[dict[str, Any]], call: Call) -> Results:
    """See `reference_split.split_dispatch`; without expand_idx, which the setup returned."""
    return [outputs[1:] for outputs in reference_split.split_dispatch(ranks)]


def split_combine(ranks: list[dict[str, Any]], call: Call) -> Results:
    """See `reference_split.split_combine`."""
    return reference_split.split_combine([{**args, "expert_scales": _by_token(args)} for args in ranks])


def _by_token(args: dict[str, Any]) -> torch.Tensor:
    """expert_scales [BS, K], which callers may also give flat."""
    weights: torch.Tensor = args["expert_scales"]
    return weights.view(args["expert_ids"].shape)


def nothing(ranks: list[dict[str, Any]], call: Call) -> Results:
    """The setups have no golden of their own: theirs is that of setup and teardown together."""
    raise NotImplementedError(f"{call.operator.name} is judged together with its teardown")
