"""Goldens of grouped matmul fused with AlltoAllV: the published formulas, for all ranks at once.

Legend: `W` ranks; `e` experts per rank; `A` rows that a rank sends; `BSK` rows that it receives; `H1`, `N1`
widths of a routed row before and after the matmul; `BS`, `H2`, `N2` sizes of the shared expert's matmul.

Both count lists have `W * e` entries, and entry `peer * e + l` always means local expert `l` of the rank that
*holds* the expert. For `gmm_alltoallv` that is the sender, for `alltoallv_gmm` the receiver. In both, what
rank `i` says it sends to rank `j` is what rank `j` says it receives from rank `i`:

    send_counts of i [j * e + l] == recv_counts of j [i * e + l]

No argument tells a rank's number, so the order of `ranks` does: `ranks[r]` holds the arguments of group rank
`r`. Count tensors (`send_counts_tensor`, `recv_counts_tensor`), the group name and `comm_mode` are not read.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

Arguments = dict[str, Any]
Output = tuple[Tensor | None, int]
Counts = list[list[int]]  # one rank's counts, [peer][local expert]


def gmm_alltoallv(ranks: list[Arguments]) -> list[list[Output]]:
    """Matmul of every expert's rows, then each row goes to the rank it is meant for.

    `gmm_x` `[A, H1]`: this rank's rows ordered by (local expert, destination rank).
    `gmm_weight` `[e, H1, N1]`, or `[e, N1, H1]` with `trans_gmm_weight`, in the dtype of `gmm_x`.
    `mm_x` `[BS, H2]` and `mm_weight` `[H2, N2]`, or `[N2, H2]` with `trans_mm_weight`: both or none.

    Returns per rank `y` `[BSK, N1]`, ordered by (source rank, the source's local expert), which is ascending
    global expert id, and `mm_y` `[BS, N2]` or None. Products are accumulated in float32 (float64 for float64
    rows) and rounded once, before they travel. Raises ValueError when ranks disagree on experts, counts,
    dtype or row width.
    """
    counts = _agreed_send_counts(ranks)
    _check_same(ranks, "width of an output row (N1)", [_expert_weights(rank).size(2) for rank in ranks])
    products = [_products(rank, sent) for rank, sent in zip(ranks, counts, strict=True)]
    results = []
    for destination, rank in enumerate(ranks):
        arrived = [by_destination[destination] for by_expert in products for by_destination in by_expert]
        results.append([_whole(torch.cat(arrived)), _shared_expert(rank)])
    return results


def alltoallv_gmm(ranks: list[Arguments]) -> list[list[Output]]:
    """Each row goes to the rank that holds its expert, then the matmul of every expert's rows.

    `gmm_x` `[A, H1]`: this rank's rows ordered by (destination rank, the destination's local expert), which
    is ascending global expert id. The other arguments are those of `gmm_alltoallv`.

    Returns per rank `gmm_y` `[BSK, N1]`, ordered by (local expert, source rank); `mm_y` `[BS, N2]` or None;
    and `permute_out` `[BSK, H1]`, the received rows in the order of `gmm_y`, or None without
    `permute_out_flag`. Rounding and errors are those of `gmm_alltoallv`.
    """
    counts = _agreed_send_counts(ranks)
    _check_same(ranks, "width of an input row (H1)", [rank["gmm_x"].size(1) for rank in ranks])
    blocks = [_blocks_by_destination(rank, sent) for rank, sent in zip(ranks, counts, strict=True)]
    results = []
    for destination, rank in enumerate(ranks):
        weights = _expert_weights(rank)
        groups = [torch.cat([sent[destination][expert] for sent in blocks]) for expert in range(weights.size(0))]
        gmm_y = torch.cat([_matmul(rows, weights[expert]) for expert, rows in enumerate(groups)])
        permuted = _whole(torch.cat(groups)) if rank["permute_out_flag"] else (None, 0)
        results.append([_whole(gmm_y), _shared_expert(rank), permuted])
    return results


def _products(rank: Arguments, sent: Counts) -> list[list[Tensor]]:
    """The rows of `gmm_x` times their expert's weight, cut into blocks [local expert][destination rank]."""
    weights = _expert_weights(rank)
    num_experts = weights.size(0)
    group_sizes = [sum(to_peer[expert] for to_peer in sent) for expert in range(num_experts)]
    gmm_x: Tensor = rank["gmm_x"]
    groups = torch.split(gmm_x, group_sizes)
    return [
        list(torch.split(_matmul(groups[expert], weights[expert]), [to_peer[expert] for to_peer in sent]))
        for expert in range(num_experts)
    ]


