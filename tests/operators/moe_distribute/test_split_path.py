"""The split path on real ranks: the worked example, the bits of the one-shot path, several operations under way, and refusals."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import commfuse
from commfuse import torch_ops
from commfuse.operators import OPERATORS
from commfuse.operators.moe_distribute.cases import NAMED, RoundTrip
from commfuse.operators.moe_distribute.flights import DEPTH
from tests.conftest import RunRanks
from tests.operators.moe_distribute import companions
from tests.operators.moe_distribute.halves import MicroBatch, one_shot, same_bits, world

Args = dict[str, Any]
NAME = "npu_moe_distribute_{}"
PAIR = RoundTrip(id="pair", world_size=2, num_tokens=(5, 3), global_bs="max", hidden=16, moe_expert_num=4, top_k=2)
SETTINGS = {"timeout": 20.0, "poison": True}  # a rank that is left waiting fails the test soon; nobody may read a tail


def differences(rank: int, case: RoundTrip) -> list[str]:
    """What of the split path has other bits than the one-shot path."""
    batch = MicroBatch(rank, case)
    x = batch.call_all()
    out, wanted = one_shot(rank, case)
    total = case.total_rows(rank, out)
    expand_x, scales, assist, nums = batch.results["dispatch_teardown"]
    counted = min(len(out[4]), len(assist))
    pairs = {
        "expand_x": (expand_x[:total], out[0][:total]),
        "dynamic_scales": (scales[:total], out[1][:total]) if case.quant_mode else (nums, out[3]),
        "counts": (assist[:counted], out[4][:counted]),
        "expert_token_nums": (nums, out[3]),
        "x": (x, wanted),
    }
    return [f"{case.id}: {name}" for name, (got, expected) in pairs.items() if not same_bits(got, expected)]


def with_settings(rank: int, function: Callable[..., Any], *args: Any) -> Any:
    with commfuse.config.override(**SETTINGS):
        return function(rank, *args)


@contextmanager
def refused(texts: list[str]) -> Any:
    """Catch an ArgumentError and note its text; '' if there is none."""
    try:
        yield
    except commfuse.ArgumentError as error:
        texts.append(str(error))
    else:
        texts.append("")


# --- the worked example ------------------------------------------------------------------------------------------------------------------

IDS = [[0, 2], [3, 1], [2, 3]], [[1, 0], [2, 0], [3, 1]]
WEIGHTS = [[0.5, 0.25], [0.75, 0.125], [1, 0.5]], [[0.25, 0.5], [0.5, 1], [0.125, 0.25]]


def worked_example(rank: int, flat: bool) -> dict[str, Any]:
    domain = world(), 2, rank, 4
    x = (100 * rank + 10 * torch.arange(3)[:, None] + torch.arange(8)).half()
    ids = torch.tensor(IDS[rank], dtype=torch.int32)
    y, index, command = commfuse.npu_moe_distribute_dispatch_setup(x, ids, *domain)
    expand_x, scales, assist, nums = commfuse.npu_moe_distribute_dispatch_teardown(x, y, ids, command, *domain)
    expand_x[:6] *= torch.repeat_interleave(2 * rank + 1 + torch.arange(2), nums)[:, None]
    weights = torch.tensor(WEIGHTS[rank])
    quantised, back = commfuse.npu_moe_distribute_combine_setup(expand_x, ids, assist, *domain)
    out = commfuse.npu_moe_distribute_combine_teardown(
        expand_x, quantised, ids, index, weights.flatten() if flat else weights, back, *domain
    )
    return {
        "y": [list(y.shape), str(y.dtype), [t for row in y[:6] for t in range(3) if torch.equal(row[:8], x[t])]],
        "expand_idx": index.tolist(),
        "command": [list(command.shape), str(command.dtype)],
        "rows": [[list(expand_x.shape), expand_x[:6, 0].tolist()], list(scales.shape)],
        "assist": [list(assist.shape), assist[:4].tolist()],
        "nums": nums.tolist(),
        "back": [list(quantised.shape), str(quantised.dtype), list(back.shape)],
        "x": [str(out.dtype), out.tolist()],
    }


@pytest.mark.parametrize("flat", [False, True], ids=["weights-by-token", "weights-flat"])
def test_worked_example(run_ranks: RunRanks, flat: bool) -> None:
    found = run_ranks(2, with_settings, worked_example, flat)
    for one in found:
        assert one["y"] == [[9, 256], "torch.float16", [0, 0, 1, 1, 2, 2]]
        assert one["command"] == [[(9 + 2 * 2) * 16], "torch.int32"]
        assert one["nums"] == [3, 3]
        assert one["assist"][0] == [12 * 128]
        assert one["rows"][1] == [12]
        assert one["back"] == [[12, 512], "torch.int8", [(12 + 2) * 16]]
    assert [one["expand_idx"] for one in found] == [[0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 0, 1]]
    assert [one["assist"][1] for one in found] == [[1, 3, 4, 6], [2, 3, 5, 6]]
    # expand_x has been multiplied by the experts: 1 and 2 on rank 0, 3 and 4 on rank 1.
    assert [one["rows"][0] for one in found] == [[[12, 8], [0, 100, 110, 20, 200, 240]], [[12, 8], [0, 60, 330, 40, 80, 480]]]
    tokens = [[[100 * r + 10 * t + j for j in range(8)] for t in range(3)] for r in range(2)]
    factors = [[1.25, 3.25, 5], [1, 2.5, 1]]
    for one, rows, by in zip(found, tokens, factors, strict=True):
        assert one["x"] == ["torch.float16", [[v * f for v in row] for row, f in zip(rows, by, strict=True)]]


def fake(operator: str, args: Args) -> list[tuple[Any, ...]]:
    """Shapes and dtypes by the fake of the internal operator."""
    defaults = {row.name: row.default for row in OPERATORS[operator].attrs}
    full = {**dict.fromkeys(OPERATORS[operator].names), **defaults, "group_ep": "g", **args}
    with torch._subclasses.FakeTensorMode() as mode:
        plain = {n: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for n, v in full.items()}
        out = getattr(torch.ops.commfuse, operator)(**plain, order=mode.from_tensor(torch_ops.ORDER))
    return [(tuple(t.shape), str(t.dtype).removeprefix("torch.")) for t in (out if isinstance(out, (tuple, list)) else [out])]


@pytest.mark.parametrize("quant_mode", [0, 2])
def test_shapes_at_the_size_of_a_real_model(quant_mode: int) -> None:
    """32 tokens, 8 experts each, 256 columns, 16 ranks with one expert each; no shared rank, one shared expert in name."""
    num_tokens, top_k, hidden = 32, 8, 256
    where = {"ep_world_size": 16, "ep_rank_id": 0, "moe_expert_num": 16}
    x, ids = torch.empty(num_tokens, hidden).bfloat16(), torch.zeros(num_tokens, top_k, dtype=torch.int32)
    y, index, command = fake(NAME.format("dispatch_setup"), {"x": x, "expert_ids": ids, "quant_mode": quant_mode, **where})
    assert y == (((288, 256), "bfloat16") if quant_mode == 0 else ((288, 512), "int8"))
    assert (index, command) == (((256,), "int32"), ((4864,), "int32"))
    args = {
        "x": x,
        "y": torch.empty(y[0], dtype=getattr(torch, y[1])),
        "expert_ids": ids,
        "comm_cmd_info": torch.empty(command[0], dtype=torch.int32),
        "quant_mode": quant_mode,
        **where,
    }
    expand_x, scales, assist, nums = fake(NAME.format("dispatch_teardown"), args)
    assert expand_x == ((512, 256), "bfloat16" if quant_mode == 0 else "int8")
    assert (scales, assist, nums) == (((512,), "float32"), ((65536,), "int32"), ((1,), "int64"))
    args = {
        "expand_x": torch.empty(32, hidden).bfloat16(),
        "expert_ids": ids,
        "assist_info_for_combine": torch.empty(65536, dtype=torch.int32),
        **where,
    }
    quantised, command = fake(NAME.format("combine_setup"), args)
    assert (quantised, command) == (((32, 512), "int8"), ((768,), "int32"))
    more = {
        "quant_expand_x": torch.empty(quantised[0], dtype=torch.int8),
        "comm_cmd_info": torch.empty(command[0], dtype=torch.int32),
        "expand_idx": torch.empty(num_tokens * top_k, dtype=torch.int32),
        "expert_scales": torch.empty(num_tokens * top_k),
    }
    args.pop("assist_info_for_combine")
    assert fake(NAME.format("combine_teardown"), {**args, **more}) == [((32, 256), "bfloat16")]


# --- the bits of the one-shot path -------------------------------------------------------------------------------------------------------


def differences_of_all(rank: int, cases: list[RoundTrip]) -> list[str]:
    return [text for case in cases for text in differences(rank, case)]


@pytest.mark.parametrize("world_size", sorted({case.world_size for case in NAMED}))
def test_bits_of_the_one_shot_path(run_ranks: RunRanks, world_size: int) -> None:
    cases = [case for case in NAMED if case.world_size == world_size and companions.fits("split", case) and any(case.num_tokens)]
    assert cases
    assert run_ranks(world_size, with_settings, differences_of_all, cases) == [[]] * world_size


def smooth_tables(rank: int) -> list[bool]:
    """Tables of scales with and without a row for the shared expert, whether or not a rank holds it."""
    same = []
    alone = replace(PAIR, id="alone", quant_mode=2, smooth=True)
    shared = replace(alone, id="shared", world_size=2, shared_expert_rank_num=1, moe_expert_num=3)
    for case in (alone, shared):
        moe = case.dispatch_args(rank)["scales"][-case.moe_expert_num :]
        row = torch.rand(1, case.hidden, generator=torch.Generator().manual_seed(1)) + 0.5
        for scales, in_v2 in (
            (moe, moe if case is alone else torch.cat([torch.ones(1, case.hidden), moe])),
            (torch.cat([row, moe]), moe if case is alone else torch.cat([row, moe])),
        ):
            batch = MicroBatch(rank, case)
            batch.call("dispatch_setup", scales=scales)
            expand_x, factors, _, _ = batch.call("dispatch_teardown")
            args = {**case.dispatch_args(rank), "scales": in_v2}
            out = commfuse.npu_moe_distribute_dispatch_v2(**args, group_ep=world())
            total = case.total_rows(rank, out)
            same += [same_bits(expand_x[:total], out[0][:total]), same_bits(factors[:total], out[1][:total])]
    return same


def test_tables_of_scales_with_and_without_a_shared_row(run_ranks: RunRanks) -> None:
    assert run_ranks(2, with_settings, smooth_tables) == [[True] * 8] * 2


def int8_rows_in_y(rank: int) -> bool:
    """y in mode 2: int8 rows, each with its factor 32-byte aligned behind it, in the order of the pairs."""
    case = replace(PAIR, id="int8", quant_mode=2, hidden=40)
    batch = MicroBatch(rank, case)
    batch.call("dispatch_setup")
    x, top_k = batch.args["dispatch_setup"]["x"], case.top_k
    pairs = batch.results["dispatch_setup"][0][: len(x) * top_k]
    factors = pairs[:, 64:68].contiguous().view(torch.float32)
    batch.call_all("dispatch_teardown")
    wide = pairs[:, :40].float() * factors
    return bool((wide - x.repeat_interleave(top_k, 0).float()).abs().max() <= factors.max() / 2 * 1.01)


def test_rows_in_y_carry_their_factor(run_ranks: RunRanks) -> None:
    assert run_ranks(2, with_settings, int8_rows_in_y) == [True, True]


def masked_and_shared(rank: int) -> list[bool]:
    case = replace(PAIR, id="masked-shared", num_tokens=(5, 4), mask="1d", seed=3, shared_expert_x=2)
    batch = MicroBatch(rank, case)
    x = batch.call_all()
    _, wanted = one_shot(rank, case)
    mask = case.dispatch_args(rank)["x_active_mask"]
    without = MicroBatch(rank, replace(case, shared_expert_x=None)).call_all()
    return [same_bits(x, wanted), not x[~mask].any(), bool(mask.any()), not same_bits(without, x)]


def test_mask_and_shared_rows_in_combine_teardown(run_ranks: RunRanks) -> None:
    found = run_ranks(2, with_settings, masked_and_shared)
    assert all(one[0] and one[1] for one in found)
    assert any(one[2] and one[3] for one in found)


# --- several operations under way --------------------------------------------------------------------------------------------------------


def micro_batches(rank: int) -> list[bool]:
    """Two micro-batches in the order in which they overlap best, then the same batches one-shot."""
    cases = [replace(PAIR, seed=seed, num_tokens=tokens) for seed, tokens in ((1, (5, 3)), (2, (2, 5)))]
    a, b = (MicroBatch(rank, case) for case in cases)
    a.call("dispatch_setup")
    b.call("dispatch_setup")
    a.call("dispatch_teardown")
    a.call("combine_setup")
    b.call("dispatch_teardown")
    b.call("combine_setup")
    sums = [batch.call("combine_teardown")[0] for batch in (a, b)]
    return [same_bits(x, one_shot(rank, case)[1]) for x, case in zip(sums, cases, strict=True)]


def test_two_micro_batches_in_flight(run_ranks: RunRanks) -> None:
    assert run_ranks(2, with_settings, micro_batches) == [[True, True]] * 2


def fill_the_line(rank: int) -> list[Any]:
    cases = [replace(PAIR, seed=seed) for seed in range(DEPTH + 1)]
    batches = [MicroBatch(rank, case) for case in cases]
    for batch in batches[:DEPTH]:
        batch.call("dispatch_setup")
    texts: list[str] = []
    with refused(texts):
        batches[DEPTH].call("dispatch_setup")
    rows = [batch.call("dispatch_teardown")[0] for batch in batches[:1]]
    batches[DEPTH].call("dispatch_setup")  # there is room again
    rows += [batch.call("dispatch_teardown")[0] for batch in batches[1:]]
    same = []
    for case, expand_x in zip(cases, rows, strict=True):
        out, _ = one_shot(rank, case)
        total = case.total_rows(rank, out)
        same.append(same_bits(expand_x[:total], out[0][:total]))
    return [texts, same]


def test_eight_setups_in_flight_and_the_ninth_refused(run_ranks: RunRanks) -> None:
    assert DEPTH == 8
    for texts, same in run_ranks(2, with_settings, fill_the_line):
        assert texts == [
            "npu_moe_distribute_dispatch_setup: refused on all 2 ranks:\n"
            "  8 setups of this group are under way: must have a teardown, the oldest one's first, before the next setup"
        ]
        assert same == [True] * (DEPTH + 1)


def teardown_out_of_order(rank: int) -> list[Any]:
    a, b = (MicroBatch(rank, replace(PAIR, seed=seed)) for seed in (1, 2))
    a.call("dispatch_setup")
    b.call("dispatch_setup")
    texts: list[str] = []
    with refused(texts):
        b.call("dispatch_teardown")
    wanted = [one_shot(rank, batch.case)[1] for batch in (a, b)]
    a.call("dispatch_teardown")
    b.call("dispatch_teardown")
    with refused(texts):
        a.call("dispatch_teardown")  # once more
    for batch in (a, b):
        batch.call("combine_setup")
    with refused(texts):
        b.call("combine_teardown")
    got = [batch.call("combine_teardown")[0] for batch in (a, b)]
    numbers = [int(batch.results["combine_setup"][1][0]) for batch in (a, b)]
    return [texts, numbers, [same_bits(*pair) for pair in zip(got, wanted, strict=True)]]


def test_teardown_out_of_order_is_refused_and_the_right_one_works(run_ranks: RunRanks) -> None:
    for rank, (texts, numbers, same) in enumerate(run_ranks(2, with_settings, teardown_out_of_order)):
        early, again, late = texts
        assert early.startswith(f"npu_moe_distribute_dispatch_teardown: refused on rank {rank} of 2:\n  comm_cmd_info[0] = ")
        assert early.endswith("that of npu_moe_distribute_dispatch_setup: teardowns go in the order of the setups")
        assert again.endswith("must be that of a setup under way; each setup has one teardown")
        assert f"comm_cmd_info[0] = {numbers[1]}: must be {numbers[0]}, that of npu_moe_distribute_combine_setup" in late
        assert same == [True, True]


def one_shot_between(rank: int) -> list[bool]:
    """One-shot calls between setup and teardown, and one on rank 0 after the teardown that is before it on rank 1."""
    other = replace(PAIR, seed=9, quant_mode=2)
    batch = MicroBatch(rank, PAIR)
    results: list[torch.Tensor] = []
    for setup, teardown in (("dispatch_setup", "dispatch_teardown"), ("combine_setup", "combine_teardown")):
        batch.call(setup)
        results.append(one_shot(rank, other)[1])
        if rank == 0:
            batch.call(teardown)
        results.append(one_shot(rank, other)[1])
        if rank == 1:
            batch.call(teardown)
    same = [same_bits(one, results[0]) for one in results]
    return [same_bits(batch.results["combine_teardown"][0], one_shot(rank, PAIR)[1]), *same]


def test_one_shot_calls_between_setup_and_teardown(run_ranks: RunRanks) -> None:
    assert run_ranks(2, with_settings, one_shot_between) == [[True] * 5] * 2


# --- a setup waits for nobody ------------------------------------------------------------------------------------------------------------


def held_back(rank: int, folder: str, kind: str) -> list[bool]:
    """Rank 1 is held back until rank 0 opens the gate, which it does after its setups have returned."""
    gate, log = os.path.join(folder, "gate"), Path(folder, "log")
    batches = [MicroBatch(rank, replace(PAIR, seed=seed)) for seed in range(3)]
    one_shot(rank, PAIR)  # the first call of a group chooses its backend, all ranks together
    for batch in batches if kind == "combine" else ():
        batch.call("dispatch_setup")
        batch.call("dispatch_teardown")
    dist.barrier()
    if rank == 1:
        with open(gate) as waiting:
            waiting.read()
        note(log, "rank 1 is free")
    for batch in batches:
        batch.call(f"{kind}_setup")
        note(log, f"rank {rank} has posted")
    product = torch.ones(64, 64) @ torch.ones(64, 64)
    note(log, f"rank {rank} has computed {product[0, 0]:g}")
    if rank == 0:
        with open(gate, "w") as opened:
            opened.write("go")
    for half in ("dispatch_teardown", "combine_setup") if kind == "dispatch" else ():
        for batch in batches:
            batch.call(half)
    sums = [batch.call("combine_teardown")[0] for batch in batches]
    return [same_bits(x, one_shot(rank, batch.case)[1]) for x, batch in zip(sums, batches, strict=True)]


def note(log: Path, text: str) -> None:
    with log.open("a") as file:
        file.write(text + "\n")


@pytest.mark.parametrize("kind", ["dispatch", "combine"])
def test_a_setup_returns_while_a_peer_is_held_back(run_ranks: RunRanks, tmp_path: Path, kind: str) -> None:
    os.mkfifo(tmp_path / "gate")
    assert run_ranks(2, with_settings, held_back, str(tmp_path), kind, deadline=30) == [[True] * 3] * 2
    lines = (tmp_path / "log").read_text().splitlines()
    assert lines[:5] == [*["rank 0 has posted"] * 3, "rank 0 has computed 64", "rank 1 is free"]
    assert lines.count("rank 1 has posted") == 3


# --- refusals ----------------------------------------------------------------------------------------------------------------------------

WRONG_TEARDOWNS = {
    "quant_mode": ("dispatch", lambda args: {"quant_mode": 2, "y": args["y"].new_empty(len(args["y"]), 512, dtype=torch.int8)},
                   "quant_mode = 2: must be 0, as in npu_moe_distribute_dispatch_setup"),
    "comm_type": ("dispatch", lambda args: {"comm_type": 2}, "comm_type = 2: must be 0, as in "),
    "x": ("dispatch", lambda args: {"x": args["x"].half(), "y": args["y"].half()}, "x = float16 ({BS}, 16): must be bfloat16 ({BS}, 16)"),
    "expert_ids": ("dispatch", lambda args: {"expert_ids": args["expert_ids"].flip(1)}, "expert_ids = other values: must be those given"),
    "global_bs": ("combine", lambda args: {"global_bs": 12}, "global_bs = 12: must be 10, as in npu_moe_distribute_combine_setup"),
    "expand_idx": ("combine", lambda args: {"expand_idx": args["expand_idx"] + 1}, "expand_idx[0] = 1: must be 0, as dispatch returned it"),
}  # type: dict[str, tuple[str, Callable[[Args], Args], str]]  # fmt: skip


def wrong_teardown(rank: int, name: str) -> list[Any]:
    kind, change, _ = WRONG_TEARDOWNS[name]
    teardown = f"{kind}_teardown"
    texts: list[str] = []
    batch = MicroBatch(rank, PAIR)
    batch.call_all(last=f"{kind}_setup")
    with refused(texts):
        batch.call(teardown, **change(batch.args[teardown]))
    return [texts[0], same_bits(batch.call_all(teardown), one_shot(rank, PAIR)[1])]


@pytest.mark.parametrize("name", WRONG_TEARDOWNS)
def test_teardown_with_other_arguments_is_refused_and_the_right_one_works(run_ranks: RunRanks, name: str) -> None:
    kind, _, expected = WRONG_TEARDOWNS[name]
    for rank, (text, same) in enumerate(run_ranks(2, with_settings, wrong_teardown, name)):
        assert text.startswith(f"npu_moe_distribute_{kind}_teardown: refused on rank {rank} of 2:")
        assert expected.replace("{BS}", str(PAIR.num_tokens[rank])) in text
        assert same


def refused_setup(rank: int, between: str) -> list[Any]:
    """Rank 1 refuses its ids; an earlier operation may be under way, and the others may be in a one-shot call before their teardown."""
    case = replace(PAIR, world_size=3, num_tokens=(3, 3, 3), moe_expert_num=6)
    earlier, batch = (MicroBatch(rank, replace(case, seed=seed)) for seed in (1, 2))
    earlier.call("dispatch_setup")
    if between == "combine":
        earlier.call("dispatch_teardown")
        earlier.call("combine_setup")
    texts: list[str] = []
    ids = batch.args["dispatch_setup"]["expert_ids"].clone()
    ids[1, 0] = 99 if rank == 1 else ids[1, 0]
    if rank == 1:
        with refused(texts):
            batch.call("dispatch_setup", expert_ids=ids)
    else:
        batch.call("dispatch_setup")
    results = [one_shot(rank, case)[1]] if between == "one-shot" else []
    if between == "combine":
        (x,) = earlier.call("combine_teardown")
    else:
        earlier.call("dispatch_teardown")
    if rank != 1:
        with refused(texts):
            batch.call("dispatch_teardown")
    if between != "combine":
        earlier.call("combine_setup")
        (x,) = earlier.call("combine_teardown")
    results += [one_shot(rank, case)[1], MicroBatch(rank, case).call_all()]
    return [texts, same_bits(x, one_shot(rank, earlier.case)[1]), [same_bits(one, results[0]) for one in results]]


@pytest.mark.parametrize("between", ["nothing", "combine", "one-shot"])
def test_a_refused_setup_is_read_on_every_rank(run_ranks: RunRanks, between: str) -> None:
    expected = (
        "npu_moe_distribute_dispatch_setup: refused on rank 1 of 3:\n  expert_ids[1, 0] = 99: must be in 0..5 (moe_expert_num)"
    )
    for texts, earlier, same in run_ranks(3, with_settings, refused_setup, between):
        assert texts == [expected]
        assert earlier
        assert all(same)


def different_setups(rank: int, how: str) -> list[Any]:
    case = PAIR
    batch = MicroBatch(rank, case)
    texts: list[str] = []
    if how == "argument":
        batch.call("dispatch_setup", moe_expert_num=4 + 4 * rank)
        with refused(texts):
            batch.call("dispatch_teardown", moe_expert_num=4 + 4 * rank)
    elif rank == 0:
        batch.call("dispatch_setup")
        with refused(texts):
            batch.call("dispatch_teardown")
    else:
        with refused(texts):
            one_shot(rank, case)
    return [texts, same_bits(MicroBatch(rank, case).call_all(), one_shot(rank, case)[1])]


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("argument", "moe_expert_num: 4 on rank 0 of 2; 8 on rank 1 of 2"),
        ("operator", "'npu_moe_distribute_dispatch_setup' on rank 0 of 2; 'npu_moe_distribute_dispatch_v2' on rank 1 of 2"),
    ],
)
def test_setups_that_disagree_are_read_at_the_teardown(run_ranks: RunRanks, how: str, says: str) -> None:
    (first, works), (second, works_too) = run_ranks(2, with_settings, different_setups, how)
    assert first == second
    assert says in first[0]
    assert works
    assert works_too


def foreign_counts(rank: int) -> list[Any]:
    """Rank 1 gives combine_setup one row less than it has: the owner of that row reads it, the other rank gets its sums."""
    case = replace(PAIR, num_tokens=(3, 3), top_k=1, routing="one-expert")  # all rows are on expert 0, on rank 0
    batch = MicroBatch(rank, case)
    batch.call("dispatch_setup")
    batch.call("dispatch_teardown")
    counts = batch.args["combine_setup"]["assist_info_for_combine"].clone()
    if rank == 0:
        counts[1:4] -= 1
    texts: list[str] = []
    batch.call("combine_setup", assist_info_for_combine=counts)
    x = torch.empty(0)
    with refused(texts):
        (x,) = batch.call("combine_teardown")
    expected = one_shot(rank, case)[1]
    return [texts, same_bits(x, expected), same_bits(MicroBatch(rank, case).call_all(), expected)]


def test_rows_that_do_not_come_back_are_read_by_their_owner(run_ranks: RunRanks) -> None:
    (first, fine, works), (second, _, works_too) = run_ranks(2, with_settings, foreign_counts)
    assert first == [""]
    assert fine
    assert second == [
        "npu_moe_distribute_combine_teardown: refused on rank 1 of 2:\n"
        "  assist_info_for_combine of the rank with id 0 returns 2 rows of its local expert 0, but expert_ids and x_active_mask "
        "here announce 3: all must be those of one dispatch"
    ]
    assert works
    assert works_too
