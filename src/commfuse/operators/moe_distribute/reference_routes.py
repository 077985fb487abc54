"""Who sends which row to whom: the part that every golden of the MoE operators shares.

Letters, as in the published pages:

    W    ranks of the expert-parallel group          R_s  ranks that hold shared experts (EP ranks 0 .. R_s-1)
    M    MoE experts                                 E_s  shared experts (0 when R_s is 0)
    e    MoE experts per MoE rank: M / (W - R_s)     g    ranks that replicate one shared expert: R_s / E_s
    BS   tokens of a rank,  K experts per token,  H hidden size
    A    rows of `expand_x`,  L  local experts of a rank

Ranks are numbered by their id inside the living group. Without `elastic_info` that is `ep_rank_id`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Args = dict[str, Any]

# Arguments that have to be the same on every rank that takes part.
_AGREED = (
    "ep_world_size", "moe_expert_num", "tp_world_size", "shared_expert_num", "shared_expert_rank_num",
    "global_bs", "quant_mode", "comm_quant_mode", "zero_expert_num", "copy_expert_num", "const_expert_num",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Roles:
    """What each living rank holds. `physical[r]` is the `ep_rank_id` of rank `r`."""

    physical: tuple[int, ...]
    shared_rank_num: int
    shared_num: int
    expert_num: int  # MoE experts that are alive
    first_special: int  # ids from here on are zero, copy and const experts

    @property
    def world_size(self) -> int:
        """Living ranks."""
        return len(self.physical)

    @property
    def experts_per_rank(self) -> int:
        """Experts on each MoE rank, e."""
        return self.expert_num // (self.world_size - self.shared_rank_num)

    def local_experts(self, rank: int) -> int:
        """Number of experts on `rank`: 1 on a shared-expert rank."""
        return 1 if rank < self.shared_rank_num else self.experts_per_rank

    def home(self, expert: int) -> tuple[int, int]:
        """Rank and local expert that hold MoE expert `expert`."""
        return self.shared_rank_num + expert // self.experts_per_rank, expert % self.experts_per_rank

    def shared_home(self, source: int, shared_expert: int) -> int:
        """Rank that serves `shared_expert` to the tokens of rank `source`."""
        replicas = self.shared_rank_num // self.shared_num
        return shared_expert * replicas + source % replicas


@dataclass(frozen=True, order=True, kw_only=True)
class Row:
    """One copy of a token. The order of the fields is the order of the rows on the receiver."""

    expert: int  # local expert on the receiver
    source: int
    token: int
    slot: int  # k for a MoE expert, K + s for shared expert s


# The rows of one source rank, each with its receiver, in the order (shared experts, then flat pairs).
Sends = Callable[[Args, int, Roles], list[tuple[int, Row]]]


def roles_of(args: Args) -> Roles:
    """The roles that one rank's arguments describe. Raises ValueError when they cannot be derived."""
    world_size = int(args["ep_world_size"])
    shared_ranks = int(args["shared_expert_rank_num"])
    experts = int(args["moe_expert_num"])
    roles = Roles(
        physical=tuple(range(world_size)),
        shared_rank_num=shared_ranks,
        shared_num=int(args["shared_expert_num"]) if shared_ranks else 0,
        expert_num=experts,
        first_special=experts,
    )
    elastic = args.get("elastic_info")
    return roles if elastic is None or int(elastic[0]) == 0 else _shrunk(roles, elastic.tolist())


def _shrunk(roles: Roles, elastic: list[int]) -> Roles:
    _, alive, shared_ranks, experts = elastic[:4]
    table1 = elastic[4 : 4 + roles.world_size]
    table2 = elastic[4 + roles.world_size : 4 + roles.world_size + alive]
    if [table1[physical] for physical in table2] != list(range(alive)):
        raise ValueError(f"elastic_info: Table1 {table1} and Table2 {table2} are not inverse to each other.")
    if (shared_ranks > 0) != (roles.shared_num > 0) or (shared_ranks and shared_ranks % roles.shared_num):
        raise ValueError(f"elastic_info: {shared_ranks} shared-expert ranks cannot hold {roles.shared_num} shared experts.")
    if experts != roles.experts_per_rank * (alive - shared_ranks):
        raise ValueError(
            f"elastic_info: {experts} MoE experts on {alive - shared_ranks} ranks, but every rank holds {roles.experts_per_rank}."
        )
    if experts > roles.first_special:
        raise ValueError(
            f"elastic_info: {experts} MoE experts, but the ids from moe_expert_num = {roles.first_special} on "
            "are special experts."
        )
    return Roles(
        physical=tuple(table2),
        shared_rank_num=shared_ranks,
        shared_num=roles.shared_num,
        expert_num=experts,
        first_special=roles.first_special,
    )


