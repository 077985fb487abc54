"""Going on after a rank has died: who is left, the table that leaves the others out, and starting afresh."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist

from . import backends, groups
from .errors import ArgumentError

_Domain = str | dist.ProcessGroup
_MOST = 2**31 - 1


def alive(group: _Domain) -> tuple[int, ...]:
    """Return the ranks of ``group`` that live, ascending: the same on all of them. Every living rank calls it, like a collective.

    The backend must be ``cpu``: it needs neither the dead nor the store. A rank that dies while the others ask may still be named.

    Raises:
        BackendError: the group runs on a backend that cannot go on without a rank; says what to do instead.
        ExchangeError: a living rank did not call it within ``COMMFUSE_TIMEOUT``.
        GroupError: there is no such group.
    """
    members = groups.resolve(group)
    return backends.of(members).survivors(members)


def reset(group: _Domain) -> None:
    """Make ``group`` usable again after an error that has given it up. Every rank of it calls it, like a collective.

    What was under way is forgotten: setups without their teardown, tensors lent. Rows that a rank has received stay its own.

    Raises:
        BackendError: the backend cannot; make a new group.
        ExchangeError: a rank has died (leave it out with ``elastic_info`` instead) or did not call it within ``COMMFUSE_TIMEOUT``.
        GroupError: there is no such group.
    """
    members = groups.resolve(group)
    backends.of(members).reset(members)


def elastic_info(
    group: _Domain,
    alive: Iterable[int],
    *,
    moe_expert_num: int,
    shared_expert_num: int = 1,
    shared_expert_rank_num: int = 0,
    shared_ranks: Sequence[int] | None = None,
) -> torch.Tensor:
    """Return the ``elastic_info`` with which ranks ``alive`` of ``group`` go on without the others.

    Every MoE rank keeps its number of experts, so ids must be below that number times the MoE ranks left (entry 3 of the result).

    Args:
        group: the expert-parallel domain, W ranks.
        alive: the ranks that are left, in any order; the same on all of them (see `alive`).
        moe_expert_num: M, as in the operators' calls: the number before anything died.
        shared_expert_num: as in the operators' calls.
        shared_expert_rank_num: as in the operators' calls.
        shared_ranks: which of the living ranks hold shared experts from now on, in the order of their new ids; a multiple of
            shared_expert_num. Default: the shared-expert ranks that live, as many as make a multiple, and where none does, the first MoE
            ranks in their place.

    Returns:
        int32 [4 + 2W]: flag 1, ranks alive, shared-expert ranks, MoE experts left, the new id of each rank or -1, the rank of each new
        id or -1.

    Raises:
        ArgumentError: these ranks cannot go on; lists every reason.
        GroupError: there is no such group.
    """
    world = groups.resolve(group).size
    living = sorted(alive)
    found = _wrong_ranks("alive", living, range(world), f"ranks of the group, 0..{world - 1}")
    found += _wrong_sizes(world, moe_expert_num, shared_expert_num, shared_expert_rank_num)
    _refuse(found)
    moe_ranks = world - shared_expert_rank_num
    experts = shared_expert_num if shared_expert_rank_num else 0
    shared = _shared(living, experts, shared_expert_rank_num) if shared_ranks is None else list(shared_ranks)
    if shared_ranks is not None:
        found += _wrong_ranks("shared_ranks", shared, living, f"among the living ranks {living}")
        if len(shared) % max(experts, 1) or (shared and not experts):
            found.append(f"shared_ranks = {shared}: must be as many as a multiple of the {experts} shared experts in effect")
    if len(shared) >= len(living):
        found.append(f"alive = {living}: must leave a MoE rank beside {len(shared)} for shared experts")
    _refuse(found)
    order = [*shared, *(rank for rank in living if rank not in shared)]
    left = moe_expert_num // moe_ranks * (len(living) - len(shared))
    new_ids = [order.index(rank) if rank in order else -1 for rank in range(world)]
    gone = [-1] * (world - len(order))
    return torch.tensor([1, len(order), len(shared), left, *new_ids, *order, *gone], dtype=torch.int32)


def _wrong_sizes(world: int, moe_experts: int, shared_experts: int, shared_ranks: int) -> list[str]:
    if not 0 <= shared_ranks < world:
        return [f"shared_expert_rank_num = {shared_ranks}: must be in 0..{world - 1}, below the ranks of the group"]
    found = []
    if not 0 < moe_experts <= _MOST or moe_experts % (world - shared_ranks):
        found.append(
            f"moe_expert_num = {moe_experts}: must be a positive multiple of the {world - shared_ranks} MoE ranks, in int32"
        )
    if shared_ranks and (shared_experts < 1 or shared_ranks % shared_experts):
        found.append(
            f"shared_expert_rank_num = {shared_ranks}: must be a multiple of shared_expert_num = {shared_experts}, at least 1"
        )
    return found


def _shared(living: Sequence[int], experts: int, shared_ranks: int) -> list[int]:
    """Return who holds shared experts: those who did, as many as serve all experts equally."""
    if not experts:
        return []
    still = [rank for rank in living if rank < shared_ranks]
    enough = len(still) // experts * experts
    return still[:enough] if enough else list(living[:experts])


def _wrong_ranks(name: str, ranks: Sequence[int], allowed: Iterable[int], words: str) -> list[str]:
    if not ranks or len(set(ranks)) != len(ranks) or not set(ranks) <= set(allowed):
        return [f"{name} = {list(ranks)}: must be one or more different {words}"]
    return []


def _refuse(found: Sequence[str]) -> None:
    if any(found):
        raise ArgumentError("\n  ".join(["elastic_info: refused:", *(text for text in found if text)]))
