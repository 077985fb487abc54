"""Arguments for the goldens, written down by hand: every rank's call with the published defaults filled in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Args = dict[str, Any]
Outputs = list[list[tuple[Tensor | None, int]]]

_COMMON: Args = {
    "x_active_mask": None,
    "elastic_info": None,
    "performance_info": None,
    "tp_world_size": 0,
    "tp_rank_id": 0,
    "expert_shard_type": 0,
    "shared_expert_num": 1,
    "shared_expert_rank_num": 0,
    "global_bs": 0,
    "comm_alg": "",
    "zero_expert_num": 0,
    "copy_expert_num": 0,
    "const_expert_num": 0,
}


def dispatch_calls(x: Sequence[Tensor], ids: Sequence[Any], moe_expert_num: int, masks: Any = None, **changes: Any) -> list[Args]:
    """One dispatch call per EP rank; `ids` and `masks` are nested lists."""
    return [
        {
            **_COMMON,
            "x": x[rank],
            "expert_ids": torch.tensor(ids[rank], dtype=torch.int32),
            "ep_world_size": len(x),
            "ep_rank_id": rank,
            "moe_expert_num": moe_expert_num,
            "scales": None,
            "expert_scales": None,
            "quant_mode": 0,
            "expert_token_nums_type": 1,
            **changes,
            **({} if masks is None else {"x_active_mask": torch.tensor(masks[rank]).bool()}),
        }
        for rank in range(len(x))
    ]


def combine_calls(
    dispatched: list[Args], outputs: Outputs, weights: Sequence[Any], y: Sequence[Tensor] | None = None, **changes: Any
) -> list[Args]:
    """One combine call per dispatch call. `y` are the expert outputs; without it every expert is the identity."""
    calls = []
    for i, (args, results) in enumerate(zip(dispatched, outputs, strict=True)):
        expand_x, _, assist, _, counts, tp_counts, expand_scales = (tensor for tensor, _ in results)
        calls.append(
            {
                **{name: args[name] for name in (*_COMMON, "expert_ids", "ep_world_size", "ep_rank_id", "moe_expert_num")},
                "expand_x": expand_x if y is None else y[i],
                "assist_info_for_combine": assist,
                "ep_send_counts": counts,
                "expert_scales": torch.as_tensor(weights[i], dtype=torch.float32),
                "tp_send_counts": tp_counts,
                "expand_scales": expand_scales,
                "shared_expert_x": None,
                "ori_x": args["x"],
                "const_expert_alpha_1": None,
                "const_expert_alpha_2": None,
                "const_expert_v": None,
                "comm_quant_mode": 0,
                **changes,
            }
        )
    return calls


def tokens(world_size: int, num_tokens: int, hidden: int = 8, dtype: torch.dtype = torch.float16) -> list[Tensor]:
    """x[rank][token, column] = 100 * rank + 10 * token + column."""
    rank, token, column = (torch.arange(n) for n in (world_size, num_tokens, hidden))
    return list((100 * rank[:, None, None] + 10 * token[:, None] + column).to(dtype))


def valid(output: tuple[Tensor | None, int]) -> Tensor:
    """The specified entries of an output."""
    tensor, length = output
    assert tensor is not None
    return tensor[:length]


def column_0(outputs: Outputs) -> list[list[float]]:
    """Per rank, column 0 of the valid rows of the first output."""
    return [valid(results[0])[:, 0].tolist() for results in outputs]


def clones(calls: list[Args]) -> list[Args]:
    """Calls whose tensors can be altered without touching the original ones."""
    return [{name: value.clone() if isinstance(value, Tensor) else value for name, value in args.items()} for args in calls]