def domains(ranks: Sequence[Args]) -> tuple[Roles, dict[int, list[Args]]]:
    """The roles, and for each TP index the calls of its EP group in rank order.

    Raises ValueError when the calls disagree or when a living rank is missing.
    """
    roles = roles_of(ranks[0])
    _check_agreement(ranks)
    groups: dict[int, list[Args]] = {}
    for args in ranks:
        groups.setdefault(tp_index(args), []).append(args)
    if sorted(groups) != list(range(2 if has_tp(ranks[0]) else 1)):
        raise ValueError(f"The calls of the TP indices {sorted(groups)} are not a whole TP group.")
    for tp_rank, calls in groups.items():
        present = sorted(int(args["ep_rank_id"]) for args in calls)
        if present != sorted(roles.physical):
            raise ValueError(f"TP index {tp_rank}: EP ranks {present} call, but {sorted(roles.physical)} are alive.")
        calls.sort(key=lambda args: roles.physical.index(int(args["ep_rank_id"])))
    return roles, groups


def has_tp(args: Args) -> bool:
    """Whether the rank shares its rows with a tensor-parallel partner."""
    return int(args.get("tp_world_size", 0)) == 2


def tp_index(args: Args) -> int:
    """Which of the EP groups the call belongs to: 0, or with a TP partner 0 or 1."""
    return int(args["tp_rank_id"]) if has_tp(args) else 0


def _check_agreement(ranks: Sequence[Args]) -> None:
    for name in _AGREED:
        if len(values := {args[name] for args in ranks if name in args}) > 1:
            raise ValueError(f"The ranks disagree on {name}: {sorted(values)}.")
    elastic = {None if args.get("elastic_info") is None else tuple(args["elastic_info"].tolist()) for args in ranks}
    if len(elastic) > 1:
        raise ValueError("The ranks disagree on elastic_info.")
    sizes = {args["expert_ids"].size(0) for args in ranks}
    if not ranks[0]["global_bs"] and len(sizes) > 1:
        raise ValueError(f"global_bs is 0, but the ranks have unequal batch sizes {sorted(sizes)}.")
    if len(top_k := {args["expert_ids"].size(1) for args in ranks}) > 1:
        raise ValueError(f"The ranks disagree on K: {sorted(top_k)}.")


def global_batch(args: Args) -> int:
    """`global_bs`, or BS * W when it is 0."""
    return int(args["global_bs"]) or args["expert_ids"].size(0) * int(args["ep_world_size"])


def buffer_sizes(args: Args) -> tuple[int, int]:
    """`(A, L)` of the rank: rows that are reserved in `expand_x`, and local experts.

    With `elastic_info` (whatever its flag) a rank may take either role, so both roles have to fit.
    """
    world_size, shared_ranks = int(args["ep_world_size"]), int(args["shared_expert_rank_num"])
    experts = int(args["moe_expert_num"]) // (world_size - shared_ranks)
    batch = global_batch(args)
    moe_rows = batch * min(experts, args["expert_ids"].size(1))
    if shared_ranks == 0:
        return moe_rows, experts
    replicas = shared_ranks // int(args["shared_expert_num"])
    shared_rows = batch // world_size * -(-world_size // replicas)
    if args.get("elastic_info") is not None:
        return max(shared_rows, moe_rows), experts
    return (shared_rows, 1) if int(args["ep_rank_id"]) < shared_ranks else (moe_rows, experts)


