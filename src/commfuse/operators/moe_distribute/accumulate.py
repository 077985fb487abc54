"""The sum at the end of combine: float32, k ascending, multiply then add, one rounding."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ... import config
from . import plan, values

if TYPE_CHECKING:
    from ...call import Call
from ...observe.ranges import phase


@phase("sum")
def float32_sum(call: Call, rows: torch.Tensor, sent: plan.Routes) -> torch.Tensor:
    """Return the sums [BS, H] before the final rounding; ``rows`` are the returned rows in the order of ``sent``.

    Tokens that take no part get zeros.
    """
    active = values.active(call)
    acc = torch.zeros((call["BS"], call["H"]), dtype=torch.float32)
    token, slot = torch.from_numpy(sent.token), torch.from_numpy(sent.slot)
    weights = call["expert_scales"].reshape(call["BS"], call["K"])  # the split path also takes them flat
    expert_ids = torch.from_numpy(values.ids(call))
    taking_part = torch.from_numpy(active)
    for k in range(call["K"]):
        here = slot == k
        tokens = token[here]
        acc[tokens] += rows[here].float() * weights[tokens, k : k + 1]
        _add_special(call, acc, expert_ids[:, k], taking_part[:, k], weights[:, k : k + 1])
    for s in range(call["E_s"]):
        here = slot == call["K"] + s
        acc[token[here]] += rows[here].float()
    if call["shared_expert_x"] is not None:
        whole = torch.from_numpy(active.any(1))
        acc[whole] += call["shared_expert_x"].reshape(acc.shape)[whole].float()
    return acc


def _add_special(call: Call, acc: torch.Tensor, ids: torch.Tensor, active: torch.Tensor, weights: torch.Tensor) -> None:
    """Add what copy and constant experts contribute; zero experts contribute nothing."""
    first_copy = call["moe_expert_num"] + call["zero_expert_num"]
    first_const = first_copy + call["copy_expert_num"]
    copied = active & (ids >= first_copy) & (ids < first_const)
    if copied.any():
        acc[copied] += call["ori_x"][copied].float() * weights[copied]
    const = active & (ids >= first_const)
    if const.any():
        acc[const] += const_rows(call, const, ids[const] - first_const) * weights[const]


def const_rows(call: Call, tokens: torch.Tensor, which: torch.Tensor) -> torch.Tensor:
    """Return float32 rows of the constant experts ``which`` for ``tokens`` of ori_x."""
    x: torch.Tensor = call["ori_x"][tokens].float()
    v: torch.Tensor = call["const_expert_v"][which].float()
    alpha_1, alpha_2 = call["const_expert_alpha_1"][which].float(), call["const_expert_alpha_2"][which].float()
    if alpha_1.dim() == 1:
        alpha_1, alpha_2 = alpha_1[:, None], alpha_2[:, None]
    elif config.get("const_expert") == "softmax":
        alpha_1, alpha_2 = _gate(alpha_1, alpha_2, x)
    rows: torch.Tensor = alpha_1 * x + alpha_2 * v
    return rows


def _gate(alpha_1: torch.Tensor, alpha_2: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the softmax of the two dot products with x, computed in float64 and rounded once."""
    wide = x.double()
    dots = torch.stack([(alpha.double() * wide).sum(1) for alpha in (alpha_1, alpha_2)], 1)
    weights = torch.softmax(dots, 1).float()
    return weights[:, :1], weights[:, 1:]


def add_rms_norm(call: Call, total: torch.Tensor, outputs: dict[str, torch.Tensor]) -> None:
    """Fill y, rstd and x from the sums [BS, H]; rows of tokens that take no part are zeros in all three.

    The mean of the squares is summed in float64, which is nearest to every order of summation.
    """
    dtype, hidden = call["expand_x"].dtype, call["H"]
    z = total[:, None] + call["residual_x"].float()
    squares = z * z * torch.tensor(1.0 / hidden, dtype=torch.float32)
    rstd = 1.0 / torch.sqrt(squares.sum(2, keepdim=True, dtype=torch.float64).float() + call["norm_eps"])
    normal = (z * rstd).to(dtype)
    active = torch.from_numpy(values.active(call).any(1))[:, None, None]
    outputs["y"].copy_(torch.where(active, (normal.float() * call["gamma"].float()).to(dtype), 0))
    outputs["rstd"].copy_(torch.where(active, rstd, 0))
    outputs["x"].copy_(torch.where(active, z.to(dtype), 0))
