"""The local operators inside torch.compile: whole graphs, the same bits, shapes and types as eager."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

from commfuse import local
from commfuse.errors import ArgumentError

COUNTS = torch.tensor([2, 0, 3])
IDS = torch.tensor([[0, 4], [4, 3], [4, 2], [1, 1], [5, 0], [2, 3]], dtype=torch.int32)
X = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
BY_GROUP: dict[str, Any] = {"split_item": 2, "group_type": 0, "group_list_type": 1}


def _int8(*shape: int) -> torch.Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(1))


CASES: dict[str, tuple[Callable[..., Any], tuple[torch.Tensor, ...]]] = {
    "grouped": (
        lambda x, w, b, g: local.npu_grouped_matmul([x], [w], bias=[b], group_list=g, **BY_GROUP),
        (X, torch.rand(3, 8, 4), torch.rand(3, 4), COUNTS),
    ),
    "grouped-weights": (
        lambda x, w, v, g: local.npu_grouped_matmul([x], [w, v, w], group_list=g, **BY_GROUP),
        (X.bfloat16(), torch.rand(8, 4).bfloat16(), torch.rand(8, 4).bfloat16(), COUNTS),
    ),
    "grouped-int8": (
        lambda x, w, s, t, g: local.npu_grouped_matmul(
            [x], [w], scale=[s], per_token_scale=[t], group_list=g, output_dtype=torch.bfloat16, **BY_GROUP
        ),
        (_int8(6, 8), _int8(3, 8, 4), torch.rand(3, 4), torch.rand(6), COUNTS),
    ),
    "grouped-int32": (
        lambda x, w, g: local.npu_grouped_matmul([x], [w], group_list=g, output_dtype=torch.int32, **BY_GROUP),
        (_int8(6, 8), _int8(3, 8, 4), COUNTS),
    ),
    "grouped-gradient": (
        lambda x, y, g: local.npu_grouped_matmul([x.t()], [y], group_list=g, split_item=2, group_type=2, group_list_type=1),
        (X, torch.rand(6, 3), COUNTS),
    ),
    "grouped-each": (lambda x, w: local.npu_grouped_matmul([x, x], [w, w], group_type=-1), (X, torch.rand(8, 4))),
    "swiglu": (lambda x: local.npu_swiglu(x, -1), (X,)),
    "dynamic_quant": (local.npu_dynamic_quant, (X,)),
    "dynamic_quant-groups": (
        lambda x, s, g: local.npu_dynamic_quant(x, smooth_scales=s, group_index=g),
        (X, torch.rand(3, 8), COUNTS.cumsum(0)),
    ),
    "dequant_swiglu_quant": (
        lambda x, w, a, g: local.npu_dequant_swiglu_quant(
            x, weight_scale=w, activation_scale=a, group_index=g, activate_left=True, quant_mode=1
        ),
        ((X * 1000).int(), torch.rand(3, 8), torch.rand(6), COUNTS),
    ),
    "gating_top_k": (
        lambda x, b: local.npu_moe_gating_top_k(
            x, 3, bias=b, k_group=2, group_count=4, group_select_mode=1, norm_type=1, routed_scaling_factor=2.0
        ),
        (X, torch.rand(8)),
    ),
    "gating_top_k_softmax": (lambda x: local.npu_moe_gating_top_k_softmax(x, None, 3), (X,)),
    "init_routing": (
        lambda x, i: local.npu_moe_init_routing_v2(
            x, i, expert_num=6, expert_tokens_num_type=1, expert_tokens_num_flag=True, active_expert_range=[1, 4]
        ),
        (X, IDS),
    ),
    "init_routing-quant": (
        lambda x, i, s: local.npu_moe_init_routing_v2(
            x, i, scale=s, active_num=9, expert_num=6, expert_tokens_num_type=2, expert_tokens_num_flag=True, quant_mode=1
        ),
        (X, IDS, torch.rand(6, 8)),
    ),
    "finalize_routing": (
        lambda r, s, b, p, i, e: local.npu_moe_finalize_routing(r, s, s, b, p, i, e, 2),
        (torch.rand(12, 8), X, torch.rand(6, 8), torch.rand(6, 2), torch.randperm(12), IDS),
    ),
    "token_permute": (lambda x, i: local.npu_moe_token_permute(x, i, 9), (X, IDS)),
    "token_unpermute": (local.npu_moe_token_unpermute, (torch.rand(12, 8), torch.randperm(12), torch.rand(6, 2))),
    "re_routing": (
        lambda x, c, s: local.npu_moe_re_routing(x, c, per_token_scales=s),
        (X, torch.tensor([[1, 2], [0, 2]]), torch.rand(6)),
    ),
}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", list(CASES))
def test_compiled_equals_eager(name: str, dynamic: bool) -> None:
    function, tensors = CASES[name]
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    wanted, got = pytree.tree_leaves(function(*tensors)), pytree.tree_leaves(compiled(*tensors))
    assert [(t.shape, t.dtype) for t in got] == [(t.shape, t.dtype) for t in wanted]
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_one_graph_serves_many_sizes() -> None:
    graphs = []

    def counting(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    def layer(x: torch.Tensor, ids: torch.Tensor, weight: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        rows, index, counts, _ = local.npu_moe_init_routing_v2(
            x, ids, expert_num=6, expert_tokens_num_type=1, expert_tokens_num_flag=True
        )
        (rows,) = local.npu_grouped_matmul([rows], [weight], group_list=counts, **BY_GROUP)
        return local.npu_moe_finalize_routing(local.npu_swiglu(rows), None, None, None, gates, index, None, 2)

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=counting, dynamic=True)
    weight = torch.rand(6, 8, 10)
    for num_tokens in (5, 4, 3):  # the first differs from the other sizes, which torch would take for the same symbol
        call = X[:num_tokens], IDS[:num_tokens], weight, torch.rand(num_tokens, 2)
        torch.testing.assert_close(compiled(*call), layer(*call), rtol=0, atol=0)
    assert len(graphs) == 1


def test_values_are_checked_when_the_graph_runs() -> None:
    function, (x, w, b, _) = CASES["grouped"]
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    compiled(x, w, b, torch.tensor([1, 2, 3]))
    with pytest.raises(ArgumentError, match=r"group_list = \[1, 2, 4\].*at most 6 rows"):
        compiled(x, w, b, torch.tensor([1, 2, 4]))


def test_forms_are_checked_when_the_graph_is_made() -> None:
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="npu_swiglu: 1 broken rule"):
        torch.compile(local.npu_swiglu, fullgraph=True, backend="aot_eager")(torch.zeros(2, 5))


@pytest.mark.parametrize("group_list_type", [0, 1])
def test_internal_operators(group_list_type: int) -> None:
    group_list = torch.tensor([2, 2, 5] if group_list_type == 0 else [2, 0, 3])
    ops = torch.ops.commfuse
    weight, none = [torch.rand(3, 8, 4)], list[torch.Tensor]()
    common = (group_list, group_list_type, torch.float32)
    torch.library.opcheck(ops.local_grouped_matmul.default, (X, weight, none, none, none, none, None, *common))
    torch.library.opcheck(ops.local_grouped_weight_gradient.default, (X.t(), torch.rand(6, 3), *common))


def test_export() -> None:
    class Layer(torch.nn.Module):
        def forward(self, x: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
            return local.npu_grouped_matmul([x], [weight], group_list=counts, **BY_GROUP)[0]

    call = X, torch.rand(3, 8, 4), COUNTS
    exported = torch.export.export(Layer(), call)
    assert torch.equal(exported.module()(*call), Layer()(*call))
