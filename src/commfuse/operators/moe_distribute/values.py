"""What only a look at the data shows to be wrong: ids, the shrinking table, counts handed from dispatch to combine.

Where the C++ core is there, it looks first, at the ids and the counts; only what it does not accept is looked at here, and put in words.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ... import config
from . import plan

if TYPE_CHECKING:
    from ...call import Call

_SHOWN = 3  # findings of one kind that a message spells out


def dispatch(call: Call) -> list[str]:
    """Return every broken rule that the values of a dispatch call show."""
    found = _common(call)
    if config.get("check") and call["quant_mode"] == 2:
        found += _not_finite(call)
    return found


def combine(call: Call) -> list[str]:
    """Return every broken rule that the values of a combine call show."""
    return _common(call) or held_counts(call) or _earlier_pairs(call)


def combine_own_tokens(call: Call) -> list[str]:
    """Return every broken rule that the values of the receiving half of a combine show."""
    return _common(call) or _earlier_pairs(call)


def alive(call: Call) -> tuple[int, ...] | None:
    """Return the ranks of the domain that take part, in the order of their local ids; None for all.

    Of a refused call, too, as far as its table can be believed: ranks that are gone must not be waited for.
    """
    info = call.args.get("elastic_info")
    if info is None:
        return None
    world = call.group.size
    if not isinstance(info, torch.Tensor) or info.shape != (4 + 2 * world,):
        return None
    shrunk = tuple(int(v) for v in info.tolist())
    first = shrunk[4 + world]  # whoever asks, the ranks that are left are the same
    return None if shrunk[0] == 0 or living_table(shrunk, world, first) else shrunk[4 + world :][: shrunk[1]]


def elastic(call: Call) -> tuple[int, ...] | None:
    """Return the content of elastic_info if it is given and its flag is set."""
    info = call.args.get("elastic_info")
    if info is None or int(info[0]) == 0:
        return None
    return tuple(int(v) for v in info.tolist())


def topology(call: Call) -> plan.Topology:
    """Return who takes part in ``call``, which has been checked."""
    shrunk, kept = elastic(call), call.form.kept
    found: plan.Topology | None = kept.get(("topology", shrunk))
    if found is None:
        found = kept["topology", shrunk] = plan.topology(
            call["ep_world_size"], call["shared_expert_rank_num"], call["E_s"], call["moe_expert_num"], shrunk
        )
    return found


def active(call: Call) -> plan.Flags:
    """Return which (token, k) pairs of this rank take part."""
    mask = call["x_active_mask"]
    return plan.active_pairs(call["BS"], call["K"], None if mask is None else mask.cpu().numpy())


def ids(call: Call) -> plan.Ints:
    """Return expert_ids as an int64 array."""
    out: plan.Ints = call["expert_ids"].cpu().numpy().astype(np.int64)
    return out


@cache
def _core() -> Any:
    """The C++ core; None where it is not built."""
    try:
        return importlib.import_module("commfuse._core")
    except ImportError:
        return None


def _common(call: Call) -> list[str]:
    found = _partner(call) if call.partner is not None else []
    if call.args.get("x_active_mask") is not None:
        found += _mask_order(call)
    shrunk = elastic(call)
    table = _table(call, shrunk) if shrunk is not None else []
    return found + table + ([] if table or _ids_accepted(call, shrunk) else _ids(call, shrunk))


def _partner(call: Call) -> list[str]:
    assert call.partner is not None
    found = []
    if call.partner.size != 2:
        found.append(f"group_tp = {call['group_tp']!r} has {call.partner.size} ranks: must have tp_world_size = 2")
    elif call.partner.rank != call["tp_rank_id"]:
        found.append(f"tp_rank_id = {call['tp_rank_id']}: must be this process's rank in group_tp = {call.partner.rank}")
    return found


def _mask_order(call: Call) -> list[str]:
    mask: torch.Tensor = call["x_active_mask"]
    if mask.ndim != 1 or not (config.get("check") or call.product != config.PORTABLE):
        return []
    late = int(mask.sum())
    behind = mask[late:].nonzero()
    if not behind.numel():
        return []
    token = late + int(behind[0])
    return [f"x_active_mask[{token}] = True after a False: must have every True before every False (1-D form)"]


def _table(call: Call, shrunk: tuple[int, ...]) -> list[str]:
    """Check the shrinking table against the call it comes with."""
    found = living_table(shrunk, call["ep_world_size"], call["ep_rank_id"])
    return found or _roles(call, *shrunk[1:4])


def living_table(shrunk: tuple[int, ...], world: int, me: int) -> list[str]:
    """Return what is wrong with the flag, the number of living ranks and the two tables of elastic_info on rank ``me``."""
    flag, living = shrunk[:2]
    to_local, to_rank = shrunk[4 : 4 + world], shrunk[4 + world :]
    name = "elastic_info"
    if flag != 1:
        return [f"{name}[0] = {flag}: must be 0 (not shrunk) or 1"]
    if not 1 <= living <= world:
        return [f"{name}[1] = {living} (ranks alive): must be in 1..{world} (ep_world_size)"]
    if sorted(local for local in to_local if local != -1) != list(range(living)):
        allowed = f"must give each of the {living} living ranks one id of 0..{living - 1}, and -1 to the others"
        return [f"{name}[4:{4 + world}] = {list(to_local)}: {allowed}"]
    for local in range(living):
        if not 0 <= to_rank[local] < world or to_local[to_rank[local]] != local:
            allowed = f"must be {to_local.index(local)}, the rank whose id entries 4..{3 + world} say is {local}"
            return [f"{name}[{4 + world + local}] = {to_rank[local]}: {allowed}"]
    if to_local[me] == -1:
        return [f"{name}[{4 + me}] = -1: this rank (ep_rank_id = {me}) is removed and must not call"]
    return []


def _roles(call: Call, living: int, shared: int, experts: int) -> list[str]:
    shared_experts, per_rank = call["E_s"], call["e"]
    if experts > call["moe_expert_num"]:
        return [f"elastic_info[3] = {experts} (MoE experts): must be at most moe_expert_num = {call['moe_expert_num']}"]
    if shared_experts and (shared < shared_experts or shared % shared_experts):
        return [
            f"elastic_info[2] = {shared} (shared-expert ranks): must be a positive multiple of shared_expert_num = {shared_experts}"
        ]
    if not shared_experts and shared:
        return [f"elastic_info[2] = {shared} (shared-expert ranks): must be 0, as shared_expert_rank_num is"]
    if shared >= living:
        return [f"elastic_info[2] = {shared} (shared-expert ranks): must leave a MoE rank among the {living} living ones"]
    if experts != per_rank * (living - shared):
        return [
            f"elastic_info[3] = {experts} (MoE experts): must be {per_rank} on each of the {living - shared} MoE ranks left "
            f"= {per_rank * (living - shared)}"
        ]
    return []


def _ids_accepted(call: Call, shrunk: tuple[int, ...] | None) -> bool:
    """Whether the core finds nothing wrong with the ids."""
    core, kept = _core(), call.form.kept
    if core is None:
        return False
    check = kept.get(("ids", shrunk))
    if check is None:
        there = call["moe_expert_num"] if shrunk is None else shrunk[3]
        check = kept["ids", shrunk] = core.KeyCheck(call["K"], there, call["moe_expert_num"], call["all_experts"])
    expert_ids = call.args["expert_ids"].contiguous()
    flags, num_active = marked(call)
    fault: int = check.run(expert_ids.data_ptr(), expert_ids.shape[0], num_active, 0 if flags is None else flags.data_ptr(), 0)
    return fault == 0


def marked(call: Call) -> tuple[torch.Tensor | None, int]:
    """Return the marks of the pairs that take part, [BS, K] bool (None: all), and how many tokens from the first on may do so."""
    mask: torch.Tensor | None = call.args.get("x_active_mask")
    if mask is None or mask.ndim == 2:
        return None if mask is None else mask.contiguous(), call["BS"]
    return None, int(mask.sum())


def _ids(call: Call, shrunk: tuple[int, ...] | None) -> list[str]:
    expert_ids, taking_part = ids(call), active(call)
    first_special, end = call["moe_expert_num"], call["all_experts"]
    there = first_special if shrunk is None else shrunk[3]
    known = ((expert_ids >= 0) & (expert_ids < there)) | ((expert_ids >= first_special) & (expert_ids < end))
    allowed = f"in 0..{there - 1} (" + ("moe_expert_num)" if shrunk is None else "elastic_info[3], the experts left)")
    if end > first_special:
        allowed += f" or in {first_special}..{end - 1} (zero, copy and constant experts)"
    wrong = ~known & taking_part
    found = [f"expert_ids[{t}, {k}] = {expert_ids[t, k]}: must be {allowed}" for t, k in _first(wrong)]
    return found + _more(wrong) or _duplicates(expert_ids, taking_part)


def _more(wrong: plan.Flags) -> list[str]:
    """Say how many findings were not spelled out."""
    count = int(wrong.sum()) - _SHOWN
    return [f"... and {count} more of the same kind"] if count > 0 else []


def _duplicates(expert_ids: plan.Ints, taking_part: plan.Flags) -> list[str]:
    masked = np.where(taking_part, expert_ids, -1 - np.arange(expert_ids.shape[1]))
    order = np.argsort(masked, axis=1, kind="stable")
    ordered = np.take_along_axis(masked, order, axis=1)
    again = ordered[:, 1:] == ordered[:, :-1]
    return [
        f"expert_ids[{t}, {order[t, k + 1]}] = {ordered[t, k]}: must differ from expert_ids[{t}, {order[t, k]}] (distinct within a row)"
        for t, k in _first(again)
    ] + _more(again)


def _first(where: plan.Flags) -> list[tuple[int, int]]:
    if not where.any():
        return []
    return [(int(t), int(k)) for t, k in np.argwhere(where)[:_SHOWN]]


def _not_finite(call: Call) -> list[str]:
    taking_part = torch.from_numpy(active(call).any(1)).to(call["x"].device)
    bad = (~torch.isfinite(call["x"]).all(1) & taking_part).nonzero().flatten().tolist()
    return [f"x[{t}]: holds NaN or infinity; must be finite with quant_mode 2 and COMMFUSE_CHECK=1" for t in bad[:_SHOWN]]


def held_counts(call: Call) -> list[str]:
    """Check the counts handed from dispatch to combine against the rows and triplets that are there."""
    if _counts_accepted(call):
        return []
    top = topology(call)
    used = top.world * top.local_experts(top.physical.index(call["ep_rank_id"]))
    name = counts_name(call)
    sums: list[int] = counts(call)[:used].tolist() or [0] * used
    falling = [i for i in range(used) if sums[i] < (sums[i - 1] if i else 0)]
    if falling:
        i = falling[0]
        return [f"{name}[{i}] = {sums[i]}: must be a prefix sum (not below the entry before it), as dispatch returned it"]
    own, rows = sums[-1], call["rows"]
    found = _partner_rows(call, own)
    if own > rows:
        found.append(f"{name}[{used - 1}] = {own} rows: must be at most the rows of expand_x = {rows}")
    if call["layout"] == "triplets" and 3 * own > len(assist(call)):
        found.append(
            f"{assist_name(call)} has {len(assist(call))} entries: must have 3 for each of {name}[{used - 1}] = {own} rows"
        )
    return found


def _counts_accepted(call: Call) -> bool:
    """Whether the core finds nothing wrong with the counts."""
    core, kept, shrunk = _core(), call.form.kept, elastic(call)
    if core is None or call.partner is not None:
        return False
    known = kept.get(("counts", shrunk))
    if known is None:
        known = kept["counts", shrunk] = used_and_room(call)
    name, used, room = known
    return bool(0 <= core.last_sum(call.args[name].data_ptr(), used) <= room)


def used_and_room(call: Call) -> tuple[str, int, int]:
    """Return the name of the prefix sums, how many of them say something about this rank, and for how many rows there is room;
    no room, below 0, where the sums are not all there or not one after the other.
    """
    top, given = topology(call), counts(call)
    used, room = top.world * top.local_experts(top.physical.index(call["ep_rank_id"])), call["rows"]
    if call["layout"] == "triplets":
        room = min(room, len(assist(call)) // 3)
    fits = len(given) >= used and given.is_contiguous()
    return counts_name(call), used if fits else 0, room if fits else -1


def counts_name(call: Call) -> str:
    """The argument that holds the prefix sums which dispatch returned."""
    return "ep_send_counts" if "ep_send_counts" in call.args else "assist_info_for_combine"


def counts(call: Call) -> torch.Tensor:
    """Return the prefix sums which dispatch returned."""
    out: torch.Tensor = call[counts_name(call)]
    return out


def assist_name(call: Call) -> str:
    """The argument that holds dispatch's assist_info_for_combine or expand_idx."""
    return "expand_idx" if "expand_idx" in call.args else "assist_info_for_combine"


