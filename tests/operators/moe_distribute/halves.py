"""One micro-batch on its way through the four halves, and the same through the one-shot operators."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

import commfuse
from commfuse.operators.moe_distribute.cases import RoundTrip
from tests.operators.moe_distribute import companions
from tests.operators.moe_distribute.round_trips import experts

Args = dict[str, Any]
HALVES = ("dispatch_setup", "dispatch_teardown", "combine_setup", "combine_teardown")


def world() -> str:
    """The name of the group of all processes."""
    return str(dist.group.WORLD.group_name)


class MicroBatch:
    """A case on this rank: ``args`` and ``results`` of each half, by its name; each call prepares the arguments of the next."""

    def __init__(self, rank: int, case: RoundTrip) -> None:
        self.case, self.rank = case, rank
        setup, teardown = companions.split_args(case, rank)
        self.args: dict[str, Args] = {"dispatch_setup": setup, "dispatch_teardown": teardown}
        self.results: dict[str, tuple[torch.Tensor, ...]] = {}

    def call(self, half: str, **changes: Any) -> tuple[torch.Tensor, ...]:
        """Make one of the four calls, with some arguments changed."""
        args = {"group_ep": world(), **self.args[half], **changes}
        results = getattr(commfuse, f"npu_moe_distribute_{half}")(**args)
        self.results[half] = results if isinstance(results, tuple) else (results,)
        self._prepare_next(half)
        return self.results[half]

    def call_all(self, first: str = HALVES[0], last: str = HALVES[3]) -> torch.Tensor:
        """Make the calls from one half to another; return the first result of the last."""
        for half in HALVES[HALVES.index(first) : HALVES.index(last) + 1]:
            self.call(half)
        return self.results[last][0]

    def _prepare_next(self, half: str) -> None:
        results = self.results[half]
        if half == "dispatch_setup":
            self.args["dispatch_teardown"] |= {"y": results[0], "comm_cmd_info": results[2]}
        elif half == "dispatch_teardown":
            rows, scales, assist, nums = results
            made = experts(self.case, self.rank, 0, [rows, scales, assist, nums, assist, None, None])
            index = self.results["dispatch_setup"][1]
            back, total = companions.split_back(self.case, self.rank, index, list(results), made)
            self.args |= {"combine_setup": back, "combine_teardown": total}
        elif half == "combine_setup":
            self.args["combine_teardown"] |= {"quant_expand_x": results[0], "comm_cmd_info": results[1]}


def one_shot(rank: int, case: RoundTrip) -> tuple[Any, torch.Tensor]:
    """What dispatch_v2 and combine_v2 return for the case."""
    out = commfuse.npu_moe_distribute_dispatch_v2(**case.dispatch_args(rank), group_ep=world())
    back = case.combine_args(rank, 0, out, experts(case, rank, 0, out))
    return out, commfuse.npu_moe_distribute_combine_v2(**back, group_ep=world())


def same_bits(got: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether two tensors have one shape, dtype and content, bit for bit; one NaN is as good as another."""
    if (got.shape, got.dtype) != (expected.shape, expected.dtype):
        return False
    if not got.numel():
        return True
    if got.is_floating_point():
        if not torch.equal(got.isnan(), expected.isnan()):
            return False
        got, expected = (torch.where(one.isnan(), torch.zeros_like(one), one) for one in (got, expected))
    return got.contiguous().view(torch.uint8).equal(expected.contiguous().view(torch.uint8))
