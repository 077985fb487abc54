"""What dispatch hands to combine, and setups to teardowns, altered on the way: the calls of the fuzzing tests, on their ranks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

import commfuse
from commfuse.operators.moe_distribute.cases import RoundTrip
from tests.operators.moe_distribute.halves import MicroBatch, same_bits, world
from tests.operators.moe_distribute.round_trips import experts

TIMEOUT = 10.0  # seconds; a rank that is left waiting reads an ExchangeError, which is no right answer
CASES = {
    1: RoundTrip(id="alone", world_size=1, num_tokens=(3,), hidden=8, moe_expert_num=4, top_k=2),
    2: RoundTrip(id="pair", world_size=2, num_tokens=(3, 3), hidden=8, moe_expert_num=4, top_k=2),
}
TENSORS = {
    "combine": ("assist_info_for_combine", "ep_send_counts"),
    "dispatch_teardown": ("comm_cmd_info",),
    "combine_teardown": ("comm_cmd_info", "expand_idx"),
}


@dataclass(frozen=True, kw_only=True)
class Change:
    """Numbers of the tensor ``name`` that are set, or changed by an amount, on the ranks ``who``; and how much longer it gets."""

    name: str
    who: tuple[int, ...]
    numbers: tuple[tuple[int, bool, int], ...] = ()  # place, whether to add, value
    longer: int = 0

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """A changed copy of ``tensor``."""
        bits = torch.iinfo(tensor.dtype).bits
        values = tensor.tolist()
        for place, add, value in self.numbers if values else ():
            at = place % len(values)
            new = values[at] + value if add else value
            values[at] = (new + (1 << bits - 1)) % (1 << bits) - (1 << bits - 1)
        values = values[: self.longer] if self.longer < 0 else [*values, *[7] * self.longer]
        return torch.tensor(values, dtype=tensor.dtype)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What one rank got: the class and text of an error, or whether the result was right; and whether the right call then was."""

    error: str = ""
    text: str = ""
    right: bool = False
    right_afterwards: bool = False


def attempt(rank: int, half: str, size: int, change: Change) -> Answer:
    """Make the call ``half`` with ``change`` on its ranks, then the right one."""
    with commfuse.config.override(timeout=TIMEOUT):
        return _combine(rank, CASES[size], change) if half == "combine" else _teardown(rank, half, CASES[size], change)


_known: dict[str, tuple[dict[str, Any], torch.Tensor]] = {}


def _plain(rank: int, case: RoundTrip) -> tuple[dict[str, Any], torch.Tensor]:
    """The right arguments of combine, and its right result."""
    if case.id not in _known:
        out = commfuse.npu_moe_distribute_dispatch_v2(**case.dispatch_args(rank), group_ep=world())
        args = {**case.combine_args(rank, 0, out, experts(case, rank, 0, out)), "group_ep": world()}
        _known[case.id] = args, commfuse.npu_moe_distribute_combine_v2(**args)
    return _known[case.id]


def _combine(rank: int, case: RoundTrip, change: Change) -> Answer:
    args, expected = _plain(rank, case)
    changed = {**args, change.name: change.of(args[change.name])} if rank in change.who else args
    answer = _try(lambda: commfuse.npu_moe_distribute_combine_v2(**changed), expected)
    again = commfuse.npu_moe_distribute_combine_v2(**args)
    return replace(answer, right_afterwards=same_bits(again, expected))


def _teardown(rank: int, half: str, case: RoundTrip, change: Change) -> Answer:
    """A refused teardown leaves its setup under way for the right one."""
    _, expected = _plain(rank, case)
    batch = MicroBatch(rank, case)
    batch.call_all(last=half.replace("teardown", "setup"))
    mine = {change.name: change.of(batch.args[half][change.name])} if rank in change.who else {}
    answer = _try(lambda: batch.call(half, **mine)[0], None)
    if answer.error:
        batch.call(half)
    if half == "dispatch_teardown":
        batch.call_all("combine_setup")
    right = same_bits(batch.results["combine_teardown"][0], expected)
    return replace(answer, right=right and not answer.error, right_afterwards=right)


def _try(call: Any, expected: torch.Tensor | None) -> Answer:
    try:
        result = call()
    except Exception as error:  # whatever it is, it is what the user reads
        return Answer(error=type(error).__name__, text=str(error))
    return Answer(right=expected is None or same_bits(result, expected))
