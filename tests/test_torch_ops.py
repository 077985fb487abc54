"""The operators in compiled code: shapes, schemas, values, and that calls keep their number and order."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.distributed as dist

import commfuse
from commfuse import config, engine, torch_ops
from commfuse.call import Call
from commfuse.operators import OPERATORS
from commfuse.operators.moe_distribute import reference
from commfuse.operators.moe_distribute.cases import NAMED, RoundTrip, random_case
from tests.conftest import RunRanks
from tests.operators.moe_distribute.round_trips import experts

DISPATCH, COMBINE = "npu_moe_distribute_dispatch_v2", "npu_moe_distribute_combine_v2"
HIDDEN, TOP_K, EXPERTS = 16, 2, 8


def _one_process_group() -> str:
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return str(dist.group.WORLD.group_name)


def _named_args(operator: str, args: dict[str, Any], group: str) -> dict[str, Any]:
    """All arguments of the internal operator, by name."""
    defaults = {row.name: row.default for row in OPERATORS[operator].attrs}
    full = {**dict.fromkeys(OPERATORS[operator].names), **defaults, **args, "group_ep": group}
    return {name: full[name] for name in OPERATORS[operator].names}


# --- fakes -----------------------------------------------------------------------------------------------------------------


def _fake_cases() -> list[RoundTrip]:
    return [*NAMED[::2], *(random_case(seed) for seed in range(30))]


def test_fakes_have_the_golden_shapes_and_dtypes_in_every_case() -> None:
    wrong = []
    for case in _fake_cases():
        calls = case.calls()
        dispatched = reference.dispatch_v2([case.dispatch_args(ep, tp) for tp, ep in calls])
        for (tp, ep), outputs in zip(calls, dispatched, strict=True):
            tensors = [tensor for tensor, _ in outputs]
            back = case.combine_args(ep, tp, tensors, experts(case, ep, tp, tensors))
            expected = {DISPATCH: tensors, COMBINE: [torch.empty(case.num_tokens[ep], case.hidden, dtype=case.dtype)]}
            for operator, args in ((DISPATCH, case.dispatch_args(ep, tp)), (COMBINE, back)):
                fakes = _fake(operator, args)
                got = [(tuple(t.shape), t.dtype) for t in fakes]
                want = [(tuple(t.shape), t.dtype) for t in expected[operator]]
                if got != want:
                    wrong.append(f"{case.id}, rank {ep}: {operator}: expected {want}, got {got}")
    assert not wrong, "\n".join(wrong[:10])


def _fake(operator: str, args: dict[str, Any]) -> list[torch.Tensor]:
    with torch._subclasses.FakeTensorMode() as mode:
        fake = {n: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for n, v in args.items()}
        out = getattr(torch.ops.commfuse, operator)(**_named_args(operator, fake, "g"), order=mode.from_tensor(torch_ops.ORDER))
    return list(out) if isinstance(out, (tuple, list)) else [out]


# --- one process: opcheck, compile, export -----------------------------------------------------------------------------------


def _dispatch_args(num_tokens: int, **more: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(num_tokens)
    ids = torch.stack([torch.randperm(EXPERTS, generator=generator)[:TOP_K] for _ in range(num_tokens)])
    return {
        "x": torch.randn(num_tokens, HIDDEN, generator=generator).bfloat16(),
        "expert_ids": ids.to(torch.int32).view(num_tokens, TOP_K),
        "ep_world_size": 1,
        "ep_rank_id": 0,
        "moe_expert_num": EXPERTS,
        **more,
    }


def _combine_args(num_tokens: int, **more: Any) -> dict[str, Any]:
    args = _dispatch_args(num_tokens)
    (outputs,) = reference.dispatch_v2([_named_args(DISPATCH, args, "")])
    assist, counts = outputs[2][0], outputs[4][0]
    return {
        "expand_x": outputs[0][0],
        "assist_info_for_combine": assist,
        "ep_send_counts": counts,
        "expert_scales": torch.full((num_tokens, TOP_K), 0.25),
        **{name: args[name] for name in ("expert_ids", "ep_world_size", "ep_rank_id", "moe_expert_num")},
        **more,
    }


@pytest.mark.parametrize(
    ("operator", "args"),
    [
        pytest.param(DISPATCH, _dispatch_args(3), id="dispatch"),
        pytest.param(
            DISPATCH,
            _dispatch_args(3, quant_mode=2, scales=torch.ones(EXPERTS, HIDDEN), x_active_mask=torch.tensor([True, True, False])),
            id="dispatch-int8",
        ),
        pytest.param(
            DISPATCH, _dispatch_args(3, performance_info=torch.zeros(1, dtype=torch.int64)), id="dispatch-performance-info"
        ),
        pytest.param(COMBINE, _combine_args(3), id="combine"),
        pytest.param(COMBINE, _combine_args(3, shared_expert_x=torch.ones(3, HIDDEN).bfloat16()), id="combine-shared"),
    ],
)
def test_opcheck(operator: str, args: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    allocate = Call.outputs  # opcheck compares whole outputs of two runs, so their unspecified tails have to be equal
    monkeypatch.setattr(Call, "outputs", lambda call: {name: tensor.zero_() for name, tensor in allocate(call).items()})
    full = _named_args(operator, args, _one_process_group())
    with config.override(backend="portable"):  # whose outputs are all made by that function
        result = torch.library.opcheck(getattr(torch.ops.commfuse, operator).default, (*full.values(), torch_ops.ORDER))
    assert set(result.values()) == {"SUCCESS"}


def _layer(x: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor, group: str) -> torch.Tensor:
    out = commfuse.npu_moe_distribute_dispatch_v2(x, expert_ids, group, 1, 0, EXPERTS)
    return commfuse.npu_moe_distribute_combine_v2(out[0] * 2, expert_ids, out[2], out[4], weights, group, 1, 0, EXPERTS)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_layer_equals_eager(backend: str, dynamic: bool) -> None:
    group = _one_process_group()
    torch._dynamo.reset()
    compiled = torch.compile(_layer, fullgraph=True, backend=backend, dynamic=dynamic)
    for num_tokens in (3, 5, 9) if dynamic else (3,):
        args = _dispatch_args(num_tokens)
        weights = torch.rand(num_tokens, TOP_K)
        expected = _layer(args["x"], args["expert_ids"], weights, group)
        assert torch.equal(compiled(args["x"], args["expert_ids"], weights, group), expected)


def test_dynamic_sizes_compile_once() -> None:
    group = _one_process_group()
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(_layer, fullgraph=True, backend=counter, dynamic=True)
    for num_tokens in (3, 5, 9, 17):
        args = _dispatch_args(num_tokens)
        compiled(args["x"], args["expert_ids"], torch.rand(num_tokens, TOP_K), group)
    assert counter.frame_count == 1


def test_export() -> None:
    group = _one_process_group()

    class Layer(torch.nn.Module):
        def forward(self, x: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            return _layer(x, expert_ids, weights, group)

    args = _dispatch_args(4)
    inputs = (args["x"], args["expert_ids"], torch.rand(4, TOP_K))
    program = torch.export.export(Layer(), inputs)
    assert torch.equal(program.module()(*inputs), Layer()(*inputs))


# --- several ranks: number and order of calls ----------------------------------------------------------------------------------


def _micro_batches(rank: int, world_size: int, group: str, x: torch.Tensor, ids: torch.Tensor, split: int) -> torch.Tensor:
    """An unused warm-up dispatch, two micro-batches dispatched in order and combined in reverse order."""
    where = (group, world_size, rank, EXPERTS)
    sizes = {"global_bs": 64 * world_size}
    commfuse.npu_moe_distribute_dispatch_v2(x[:1], ids[:1], *where, quant_mode=2, **sizes)
    parts = [(x[:split], ids[:split]), (x[split:], ids[split:])]
    sent = [commfuse.npu_moe_distribute_dispatch_v2(rows, i, *where, **sizes) for rows, i in parts]
    done = []
    for (rows, i), out in reversed(list(zip(parts, sent, strict=True))):
        weights = torch.full((rows.shape[0], TOP_K), 0.5)
        done.append(commfuse.npu_moe_distribute_combine_v2(out[0] * 2, i, out[2], out[4], weights, *where, **sizes))
    return torch.cat(done[::-1])


def _compare_logs(rank: int, world_size: int, backend: str) -> list[Any]:
    torch._dynamo.reset()
    group = str(dist.group.WORLD.group_name)
    args = _dispatch_args((3, 40, 7, 12)[rank % 4])  # very different batch sizes
    split = args["x"].shape[0] // 3
    log: list[tuple[str, int, int]] = []

    def note(call: Call) -> None:
        log.append((call.operator.name, call["BS"], call.args.get("quant_mode", -1)))

    engine.listeners.append(note)
    try:
        eager = _micro_batches(rank, world_size, group, args["x"], args["expert_ids"], split)
        eager_log = list(log)
        log.clear()
        with torch.compiler.config.patch(force_disable_caches=True):
            compiled = torch.compile(_micro_batches, fullgraph=True, backend=backend)
            result = compiled(rank, world_size, group, args["x"], args["expert_ids"], split)
    finally:
        engine.listeners.remove(note)
    return [eager_log == log, len(log), torch.equal(eager, result)]


@pytest.mark.parametrize(("backend", "world_size"), [("aot_eager", 4), pytest.param("inductor", 2, marks=pytest.mark.long)])
def test_compiled_calls_keep_number_and_order(run_ranks: RunRanks, backend: str, world_size: int) -> None:
    for same_log, calls, same_values in run_ranks(world_size, _compare_logs, world_size, backend, deadline=180):
        assert calls == 5
        assert same_log
        assert same_values
