"""Grouped matmul and AlltoAllV over the exchanges of a group: the portable way, and the pure parts that every way shares."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from ...agreement import verdict
from .. import orders
from ..products import product

if TYPE_CHECKING:
    from ...call import Call
    from ...groups import Group

Outputs = tuple[torch.Tensor | None, ...]


def negative_counts(call: Call) -> list[str]:
    """Return the counts that are below zero."""
    return [
        f"{name}[{i}] = {count}: must be at least 0"
        for name in ("send_counts", "recv_counts")
        for i, count in enumerate(call[name])
        if count < 0
    ]


def gmm_alltoallv(call: Call, members: Group, waited_us: list[float]) -> Outputs:
    """Carry out npu_gmm_alltoallv: products by local expert, then to the ranks they are for."""
    send, receive = _agreed_counts(call, members)
    made = call.outputs()
    products = grouped_product(call, call["gmm_x"], send.sum(0), made["y"].new_empty((call["A"], call["N1"])))
    to_peers = products[torch.from_numpy(orders.by_peer(send))]
    members.exchange(to_peers.split(orders.per_peer(send)), made["y"].split(orders.per_peer(receive)))
    return (made["y"], shared_product(call, made.get("mm_y")))


def alltoallv_gmm(call: Call, members: Group, waited_us: list[float]) -> Outputs:
    """Carry out npu_alltoallv_gmm: rows to the ranks of their experts, then products by local expert."""
    send, receive = _agreed_counts(call, members)
    made = call.outputs()
    came = made["gmm_y"].new_empty((call["BSK"], call["H1"]))
    to_peers = call["gmm_x"].contiguous().split(orders.per_peer(send))
    members.exchange(to_peers, came.split(orders.per_peer(receive)))
    order = torch.from_numpy(orders.by_expert(receive))
    permuted = torch.index_select(came, 0, order, out=made.get("permute_out"))
    grouped_product(call, permuted, receive.sum(0), made["gmm_y"])
    return (made["gmm_y"], shared_product(call, made.get("mm_y")), made.get("permute_out"))


def grouped_product(call: Call, rows: torch.Tensor, group_sizes: orders.Ints, out: torch.Tensor) -> torch.Tensor:
    """Write each local expert's ``rows`` (one group after the other) times its weight into ``out``."""
    weights = call["gmm_weight"].mT if call["trans_gmm_weight"] else call["gmm_weight"]
    sizes = group_sizes.tolist()
    for mine, weight, result in zip(rows.split(sizes), weights, out.split(sizes), strict=True):
        if len(mine):
            product(mine, weight, result)
    return out


def shared_product(call: Call, out: torch.Tensor | None) -> torch.Tensor | None:
    """Return the shared expert's product, which is local, in ``out``; None if it is not asked for."""
    if out is None:
        return None
    return product(call["mm_x"], call["mm_weight"].mT if call["trans_mm_weight"] else call["mm_weight"], out)


def own_counts(call: Call) -> orders.Ints:
    """Return what this rank sends and what it receives, [send or receive, peer, expert]."""
    shape = (call["ep_world_size"], call["e"])
    return np.array((call["send_counts"], call["recv_counts"]), dtype=np.int64).reshape(2, *shape)


def check_counts(call: Call, members: Group, everyone: orders.Ints) -> None:
    """Raise ArgumentError on every rank unless every rank sends what its peers expect.

    ``everyone``: `own_counts` of all members, [rank, send or receive, peer, expert], the same on every rank: where all is well, every
    rank sees that for itself.
    """
    sent, expected = everyone[:, 0], everyone[:, 1].swapaxes(0, 1)  # [from, to, expert]
    if (sent != expected).any():
        verdict(call, members, _wrong_counts(everyone, members.index))


def _agreed_counts(call: Call, members: Group) -> tuple[orders.Ints, orders.Ints]:
    """Return what this rank sends and receives, [peer, expert], once all ranks' counts are known to match."""
    mine = own_counts(call)
    check_counts(call, members, members.gather(torch.from_numpy(mine)).numpy())
    return mine[0], mine[1]


def _wrong_counts(everyone: orders.Ints, me: int) -> str:
    wrong = np.argwhere(everyone[me, 0] != everyone[:, 1, me])
    if not len(wrong):
        return ""
    peer, expert = (int(i) for i in wrong[0])
    experts = everyone.shape[3]
    return (
        f"send_counts[{peer * experts + expert}] = {everyone[me, 0, peer, expert]} on rank {me}: must equal "
        f"recv_counts[{me * experts + expert}] = {everyone[peer, 1, me, expert]} on rank {peer}"
    )