def _blocks_by_destination(rank: Arguments, sent: Counts) -> list[list[Tensor]]:
    """The rows of `gmm_x`, cut into blocks [destination rank][the destination's local expert]."""
    gmm_x: Tensor = rank["gmm_x"]
    for_peers = torch.split(gmm_x, [sum(to_peer) for to_peer in sent])
    return [list(torch.split(rows, to_peer)) for rows, to_peer in zip(for_peers, sent, strict=True)]


def _expert_weights(rank: Arguments) -> Tensor:
    """`[e, H1, N1]`, however the weights are stored."""
    weight: Tensor = rank["gmm_weight"]
    return weight.transpose(1, 2) if rank["trans_gmm_weight"] else weight


def _shared_expert(rank: Arguments) -> Output:
    """`mm_x @ mm_weight`, computed where it is: nothing of it travels."""
    mm_x, mm_weight = rank["mm_x"], rank["mm_weight"]
    if mm_x is None and mm_weight is None:
        return None, 0
    if mm_x is None or mm_weight is None:
        raise ValueError("mm_x and mm_weight must be given together")
    return _whole(_matmul(mm_x, mm_weight.t() if rank["trans_mm_weight"] else mm_weight))


def _matmul(x: Tensor, weight: Tensor) -> Tensor:
    """`x @ weight`, accumulated in float32 (float64 for float64) and rounded once to the dtype of `x`."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return torch.matmul(x.to(wide), weight.to(wide)).to(x.dtype)


def _whole(tensor: Tensor) -> Output:
    return tensor, tensor.size(0)


def _agreed_send_counts(ranks: list[Arguments]) -> list[Counts]:
    """`send_counts` of all ranks as [rank][peer][local expert], once `recv_counts` are known to agree."""
    _check_sizes(ranks)
    send = [_counts(rank, "send_counts") for rank in ranks]
    recv = [_counts(rank, "recv_counts") for rank in ranks]
    for i, rank in enumerate(ranks):
        rows, total = rank["gmm_x"].size(0), sum(map(sum, send[i]))
        if rows != total:
            raise ValueError(f"rank {i}: gmm_x has {rows} rows, but its send_counts add up to {total}")
        for j in range(len(ranks)):
            if send[i][j] != recv[j][i]:
                raise ValueError(f"rank {i} sends {send[i][j]} rows per expert to rank {j}, which expects {recv[j][i]}")
    return send


def _check_sizes(ranks: list[Arguments]) -> None:
    for i, rank in enumerate(ranks):
        if rank["ep_world_size"] != len(ranks):
            raise ValueError(f"rank {i}: ep_world_size is {rank['ep_world_size']}, but {len(ranks)} ranks take part")
        width, expected = rank["gmm_x"].size(1), _expert_weights(rank).size(1)
        if width != expected:
            raise ValueError(f"rank {i}: rows of gmm_x have width {width}, gmm_weight takes {expected}")
    _check_same(ranks, "number of experts (e)", [rank["gmm_weight"].size(0) for rank in ranks])
    _check_same(ranks, "dtype of gmm_x", [rank["gmm_x"].dtype for rank in ranks])


def _counts(rank: Arguments, name: str) -> Counts:
    """One count argument (any sequence of integers, 1-D array or CPU tensor) as [peer][local expert]."""
    entries: Iterable[Any] = rank[name]
    flat = [int(count) for count in entries]
    world_size, num_experts = int(rank["ep_world_size"]), rank["gmm_weight"].size(0)
    if len(flat) != world_size * num_experts:
        raise ValueError(f"{name} has {len(flat)} entries, not e * ep_world_size = {num_experts} * {world_size}")
    if min(flat) < 0:
        raise ValueError(f"{name} holds a negative count: {min(flat)}")
    return [flat[peer * num_experts : (peer + 1) * num_experts] for peer in range(world_size)]


def _check_same(ranks: list[Arguments], what: str, values: list[Any]) -> None:
    for i in range(len(ranks)):
        if values[i] != values[0]:
            raise ValueError(f"the {what} differs between ranks: {values[0]} on rank 0, {values[i]} on rank {i}")
