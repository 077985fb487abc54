"""The operators that fuse a matmul with communication, in compiled code; see test_torch_ops for dispatch and combine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import commfuse
from commfuse import engine, torch_ops
from commfuse.call import Call
from commfuse.checking.matmul import ALL_GATHER_MM, GMM_ALLTOALLV, Matmul
from commfuse.operators import OPERATORS
from tests.conftest import RunRanks

FAMILIES = (*GMM_ALLTOALLV, *ALL_GATHER_MM)
BY_NAME = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


def _alone() -> str:
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return str(dist.group.WORLD.group_name)


def _all_args(family: Matmul, case: Any, rank: int, group: str) -> dict[str, Any]:
    """All arguments of the internal operator, by name and in order; counts as a list, which is what a compiler sees."""
    operator = OPERATORS[family.name]
    args = {**case.args(rank), operator.group: group}
    args = {"input" if name == "self" else name: value for name, value in args.items()}
    plain = {name: [int(n) for n in value] if name.endswith("_counts") else value for name, value in args.items()}
    return {name: plain[name] for name in operator.names}


def _kind(tensor: Tensor | None) -> Any:
    return None if tensor is None else (tuple(tensor.shape), tensor.dtype)


# --- fakes -----------------------------------------------------------------------------------------------------------------


@BY_NAME
def test_fakes_have_the_golden_shapes_and_dtypes_in_every_case(family: Matmul) -> None:
    wrong = []
    cases = [*family.named_cases(), *map(family.random_case, range(60))]
    for case in cases:
        for rank, rows in family.expected(case).items():
            wanted = [_kind(row.tensor) for row in rows]
            got = [_kind(tensor) for tensor in _fake(family, _all_args(family, case, rank, "g"))]
            if got != wanted:
                wrong.append(f"{case.id}, rank {rank}: expected {wanted}, got {got}")
    assert not wrong, "\n".join(wrong[:10])
    assert len(cases) > 60


def _fake(family: Matmul, args: dict[str, Any]) -> tuple[Any, ...]:
    operator = OPERATORS[family.name]
    with torch._subclasses.FakeTensorMode() as mode:
        fake = {name: mode.from_tensor(value) if isinstance(value, Tensor) else value for name, value in args.items()}
        made = getattr(torch.ops.commfuse, family.name)(*fake.values(), mode.from_tensor(torch_ops.ORDER))
        tensors = made if isinstance(made, (tuple, list)) else [made]
        given = torch_ops._given[family.name](**fake)
    assert len(tensors) == len(operator.outputs)
    return tuple(tensor if there else None for tensor, there in zip(tensors, given, strict=True))


@BY_NAME
def test_absent_outputs_are_none_in_compiled_code_as_in_eager(family: Matmul) -> None:
    """The two places that tell which outputs there are: the traceable one, and the rows."""
    for case in family.named_cases():
        args = _all_args(family, case, 0, "g")
        shapes = torch_ops.fake_outputs(OPERATORS[family.name], args)
        assert [bool(there) for there in torch_ops._given[family.name](**args)] == [shape is not None for shape in shapes]


# --- opcheck ---------------------------------------------------------------------------------------------------------------


def _one_rank(family: Matmul) -> list[Any]:
    """Each form of the operator that a single process can call."""
    seen: dict[tuple[str, ...], Any] = {}
    for case in [*family.named_cases(), *map(family.random_case, range(80))]:
        if case.world_size == 1:
            seen.setdefault(tuple(name for name, value in case.args(0).items() if value is not None and value is not False), case)
    return list(seen.values())


OPCHECKED = [(family, case) for family in FAMILIES for case in _one_rank(family)]


@pytest.mark.parametrize(("family", "case"), OPCHECKED, ids=[case.id for _, case in OPCHECKED])
def test_opcheck(family: Matmul, case: Any) -> None:
    args = _all_args(family, case, 0, _alone())
    result = torch.library.opcheck(getattr(torch.ops.commfuse, family.name).default, (*args.values(), torch_ops.ORDER))
    assert set(result.values()) == {"SUCCESS"}


def test_every_operator_is_opchecked_in_several_forms() -> None:
    forms = [family.name for family, _ in OPCHECKED]
    assert all(forms.count(family.name) >= 2 for family in FAMILIES)


# --- compile and export, one process -----------------------------------------------------------------------------------------


def _experts(
    rows: Tensor, weight: Tensor, counts: Sequence[int], mm_x: Tensor | None, mm_weight: Tensor | None, group: str
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Grouped matmul there and back, with or without a shared expert and the permuted rows."""
    with_shared = mm_x is not None
    there, shared, permuted = commfuse.npu_alltoallv_gmm(
        rows, weight, group, 1, counts, counts, mm_x=mm_x, mm_weight=mm_weight, permute_out_flag=with_shared
    )
    assert (shared is None) == (permuted is None) == (not with_shared)
    back, none = commfuse.npu_gmm_alltoallv(there, weight, group, 1, counts, counts, trans_gmm_weight=True)
    assert none is None
    return back, shared, permuted


