"""The goldens as the reference backend calls them: with what the call's configuration says."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ... import config
from . import reference

if TYPE_CHECKING:
    from ...call import Call

Results = list[list[tuple[torch.Tensor | None, int]]]


def dispatch_v2(ranks: list[dict[str, Any]], call: Call) -> Results:
    """See `reference.dispatch_v2`."""
    return reference.dispatch_v2(ranks, product=call.product)


def combine_v2(ranks: list[dict[str, Any]], call: Call) -> Results:
    """See `reference.combine_v2`."""
    return reference.combine_v2(ranks, product=call.product, const_expert=config.get("const_expert"))