def participation(args: Args) -> Tensor:
    """Bool (BS, K): the pairs that take part. A 1-D `x_active_mask` counts, a 2-D one selects."""
    ids: Tensor = args["expert_ids"]
    mask: Tensor | None = args.get("x_active_mask")
    if mask is None:
        return torch.ones(ids.shape, dtype=torch.bool)
    if mask.dim() == 2:
        return mask
    return (torch.arange(ids.size(0)) < int(mask.sum())).unsqueeze(1).expand(ids.shape)


def active_pairs(args: Args, roles: Roles) -> Iterable[tuple[int, int, int]]:
    """`(token, k, expert id)` of the pairs that take part, in flat order. Other ids are never read.

    Raises ValueError for an id that no living expert and no special expert has.
    """
    specials = sum(int(args.get(f"{kind}_expert_num", 0)) for kind in ("zero", "copy", "const"))
    for token, k in participation(args).nonzero().tolist():
        expert = int(args["expert_ids"][token, k])
        if not (0 <= expert < roles.expert_num or 0 <= expert - roles.first_special < specials):
            raise ValueError(
                f"EP rank {args['ep_rank_id']}: expert_ids[{token}, {k}] = {expert}, but the experts are "
                f"0 .. {roles.expert_num - 1} and {specials} special ones from {roles.first_special} on."
            )
        yield token, k, expert


def moe_sends(args: Args, source: int, roles: Roles) -> list[tuple[int, Row]]:
    """The copies that the MoE experts get. A special expert gets none."""
    sends = []
    for token, k, expert in active_pairs(args, roles):
        if expert < roles.first_special:
            receiver, local_expert = roles.home(expert)
            sends.append((receiver, Row(expert=local_expert, source=source, token=token, slot=k)))
    return sends


def all_sends(args: Args, source: int, roles: Roles) -> list[tuple[int, Row]]:
    """One copy of every participating token for each shared expert, then the MoE copies."""
    top_k = args["expert_ids"].size(1)
    tokens = participation(args).any(dim=1).nonzero().flatten().tolist()
    shared = [
        (roles.shared_home(source, s), Row(expert=0, source=source, token=token, slot=top_k + s))
        for s in range(roles.shared_num)
        for token in tokens
    ]
    return shared + moe_sends(args, source, roles)


def routes(calls: Sequence[Args], roles: Roles, sends: Sends = all_sends) -> list[list[Row]]:
    """The rows of every receiver, in the order in which it holds them."""
    received: list[list[Row]] = [[] for _ in calls]
    for source, args in enumerate(calls):
        for receiver, row in sends(args, source, roles):
            received[receiver].append(row)
    return [sorted(rows) for rows in received]


def running_counts(rows: Sequence[Row], world_size: int, local_experts: int) -> Tensor:
    """Int32 (L*W,): inclusive running sum of the rows by (local expert, source rank). It does not restart."""
    counts = torch.zeros(local_experts * world_size, dtype=torch.int64)
    for row in rows:
        counts[row.expert * world_size + row.source] += 1
    return counts.cumsum(0).to(torch.int32)


def expand_idx(args: Args, roles: Roles) -> Tensor:
    """Int32 (BS*K,), the index of the v1 operators.

    For a flat pair: how many earlier pairs of this rank have the same expert id. Pairs that are masked out or
    that name a special expert have 0 and are not counted.
    """
    index = torch.zeros(args["expert_ids"].shape, dtype=torch.int32)
    seen: dict[int, int] = {}
    for token, k, expert in active_pairs(args, roles):
        if expert < roles.first_special:
            index[token, k] = seen.get(expert, 0)
            seen[expert] = seen.get(expert, 0) + 1
    return index.flatten()


def padded(values: Tensor, length: int, what: str) -> tuple[Tensor, int]:
    """`values` followed by zeros up to `length` entries, and the number of entries that count."""
    if values.size(0) > length:
        raise ValueError(f"{what} needs {values.size(0)} entries, but global_bs and the batch reserve {length}.")
    whole = torch.zeros((length, *values.shape[1:]), dtype=values.dtype)
    whole[: values.size(0)] = values
    return whole, values.size(0)
