"""The split path, the first version and combine with RMS norm under torch.compile: fakes, opcheck, graphs, export, order of calls."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.testing import CompileCounterWithBackend

import commfuse
from commfuse import agreement, config, engine, groups, torch_ops
from commfuse.call import Call
from commfuse.operators import OPERATORS
from commfuse.operators.moe_distribute import flights, reference, reference_split, reference_v1, split_steps
from commfuse.operators.moe_distribute.cases import NAMED, RoundTrip, random_case
from commfuse.operators.moe_distribute.split_steps import Posted
from tests.conftest import RunRanks
from tests.operators.moe_distribute import companions
from tests.operators.moe_distribute.round_trips import experts

Args = dict[str, Any]
Shapes = list[tuple[tuple[int, ...], torch.dtype]]
SPLIT = [f"npu_moe_distribute_{half}" for half in ("dispatch_setup", "dispatch_teardown", "combine_setup", "combine_teardown")]
DISPATCH, COMBINE = "npu_moe_distribute_dispatch", "npu_moe_distribute_combine"
NORM = "npu_moe_distribute_combine_add_rms_norm"
HIDDEN, TOP_K, EXPERTS = 16, 2, 8


def complete(operator: str, args: Args) -> Args:
    """All arguments of the internal operator but ``order``, by name."""
    defaults = {row.name: row.default for row in OPERATORS[operator].attrs}
    full = {**dict.fromkeys(OPERATORS[operator].names), **defaults, **args}
    return {name: full[name] for name in OPERATORS[operator].names}


def internal(operator: str) -> Any:
    return getattr(torch.ops.commfuse, operator)


# --- fakes -----------------------------------------------------------------------------------------------------------------


def fake(operator: str, args: Args) -> Shapes:
    with torch._subclasses.FakeTensorMode() as mode:
        plain = {n: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for n, v in {**args, "group_ep": "g"}.items()}
        out = internal(operator)(**complete(operator, plain), order=mode.from_tensor(torch_ops.ORDER))
    return shapes(out if isinstance(out, (tuple, list)) else [out])


def shapes(tensors: Any) -> Shapes:
    return [(tuple(tensor.shape), tensor.dtype) for tensor in tensors]


def up(multiple: int, value: int) -> int:
    return -(-value // multiple) * multiple


def sent_shapes(case: RoundTrip, args: Args) -> Shapes:
    """Of y, expand_idx and comm_cmd_info, as published."""
    num_tokens, hidden, shared = len(args["x"]), case.hidden, case.shared_expert_num
    experts_here = 1
    if args["ep_rank_id"] >= case.shared_expert_rank_num:
        experts_here = case.moe_expert_num // (case.world_size - case.shared_expert_rank_num)
    rows = num_tokens * (case.top_k + shared)
    y = (up(256, hidden), case.dtype) if case.quant_mode == 0 else (up(512, up(32, hidden) + 4), torch.int8)
    command = (rows + case.world_size * experts_here) * 16
    return [((rows, y[0]), y[1]), ((num_tokens * case.top_k,), torch.int32), ((command,), torch.int32)]


def returned_shapes(case: RoundTrip, args: Args) -> Shapes:
    """Of quant_expand_x and comm_cmd_info, as published."""
    rows, hidden = args["expand_x"].shape
    width = up(512, up(32, hidden) + up(8, hidden) // 8 * 4)
    return [((rows, width), torch.int8), (((rows + case.world_size) * 16,), torch.int32)]


def empty(shape: tuple[tuple[int, ...], torch.dtype]) -> torch.Tensor:
    return torch.empty(shape[0], dtype=shape[1])


def of_split(case: RoundTrip) -> Iterator[tuple[str, Args, Shapes]]:
    ranks = [ep for _, ep in case.calls()]
    halves = [companions.split_args(case, ep) for ep in ranks]
    dispatched = reference_split.split_dispatch([{**teardown, **setup} for setup, teardown in halves])
    for ep, (setup, teardown), outputs in zip(ranks, halves, dispatched, strict=True):
        index, *rest = [tensor for tensor, _ in outputs]
        sent = sent_shapes(case, setup)
        yield SPLIT[0], setup, [sent[0], *shapes([index]), sent[2]]
        yield SPLIT[1], {**teardown, "y": empty(sent[0]), "comm_cmd_info": empty(sent[2])}, shapes(rest)
        made = torch.empty(rest[0].shape, dtype=case.dtype)
        back, total = companions.split_back(case, ep, index, rest, made)
        returned = returned_shapes(case, back)
        yield SPLIT[2], back, returned
        more = {"quant_expand_x": empty(returned[0]), "comm_cmd_info": empty(returned[1])}
        yield SPLIT[3], {**total, **more}, [((case.num_tokens[ep], case.hidden), case.dtype)]


def of_v1(case: RoundTrip) -> Iterator[tuple[str, Args, Shapes]]:
    calls = case.calls()
    dispatched = reference_v1.dispatch([companions.v1_args(case, ep, tp) for tp, ep in calls])
    for (tp, ep), outputs in zip(calls, dispatched, strict=True):
        tensors = [tensor for tensor, _ in outputs]
        yield DISPATCH, companions.v1_args(case, ep, tp), shapes(tensors)
        back = companions.v1_back(case, ep, tp, tensors, torch.empty(tensors[0].shape, dtype=case.dtype))
        yield COMBINE, back, [((case.num_tokens[ep], case.hidden), case.dtype)]


def of_norm(case: RoundTrip) -> Iterator[tuple[str, Args, Shapes]]:
    calls = case.calls()
    dispatched = reference.dispatch_v2([case.dispatch_args(ep, tp) for tp, ep in calls])
    backs = []
    for (tp, ep), outputs in zip(calls, dispatched, strict=True):
        tensors = [tensor for tensor, _ in outputs]
        backs.append(companions.norm_back(case, ep, tp, tensors, experts(case, ep, tp, tensors)))
    for args, found in zip(backs, reference.combine_add_rms_norm(backs), strict=True):
        yield NORM, args, shapes([tensor for tensor, _ in found])


CALLS = {"split": of_split, "v1": of_v1, "norm": of_norm}


@pytest.mark.parametrize(("flow", "operators"), [("split", SPLIT), ("v1", [DISPATCH, COMBINE]), ("norm", [NORM])])
def test_fakes_have_the_golden_shapes_and_dtypes_in_every_case(flow: str, operators: list[str]) -> None:
    cases = [*NAMED[::2], *(companions.adapted(flow, random_case(seed)) for seed in range(30))]
    cases = [case for case in cases if companions.fits(flow, case)]
    assert len(cases) >= 30 + 12
    wrong, seen = [], set()
    for case in cases:
        for operator, args, expected in CALLS[flow](case):
            seen.add(operator)
            if (got := fake(operator, args)) != expected:
                wrong.append(f"{case.id}: {operator}: expected {expected}, got {got}")
    assert not wrong, "\n".join(wrong[:10])
    assert seen == set(operators)


# --- one process: opcheck, compile, export -----------------------------------------------------------------------------------


@pytest.fixture
def group() -> Iterator[str]:
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    found = str(dist.group.WORLD.group_name)
    flights.in_flight(groups.resolve(found)).clear()  # a test that failed may have left some
    with config.override(backend="portable"):  # its halves can be repeated, and all its outputs are made by one function
        yield found


def inputs(num_tokens: int, seed: int = 0) -> Args:
    generator = torch.Generator().manual_seed(num_tokens + 1000 * seed)
    ids = torch.stack([torch.randperm(EXPERTS, generator=generator)[:TOP_K] for _ in range(num_tokens)])
    return {
        "x": torch.randn(num_tokens, HIDDEN, generator=generator).bfloat16(),
        "expert_ids": ids.to(torch.int32).view(num_tokens, TOP_K),
    }


def domain(group: str) -> Args:
    return {"group_ep": group, "ep_world_size": 1, "ep_rank_id": 0, "moe_expert_num": EXPERTS}


def whole_calls(group: str) -> dict[str, tuple[str, Args]]:
    """Arguments of the operators that are not halves, by a name for the test."""
    args, where = inputs(3), domain(group)
    v1 = commfuse.npu_moe_distribute_dispatch(**args, **where)
    v2 = commfuse.npu_moe_distribute_dispatch_v2(**args, **where)
    back = {"expert_ids": args["expert_ids"], "expert_scales": torch.full((3, TOP_K), 0.25), **where}
    norm = {"residual_x": torch.ones(3, 1, HIDDEN).bfloat16(), "gamma": torch.full((HIDDEN,), 2.0).bfloat16()}
    rows_2 = {"expand_x": v2[0], "expand_idx": v2[2], "ep_send_counts": v2[4], **back, **norm}
    smooth = {"quant_mode": 2, "scales": torch.ones(EXPERTS, HIDDEN)}
    return {
        "dispatch": (DISPATCH, {**args, **where}),
        "dispatch-int8": (DISPATCH, {**args, **smooth, "x_active_mask": torch.tensor([True, True, False]), **where}),
        "combine": (COMBINE, {"expand_x": v1[0], "expand_idx": v1[2], "ep_send_counts": v1[4], **back}),
        "norm": (NORM, rows_2),
        "norm-shared": (NORM, {**rows_2, "shared_expert_x": torch.ones(3, HIDDEN).bfloat16(), "norm_eps": 0.5}),
    }


def check_operator(operator: str, args: Args, monkeypatch: pytest.MonkeyPatch) -> None:
    allocate = Call.outputs  # opcheck compares whole outputs of two runs, so their unspecified tails have to be equal
    monkeypatch.setattr(Call, "outputs", lambda call: {name: tensor.zero_() for name, tensor in allocate(call).items()})
    result = torch.library.opcheck(internal(operator).default, (*complete(operator, args).values(), torch_ops.ORDER))
    assert set(result.values()) == {"SUCCESS"}
    assert len(result) == 4


@pytest.mark.parametrize("name", ["dispatch", "dispatch-int8", "combine", "norm", "norm-shared"])
def test_opcheck(group: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_operator(*whole_calls(group)[name], monkeypatch)


def repeat(monkeypatch: pytest.MonkeyPatch, flying: Posted | None) -> None:
    """Let a half be called again and again with equal results, as opcheck does.

    A setup finds nothing under way and is number 1 each time; a teardown finds its setup under way each time, already heard.
    """
    for module in (flights, split_steps):
        monkeypatch.setattr(module, "in_flight", lambda group: deque([] if flying is None else [flying]))
    monkeypatch.setattr(agreement, "_line", lambda members: agreement._Line())


def latest(group: str) -> Posted:
    flying = flights.in_flight(groups.resolve(group))[-1]
    agreement.hear(flying.announced)
    return flying


@pytest.mark.parametrize("quant_mode", [0, 2])
@pytest.mark.parametrize("operator", SPLIT)
def test_opcheck_of_the_halves(group: str, operator: str, quant_mode: int, monkeypatch: pytest.MonkeyPatch) -> None:
    args, where, quant = inputs(3), domain(group), {"quant_mode": quant_mode}
    y, index, command = commfuse.npu_moe_distribute_dispatch_setup(**args, **where, **quant)
    flying = latest(group)
    given = {"y": y, "comm_cmd_info": command, **args, **where, **quant}
    rows, _, assist, _ = commfuse.npu_moe_distribute_dispatch_teardown(**given)
    calls: dict[str, tuple[Args, Posted | None]] = {SPLIT[0]: ({**args, **where, **quant}, None), SPLIT[1]: (given, flying)}
    back = {"expand_x": rows.bfloat16(), "expert_ids": args["expert_ids"], **where}
    calls[SPLIT[2]] = ({**back, "assist_info_for_combine": assist}, None)
    placeholder, command = commfuse.npu_moe_distribute_combine_setup(**calls[SPLIT[2]][0])
    flying = latest(group)
    weights = {"expand_idx": index, "expert_scales": torch.rand(3, TOP_K)}
    total = {**back, **weights, "quant_expand_x": placeholder, "comm_cmd_info": command}
    commfuse.npu_moe_distribute_combine_teardown(**total)
    calls[SPLIT[3]] = (total, flying)
    full, found = calls[operator]
    repeat(monkeypatch, found)
    check_operator(operator, full, monkeypatch)


def split_layer(
    x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, group: str, rank: int, world_size: int
) -> torch.Tensor:
    where = (group, world_size, rank, EXPERTS)
    sizes = {"global_bs": 64 * world_size}
    y, index, command = commfuse.npu_moe_distribute_dispatch_setup(x, ids, *where, **sizes)
    beside = x * 3  # what runs while the rows are on their way
    rows, _, assist, _ = commfuse.npu_moe_distribute_dispatch_teardown(x, y, ids, command, *where, **sizes)
    rows = rows * 2
    placeholder, command = commfuse.npu_moe_distribute_combine_setup(rows, ids, assist, *where, **sizes)
    out = commfuse.npu_moe_distribute_combine_teardown(rows, placeholder, ids, index, weights, command, *where, **sizes)
    return out + beside


def v1_layer(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, group: str, rank: int, world_size: int) -> torch.Tensor:
    where = (group, world_size, rank, EXPERTS)
    out = commfuse.npu_moe_distribute_dispatch(x, ids, *where)
    return commfuse.npu_moe_distribute_combine(out[0] * 2, ids, out[2], out[4], weights, *where)


def norm_layer(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, group: str, rank: int, world_size: int) -> torch.Tensor:
    where = (group, world_size, rank, EXPERTS)
    out = commfuse.npu_moe_distribute_dispatch_v2(x, ids, *where)
    gamma = torch.ones_like(x[0])
    y, rstd, z = commfuse.npu_moe_distribute_combine_add_rms_norm(
        out[0] * 2, ids, out[2], out[4], weights, x[:, None], gamma, *where
    )
    return y * rstd + z


LAYERS = {
    split_layer: SPLIT,
    v1_layer: [DISPATCH, COMBINE],
    norm_layer: ["npu_moe_distribute_dispatch_v2", NORM],
}


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.__name__)
def test_compiled_layer_equals_eager(group: str, layer: Any, dynamic: bool) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter, dynamic=dynamic)
    compilations = []
    for num_tokens in (3, 5, 9) if dynamic else (3, 3):
        args = inputs(num_tokens)
        weights = torch.rand(num_tokens, TOP_K)
        expected = layer(*args.values(), weights, group, 0, 1)
        assert torch.equal(compiled(*args.values(), weights, group, 0, 1), expected)
        compilations.append(counter.frame_count)
    assert compilations[0] == compilations[-1]  # the first may take two: torch starts again when it finds norm_eps to be constant
    assert not flights.in_flight(groups.resolve(group))


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.__name__)
def test_export(group: str, layer: Any) -> None:
    class Layer(torch.nn.Module):
        def forward(self, x: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            return layer(x, expert_ids, weights, group, 0, 1)  # type: ignore[no-any-return]

    given = (*inputs(4).values(), torch.rand(4, TOP_K))
    program = torch.export.export(Layer(), given)
    assert torch.equal(program.module()(*given), Layer()(*given))
    names = [node.target.name() for node in program.graph.nodes if "commfuse" in str(node.target)]
    assert names == [f"commfuse::{name}" for name in LAYERS[layer]]


# --- several ranks: number and order of calls ----------------------------------------------------------------------------------


def micro_batches(rank: int, world_size: int, group: str, x: torch.Tensor, ids: torch.Tensor, split: int) -> torch.Tensor:
    """Two micro-batches in the order in which they overlap best; a one-shot call between them; a dispatch whose rows nobody uses."""
    where = (group, world_size, rank, EXPERTS)
    sizes = {"global_bs": 64 * world_size}
    parts = [(x[:split], ids[:split]), (x[split:], ids[split:])]
    sent = [commfuse.npu_moe_distribute_dispatch_setup(rows, its, *where, **sizes) for rows, its in parts]
    commfuse.npu_moe_distribute_dispatch_v2(x[:1], ids[:1], *where, quant_mode=2, **sizes)
    back = []
    for (rows, its), (y, _, command) in zip(parts, sent, strict=True):
        came = commfuse.npu_moe_distribute_dispatch_teardown(rows, y, its, command, *where, **sizes)
        made = came[0] * 2
        back.append((made, *commfuse.npu_moe_distribute_combine_setup(made, its, came[2], *where, **sizes)))
    done = []
    for (rows, its), (_, index, _), (made, placeholder, command) in zip(parts, sent, back, strict=True):
        weights = torch.full((rows.shape[0], TOP_K), 0.5)
        done.append(
            commfuse.npu_moe_distribute_combine_teardown(made, placeholder, its, index, weights, command, *where, **sizes)
        )
    return torch.cat(done)


def compare_logs(rank: int, world_size: int) -> list[Any]:
    torch._dynamo.reset()
    group = str(dist.group.WORLD.group_name)
    args = inputs((3, 40)[rank % 2])  # very different batch sizes
    split = args["x"].shape[0] // 3
    log: list[tuple[str, int]] = []

    def listen(call: Call) -> None:
        log.append((call.operator.name, call["BS"]))

    engine.listeners.append(listen)
    try:
        eager = micro_batches(rank, world_size, group, *args.values(), split)
        eager_log = list(log)
        log.clear()
        with torch.compiler.config.patch(force_disable_caches=True):
            compiled = torch.compile(micro_batches, fullgraph=True, backend="aot_eager")
            result = compiled(rank, world_size, group, *args.values(), split)
    finally:
        engine.listeners.remove(listen)
    return [eager_log == log, [name for name, _ in log], torch.equal(eager, result)]


def test_compiled_halves_keep_number_and_order(run_ranks: RunRanks) -> None:
    setup, teardown, back, total = SPLIT
    expected = [setup, setup, "npu_moe_distribute_dispatch_v2", teardown, back, teardown, back, total, total]
    for same_log, names, same_values in run_ranks(2, compare_logs, 2, deadline=180):
        assert names == expected
        assert same_log
        assert same_values
