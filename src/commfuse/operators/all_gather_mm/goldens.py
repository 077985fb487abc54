"""The goldens as the reference backend calls them: with the argument names of the schema."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from . import reference

if TYPE_CHECKING:
    from ...call import Call

Results = list[list[tuple[torch.Tensor | None, int]]]


def all_gather_base_mm(ranks: list[dict[str, Any]], call: Call) -> Results:
    """See `reference.all_gather_base_mm`."""
    return reference.all_gather_base_mm([schema_names(args) for args in ranks])


def mm_reduce_scatter_base(ranks: list[dict[str, Any]], call: Call) -> Results:
    """See `reference.mm_reduce_scatter_base`."""
    return reference.mm_reduce_scatter_base([schema_names(args) for args in ranks])


def mm_all_reduce_base(ranks: list[dict[str, Any]], call: Call) -> Results:
    """See `reference.mm_all_reduce_base`."""
    return reference.mm_all_reduce_base(ranks)


def distribute_barrier(ranks: list[dict[str, Any]], call: Call) -> Results:
    """See `reference.distribute_barrier`; only the ranks that take part are counted."""
    return reference.distribute_barrier([{**args, "world_size": len(ranks)} for args in ranks])


def schema_names(args: dict[str, Any]) -> dict[str, Any]:
    """Return ``args`` with the first argument under its schema name."""
    return {"self" if name == "input" else name: value for name, value in args.items()}
