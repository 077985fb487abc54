"""The way back of the rows: how combine finds, checks and takes what the experts made of its tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .reference_routes import Args, Roles, Row, Sends, all_sends, domains, has_tp, tp_index
from .reference_rows import over_the_wire, working_dtype

# The rows that came back to one rank, by (token, slot): each (H,) in the row dtype.
Returned = dict[tuple[int, int], Tensor]


def gather_back(
    ranks: list[Args],
    *,
    sends: Sends = all_sends,
    counts: str = "ep_send_counts",
    assist: str = "assist_info_for_combine",
    by_index: bool = False,
    tp_round: Callable[[Tensor, torch.dtype], Tensor] = Tensor.to,
) -> list[Returned]:
    """The rows that come back to every rank, in the order of `ranks`.

    `counts` and `assist` name the arguments that hold the running counts and the opaque tensor. The latter is
    checked: the sender's triplet of every row, or (`by_index`) the owner's index of every MoE pair.
    `tp_round` rounds the sum of the two TP partners' rows.
    """
    roles, groups = domains(ranks)
    senders = {
        tp: [
            _sender(args, groups[1 - tp][rank] if has_tp(args) else None, roles, rank, counts, tp_round)
            for rank, args in enumerate(calls)
        ]
        for tp, calls in groups.items()
    }
    results = []
    for args in ranks:
        rank = roles.physical.index(int(args["ep_rank_id"]))
        found = _locate(args, rank, roles, senders[tp_index(args)], sends)
        for copy in found:
            if by_index:
                _check_index(args, assist, copy)
            else:
                _check_triplet(assist, copy)
        results.append({(copy.row.token, copy.row.slot): copy.sender.rows[copy.place] for copy in found})
    return results


@dataclass(frozen=True, kw_only=True)
class Sender:
    """What one expert rank offers to combine. n rows."""

    args: Args
    world_size: int
    rows: Tensor  # (n, H), as they arrive at the owners
    ends: list[int]  # running counts by (local expert, source rank)

    def block(self, row: Row) -> int:
        """Index in `ends` of the expert and the source of `row`."""
        return row.expert * self.world_size + row.source

    def start(self, row: Row) -> int:
        """Index of the first row that this rank holds for the expert and the source of `row`."""
        return self.ends[self.block(row) - 1] if self.block(row) else 0


def _sender(
    args: Args,
    partner: Args | None,
    roles: Roles,
    rank: int,
    counts: str,
    tp_round: Callable[[Tensor, torch.dtype], Tensor],
) -> Sender:
    length = roles.world_size * roles.local_experts(rank)
    ends = args[counts][:length].tolist()
    if len(ends) < length or args["expand_x"].size(0) < ends[-1]:
        raise ValueError(
            f"EP rank {args['ep_rank_id']}: {counts} needs {length} entries and has {len(ends)}; "
            f"they announce {ends[-1:]} rows and expand_x has {args['expand_x'].size(0)}."
        )
    rows = args["expand_x"][: ends[-1]]
    if partner is not None:
        work = working_dtype(rows.dtype)
        rows = tp_round(rows.to(work) + _partner_copy(args, partner, ends[-1]).to(work), rows.dtype)
    if args["comm_quant_mode"] == 2:
        rows = over_the_wire(rows)
    return Sender(args=args, world_size=roles.world_size, rows=rows, ends=ends)


def _partner_copy(args: Args, partner: Args, num_rows: int) -> Tensor:
    """The TP partner's results for this rank's `num_rows` rows: they lie behind the partner's own."""
    tp_rank = int(args["tp_rank_id"])
    mine, theirs = args["tp_send_counts"].tolist(), partner["tp_send_counts"].tolist()
    if mine != theirs or mine[tp_rank] != num_rows:
        raise ValueError(
            f"EP rank {args['ep_rank_id']}, TP index {tp_rank}: tp_send_counts {mine} here, "
            f"{theirs} at the partner, {num_rows} own rows."
        )
    first = mine[1 - tp_rank]
    copies: Tensor = partner["expand_x"][first : first + num_rows]
    return copies


@dataclass(frozen=True, kw_only=True)
class Found:
    """A copy that an owner sent, and where it lies: row `place` of `sender`."""

    row: Row
    sender: Sender
    place: int


def _locate(owner: Args, rank: int, roles: Roles, senders: list[Sender], sends: Sends) -> list[Found]:
    """Every copy that `owner` sent, found by the counts of the senders and by its own ids and mask."""
    before: Counter[tuple[int, int]] = Counter()
    found = []
    for receiver, row in sends(owner, rank, roles):
        sender = senders[receiver]
        block = sender.block(row)
        place = sender.start(row) + before[receiver, block]
        before[receiver, block] += 1
        if place >= sender.ends[block]:
            raise ValueError(
                f"EP rank {owner['ep_rank_id']} asks for more rows of local expert {row.expert} on EP rank "
                f"{sender.args['ep_rank_id']} than that rank counts: ids or mask changed since dispatch."
            )
        found.append(Found(row=row, sender=sender, place=place))
    return found


def _check_triplet(assist: str, copy: Found) -> None:
    held = copy.sender.args[assist][3 * copy.place : 3 * copy.place + 3].tolist()
    expected = [copy.row.source, copy.row.token, copy.row.slot]
    if held != expected:
        raise ValueError(
            f"{assist} of EP rank {copy.sender.args['ep_rank_id']} says {held} for row {copy.place}, but the "
            f"counts, the ids and the mask say {expected}: altered, or not from this dispatch."
        )


def _check_index(owner: Args, assist: str, copy: Found) -> None:
    top_k, token, slot = owner["expert_ids"].size(1), copy.row.token, copy.row.slot
    expected = copy.place - copy.sender.start(copy.row)
    if slot < top_k and (held := int(owner[assist][token * top_k + slot])) != expected:
        raise ValueError(
            f"{assist} of EP rank {owner['ep_rank_id']} says {held} for token {token}, k {slot}, but the ids "
            f"and the mask say {expected}: altered, or not from this dispatch."
        )