def assist(call: Call) -> torch.Tensor:
    """Return dispatch's assist_info_for_combine or expand_idx."""
    out: torch.Tensor = call[assist_name(call)]
    return out


def _partner_rows(call: Call, own: int) -> list[str]:
    if call.partner is None:
        return []
    counts: Sequence[int] = call["tp_send_counts"].tolist()
    mine, theirs = counts[call["tp_rank_id"]], counts[1 - call["tp_rank_id"]]
    if mine != own:
        return [f"tp_send_counts[{call['tp_rank_id']}] = {mine}: must be this rank's own rows = {own} (last of ep_send_counts)"]
    if theirs < 0 or mine + theirs > call["rows"]:
        return [
            f"tp_send_counts = {list(counts)}: must be non-negative and together at most the rows of expand_x = {call['rows']}"
        ]
    return []


def _earlier_pairs(call: Call) -> list[str]:
    """With the index layout the argument holds the owner's expand_idx: it must be that of these ids."""
    if call["layout"] != "index":
        return []
    expected = plan.expand_idx(ids(call), active(call), call["moe_expert_num"])
    given = assist(call)[: expected.size].cpu().numpy()
    counted = (active(call) & (np.where(active(call), ids(call), 0) < call["moe_expert_num"])).reshape(-1)
    wrong = np.nonzero((given != expected) & counted)[0]
    return [f"{assist_name(call)}[{i}] = {given[i]}: must be {expected[i]}, as dispatch returned it" for i in wrong[:_SHOWN]]
