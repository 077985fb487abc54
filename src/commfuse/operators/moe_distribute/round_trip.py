"""One configuration of dispatch, experts and combine, and its seeded inputs.

Every rank makes its own inputs, without communication: the same case and the same rank always give the same
tensors. Whatever an operator must not read is poison: pairs that the mask leaves out have ids far outside the
range and NaN weights, tokens that it leaves out have NaN rows, and the rows of the expert outputs behind the
valid ones are NaN.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

GARBAGE_IDS = (-1, 2**31 - 1, -(2**31), 12_345_678)


@dataclass(frozen=True, kw_only=True)
class RoundTrip:
    """One configuration of dispatch v2, experts, combine v2. Fields are named as the arguments are.

    `id`: lower-case words joined by hyphens.
    `num_tokens`: BS of every EP rank; both TP indices of an EP rank have the same.
    `mask`: None, "1d" (a random number of leading tokens), "2d" (random pairs), "1d-false", "2d-false"
    (nothing). `routing`: "uniform", "one-expert" (every token goes to experts 0 .. K-1), "zipf" (expert j has
    weight 1/(j+1)), "special" (only zero, copy and const experts; needs K of them). `values`: "normal",
    "extreme" (rows of zeros, of tiny and of large numbers among others), "nonfinite" (also NaN and infinity).
    `global_bs`: "zero", "max" (largest BS * W) or "spare" (more than that). `alive`: `ep_rank_id`s of the
    living ranks in the order of their new ids, or None when nobody is missing; `alive_shared_rank_num` is
    then the number of shared-expert ranks among them. `elastic_flag_zero`: `elastic_info` is given, but says
    that nothing has changed.
    """

    id: str
    seed: int = 0
    world_size: int = 4
    tp_world_size: Literal[0, 1, 2] = 0
    num_tokens: tuple[int, ...] = (5, 5, 5, 5)
    hidden: int = 24
    top_k: int = 3
    moe_expert_num: int = 8
    shared_expert_num: int = 1
    shared_expert_rank_num: int = 0
    zero_expert_num: int = 0
    copy_expert_num: int = 0
    const_expert_num: int = 0
    dtype: torch.dtype = torch.bfloat16
    quant_mode: Literal[0, 2] = 0
    smooth: bool = False
    mask: Literal["1d", "2d", "1d-false", "2d-false"] | None = None
    routing: Literal["uniform", "one-expert", "zipf", "special"] = "uniform"
    values: Literal["normal", "extreme", "nonfinite"] = "normal"
    expert_token_nums_type: Literal[0, 1] = 1
    comm_alg: str = ""
    comm_quant_mode: Literal[0, 2] = 0
    with_expert_scales: bool = False
    shared_expert_x: Literal[2, 3] | None = None
    alpha: Literal["1d", "2d"] = "1d"
    alive: tuple[int, ...] | None = None
    alive_shared_rank_num: int = 0
    elastic_flag_zero: bool = False
    non_contiguous: bool = False
    with_performance_info: bool = False
    global_bs: Literal["zero", "max", "spare"] = "zero"

    def calls(self) -> list[tuple[int, int]]:
        """`(tp_rank_id, ep_rank_id)` of every rank that calls the operators."""
        ep_ranks = self.alive if self.alive is not None else range(self.world_size)
        return [(tp_rank, ep_rank) for tp_rank in range(self._tp_size) for ep_rank in sorted(ep_ranks)]

    def dispatch_args(self, ep_rank_id: int, tp_rank_id: int = 0) -> dict[str, Any]:
        """Every argument of dispatch v2 but `group_ep` and `group_tp`."""
        smooth = self._smooth_factors() if self.smooth else None
        weights = self._laid_out(self._weights(ep_rank_id, tp_rank_id))
        return {
            "x": self._laid_out(self._tokens(ep_rank_id, tp_rank_id)),
            "expert_ids": self._laid_out(self._expert_ids(ep_rank_id, tp_rank_id)),
            "scales": smooth,
            "expert_scales": weights if self.with_expert_scales else None,
            "quant_mode": self.quant_mode,
            "expert_token_nums_type": self.expert_token_nums_type,
            "comm_alg": self.comm_alg,
            **self._common_args(ep_rank_id, tp_rank_id),
        }

    def experts(
        self,
        ep_rank_id: int,
        expand_x: Tensor,
        dynamic_scales: Tensor,
        expert_token_nums: Tensor,
        total: int,
        tp_rank_id: int = 0,
    ) -> Tensor:
        """Stand-in for the experts: outputs shaped like `expand_x` (rows, H), in the row dtype of the case.

        `total` is the number of valid rows (see `total_rows`). Int8 rows are turned back with
        `dynamic_scales`; the rows of MoE expert j are multiplied by (j+1)/4, those of shared expert s by
        -(s+1)/8, and on TP index 1 by another 3. The rows behind `total` are neither read nor zero: they are
        NaN.
        """
        y = torch.full(expand_x.shape, math.nan, dtype=self.dtype)
        rows = expand_x[:total].to(self._work_dtype)
        if self.quant_mode:
            rows = rows * dynamic_scales[:total].unsqueeze(1).to(self._work_dtype)
        factors = self._expert_factors(ep_rank_id, expert_token_nums, total) * (3 if tp_rank_id else 1)
        y[:total] = (rows * factors.unsqueeze(1).to(self._work_dtype)).to(self.dtype)
        return y

    def total_rows(self, ep_rank_id: int, dispatch_outputs: Sequence[Any]) -> int:
        """Valid rows of `expand_x`, the TP partner's included, by the counts that dispatch returned."""
        counts, tp_counts = dispatch_outputs[4], dispatch_outputs[5]
        if self.tp_world_size == 2:
            return int(tp_counts.sum())
        return int(counts[self._living * self._local_experts(ep_rank_id) - 1])

    def combine_args(self, ep_rank_id: int, tp_rank_id: int, dispatch_outputs: Sequence[Any], y: Tensor) -> dict[str, Any]:
        """Every argument of combine v2 but `group_ep` and `group_tp`, from what dispatch and experts gave."""
        _, _, assist_info, _, recv_counts, tp_counts, expand_scales = dispatch_outputs
        where = ep_rank_id, tp_rank_id
        return {
            "expand_x": self._laid_out(y),
            "expert_ids": self._laid_out(self._expert_ids(*where)),
            "assist_info_for_combine": assist_info,
            "ep_send_counts": recv_counts,
            "expert_scales": self._laid_out(self._weights(*where)),
            "tp_send_counts": tp_counts,
            "expand_scales": expand_scales,
            "shared_expert_x": self._shared_rows(*where),
            **self._special_expert_args(*where),
            "comm_quant_mode": self.comm_quant_mode,
            # The published combine knows no fullmesh_v1 and fullmesh_v2; its default goes with them.
            "comm_alg": self.comm_alg if self.comm_alg in ("fullmesh", "hierarchy") else "",
            **self._common_args(*where),
        }

    # --- sizes
    # -----------------------------------------------------------------------------------------------------

    @property
    def _tp_size(self) -> int:
        return max(self.tp_world_size, 1)

    @property
    def _living(self) -> int:
        return self.world_size if self.alive is None else len(self.alive)

    @property
    def _shared_ranks(self) -> int:
        return self.shared_expert_rank_num if self.alive is None else self.alive_shared_rank_num

    @property
    def _experts_per_rank(self) -> int:
        return self.moe_expert_num // (self.world_size - self.shared_expert_rank_num)

    @property
    def living_expert_num(self) -> int:
        """MoE experts on the living ranks."""
        return self._experts_per_rank * (self._living - self._shared_ranks)

    @property
    def _special_experts(self) -> int:
        return self.zero_expert_num + self.copy_expert_num + self.const_expert_num

    @property
    def _work_dtype(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def _local_id(self, ep_rank_id: int) -> int:
        return ep_rank_id if self.alive is None else self.alive.index(ep_rank_id)

    def _local_experts(self, ep_rank_id: int) -> int:
        return 1 if self._local_id(ep_rank_id) < self._shared_ranks else self._experts_per_rank

    def _expert_factors(self, ep_rank_id: int, expert_token_nums: Tensor, total: int) -> Tensor:
        """Factor (total,) of every row."""
        rank = self._local_id(ep_rank_id)
        if rank < self._shared_ranks:
            replicas = self._shared_ranks // self.shared_expert_num
            return torch.full((total,), -(rank // replicas + 1) / 8)
        nums = expert_token_nums[: self._experts_per_rank]
        ends = nums if self.expert_token_nums_type == 0 else nums.cumsum(0)
        first = (rank - self._shared_ranks) * self._experts_per_rank
        local = torch.bucketize(torch.arange(total), ends.contiguous(), right=True)
        return (first + local + 1) / 4

    # --- tensors
    # ---------------------------------------------------------------------------------------------------

    def _generator(self, what: str, ep_rank_id: int = 0, tp_rank_id: int = 0) -> torch.Generator:
        number = self.seed
        for part in (zlib.crc32(what.encode()), ep_rank_id, tp_rank_id):
            number = number * 1009 + part
        return torch.Generator().manual_seed(number)

    def _laid_out(self, tensor: Tensor) -> Tensor:
        """The same values, with gaps of poison between the elements when the case asks for it."""
        if not self.non_contiguous:
            return tensor
        poison = math.nan if tensor.is_floating_point() else 99
        wide = torch.full((*tensor.shape[:-1], 2 * tensor.size(-1)), poison).to(tensor.dtype)
        wide[..., ::2] = tensor
        return wide[..., ::2]

    def _tokens(self, ep_rank_id: int, tp_rank_id: int) -> Tensor:
        num_tokens = self.num_tokens[ep_rank_id]
        generator = self._generator("x", ep_rank_id, tp_rank_id)
        x = torch.randn(num_tokens, self.hidden, generator=generator)
        if self.values != "normal":
            x *= _extremes(num_tokens, self.dtype, offset=ep_rank_id)
        x = x.to(self.dtype)
        if self.values == "nonfinite":
            x[ep_rank_id % 3 :: 3, -1] = math.nan
            x[(ep_rank_id + 1) % 3 :: 3, 0] = math.inf
        x[~self._participates(ep_rank_id, tp_rank_id).any(dim=1)] = math.nan
        return x

    def _expert_ids(self, ep_rank_id: int, tp_rank_id: int) -> Tensor:
        num_tokens = self.num_tokens[ep_rank_id]
        generator = self._generator("ids", ep_rank_id, tp_rank_id)
        living = range(self.living_expert_num)
        special = range(self.moe_expert_num, self.moe_expert_num + self._special_experts)
        ids = torch.tensor([*special] if self.routing == "special" else [*living, *special])
        if self.routing == "one-expert":
            chosen = torch.arange(self.top_k).expand(num_tokens, -1)
        else:
            weights = 1 / torch.arange(1, len(ids) + 1) if self.routing == "zipf" else torch.ones(len(ids))
            keys = torch.rand(num_tokens, len(ids), generator=generator).log() / weights
            chosen = keys.argsort(dim=1, descending=True)[:, : self.top_k]
        garbage = torch.tensor(GARBAGE_IDS)[torch.randint(len(GARBAGE_IDS), (num_tokens, self.top_k), generator=generator)]
        active = self._participates(ep_rank_id, tp_rank_id)
        return torch.where(active, ids[chosen], garbage).to(torch.int32)

    def _weights(self, ep_rank_id: int, tp_rank_id: int) -> Tensor:
        generator = self._generator("weights", ep_rank_id, tp_rank_id)
        weights = torch.rand(self.num_tokens[ep_rank_id], self.top_k, generator=generator) * 2 - 0.5
        return torch.where(self._participates(ep_rank_id, tp_rank_id), weights, math.nan)

    def _mask(self, ep_rank_id: int, tp_rank_id: int) -> Tensor | None:
        num_tokens = self.num_tokens[ep_rank_id]
        generator = self._generator("mask", ep_rank_id, tp_rank_id)
        if self.mask is None:
            return None
        if self.mask == "2d":
            return torch.rand(num_tokens, self.top_k, generator=generator) < 0.6
        if self.mask == "1d":
            return torch.arange(num_tokens) < torch.randint(num_tokens + 1, (), generator=generator)
        shape = (num_tokens,) if self.mask == "1d-false" else (num_tokens, self.top_k)
        return torch.zeros(shape, dtype=torch.bool)

    def _participates(self, ep_rank_id: int, tp_rank_id: int) -> Tensor:
        mask = self._mask(ep_rank_id, tp_rank_id)
        shape = self.num_tokens[ep_rank_id], self.top_k
        if mask is None:
            return torch.ones(shape, dtype=torch.bool)
        return mask if mask.dim() == 2 else mask.unsqueeze(1).expand(shape)

    def _smooth_factors(self) -> Tensor:
        """(E_s + M, H) float32, the same on every rank."""
        shared = self.shared_expert_num if self.shared_expert_rank_num else 0
        generator = self._generator("smooth")
        return torch.rand(shared + self.moe_expert_num, self.hidden, generator=generator) * 1.5 + 0.25

    def _shared_rows(self, ep_rank_id: int, tp_rank_id: int) -> Tensor | None:
        if self.shared_expert_x is None:
            return None
        num_tokens = self.num_tokens[ep_rank_id]
        generator = self._generator("shared", ep_rank_id, tp_rank_id)
        rows = torch.randn(num_tokens, self.hidden, generator=generator).to(self.dtype)
        rows[~self._participates(ep_rank_id, tp_rank_id).any(dim=1)] = math.nan
        if self.shared_expert_x == 3:
            outer = 2 if num_tokens % 2 == 0 else 1
            rows = rows.reshape(outer, num_tokens // outer, self.hidden)
        return self._laid_out(rows)

    def _special_expert_args(self, ep_rank_id: int, tp_rank_id: int) -> dict[str, Tensor | None]:
        names = ("ori_x", "const_expert_alpha_1", "const_expert_alpha_2", "const_expert_v")
        args: dict[str, Tensor | None] = dict.fromkeys(names)
        if self.copy_expert_num or self.const_expert_num:
            args["ori_x"] = self._laid_out(self._tokens(ep_rank_id, tp_rank_id))
        if self.const_expert_num:
            whole = (self.const_expert_num, self.hidden)
            alpha = whole if self.alpha == "2d" else whole[:1]
            for name, shape in zip(names[1:], (alpha, alpha, whole), strict=True):
                values = torch.randn(shape, generator=self._generator(name)).to(self.dtype)
                args[name] = self._laid_out(values)
        return args

    def _common_args(self, ep_rank_id: int, tp_rank_id: int) -> dict[str, Any]:
        mask = self._mask(ep_rank_id, tp_rank_id)
        timings = torch.zeros(self.world_size, dtype=torch.int64) if self.with_performance_info else None
        return {
            "ep_world_size": self.world_size,
            "ep_rank_id": ep_rank_id,
            "moe_expert_num": self.moe_expert_num,
            "x_active_mask": None if mask is None else self._laid_out(mask),
            "elastic_info": self._elastic_info(),
            "performance_info": timings,
            "tp_world_size": self.tp_world_size,
            "tp_rank_id": tp_rank_id,
            "expert_shard_type": 0,
            "shared_expert_num": self.shared_expert_num,
            "shared_expert_rank_num": self.shared_expert_rank_num,
            "global_bs": self._global_bs(),
            "zero_expert_num": self.zero_expert_num,
            "copy_expert_num": self.copy_expert_num,
            "const_expert_num": self.const_expert_num,
        }

    def _global_bs(self) -> int:
        spare = {"zero": -max(self.num_tokens), "max": 0, "spare": 2}[self.global_bs]
        return (max(self.num_tokens) + spare) * self.world_size

    def _elastic_info(self) -> Tensor | None:
        """Int32 (4 + 2W,), or None."""
        if self.alive is None and not self.elastic_flag_zero:
            return None
        info = torch.full((4 + 2 * self.world_size,), -1, dtype=torch.int32)
        info[0] = 0
        if self.alive is not None:
            info[:4] = torch.tensor([1, self._living, self._shared_ranks, self.living_expert_num])
            for local, physical in enumerate(self.alive):
                info[4 + physical] = local
                info[4 + self.world_size + local] = physical
        return info


def _extremes(num_tokens: int, dtype: torch.dtype, offset: int) -> Tensor:
    """Factors (num_tokens, 1): ordinary, zero, subnormal, tiny and large rows in turn, from `offset` on."""
    info = torch.finfo(dtype)
    # 1e-37 is near the limit below which 127 / max overflows in float32, and 0 in fp16.
    factors = torch.tensor([1.0, 0.0, info.tiny / 16, 1e-37, info.max / 512])
    turn = (torch.arange(num_tokens) + offset) % len(factors)
    return factors.to(torch.float32)[turn].unsqueeze(1)