def _linear(rows: Tensor, weight: Tensor, bias: Tensor, group: str) -> tuple[Tensor, Tensor]:
    """Sequence-parallel linears with the first argument under each of its names, and a barrier."""
    output, gathered = commfuse.npu_all_gather_base_mm(x1=rows, x2=weight.t(), hcom=group, world_size=1, bias=bias)
    output = commfuse._npu_distribute_barrier(output, group, 1)
    back = commfuse.npu_mm_reduce_scatter_base(self=output, x2=weight, hcom=group, world_size=1)
    everywhere = commfuse.npu_mm_all_reduce_base(back, weight.t(), group, x3=output)
    return everywhere, gathered


def _expert_args(counts: Sequence[int], shared: bool) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(sum(counts))
    rows = torch.randn(sum(counts), 11, generator=generator).bfloat16()
    weight = torch.randn(len(counts), 11, 13, generator=generator).bfloat16()
    mm = [torch.randn(5, 17, generator=generator), torch.randn(17, 19, generator=generator)] if shared else [None, None]
    return (rows, weight, counts, *mm)


def _linear_args(num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_rows)
    return tuple(torch.randn(*shape, generator=generator) for shape in ((num_rows, 6), (4, 6), (4,)))  # type: ignore[return-value]


# A compiler takes sizes that are equal in its first call to be equal always, so there all of them differ.
CALLS: list[Any] = [
    pytest.param(_experts, [_expert_args([n, 2 * n], False) for n in (3, 4, 8)], id="experts"),
    pytest.param(_experts, [_expert_args([n, 2 * n], True) for n in (3, 4, 8)], id="experts-shared"),
    pytest.param(_experts, [_expert_args((n, 2 * n), False) for n in (3, 4, 8)], id="experts-tuples"),
    pytest.param(_linear, [_linear_args(n) for n in (3, 4, 8)], id="linear"),
]


def _equal(found: Any, expected: Any) -> None:
    for tensor, wanted in zip(found, expected, strict=True):
        assert (tensor is None) == (wanted is None)
        if tensor is not None:
            torch.testing.assert_close(tensor, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize(("function", "calls"), CALLS)
def test_compiled_equals_eager(function: Callable[..., Any], calls: list[Any], dynamic: bool) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter, dynamic=dynamic)
    for args in calls if dynamic else calls[:1]:
        _equal(compiled(*args, _alone()), function(*args, _alone()))
    assert counter.frame_count == 1  # other counts and sizes do not compile anew


@pytest.mark.parametrize(("function", "calls"), CALLS)
def test_export(function: Callable[..., Any], calls: list[Any]) -> None:
    group = _alone()

    class Module(torch.nn.Module):
        def forward(self, *args: Any) -> Any:
            return function(*args, group)

    program = torch.export.export(Module(), calls[0])
    _equal(program.module()(*calls[0]), function(*calls[0], group))


def test_first_argument_twice_is_an_error_in_compiled_code_too() -> None:
    torch._dynamo.reset()

    def twice(rows: Tensor, weight: Tensor) -> Tensor:
        return commfuse.npu_all_gather_base_mm(rows, x2=weight, hcom="0", world_size=1, x1=rows)[0]  # type: ignore[call-arg]

    with pytest.raises(Exception, match="x1= mean the same argument"):
        torch.compile(twice, backend="aot_eager")(torch.ones(2, 3), torch.ones(3, 4))


# --- several ranks -----------------------------------------------------------------------------------------------------------


def _on_ranks(rank: int, backend: str) -> list[Any]:
    """Uneven counts, empty blocks, and a call whose results nobody uses."""
    torch._dynamo.reset()
    send, recv = [([1, 2, 0, 3], [1, 2, 4, 0]), ([4, 0, 2, 2], [0, 3, 2, 2])][rank]
    generator = torch.Generator().manual_seed(rank)
    rows = torch.randn(sum(send), 6, generator=generator).bfloat16()
    weight = torch.randn(2, 6, 6, generator=generator).bfloat16()
    group = str(dist.group.WORLD.group_name)

    def layer(rows: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        commfuse.npu_all_gather_base_mm(rows[:1], weight[0], group, 2)
        there, _, permuted = commfuse.npu_alltoallv_gmm(rows, weight, group, 2, send, recv, permute_out_flag=True)
        assert permuted is not None
        back, _ = commfuse.npu_gmm_alltoallv(there, weight, group, 2, recv, send)
        gathered, _ = commfuse.npu_all_gather_base_mm(input=back[:2], x2=weight[0], hcom=group, world_size=2)
        return back, permuted, commfuse.npu_mm_reduce_scatter_base(gathered, weight[1], group, 2)

    log: list[str] = []

    def note(call: Call) -> None:
        log.append(call.operator.name)

    engine.listeners.append(note)
    try:
        eager = layer(rows, weight)
        with torch.compiler.config.patch(force_disable_caches=True):
            compiled = torch.compile(layer, fullgraph=True, backend=backend)(rows, weight)
    finally:
        engine.listeners.remove(note)
    return [all(torch.equal(a, b) for a, b in zip(eager, compiled, strict=True)), log]


def test_compiled_on_several_ranks(run_ranks: RunRanks) -> None:
    calls = [
        "npu_all_gather_base_mm",
        "npu_alltoallv_gmm",
        "npu_gmm_alltoallv",
        "npu_all_gather_base_mm",
        "npu_mm_reduce_scatter_base",
    ]
    assert run_ranks(2, _on_ranks, "aot_eager", deadline=180) == [[True, calls * 2]] * 2
