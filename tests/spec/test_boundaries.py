"""Every rule of the operators at its ends, and every expression of their rows on valid calls. No ranks are needed.

A misspelt name in a row would not be noticed otherwise: a rule that lacks what it needs counts as not broken.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch

import commfuse
from commfuse.call import Call, bind, fake_outputs
from commfuse.config import A2, A3, PORTABLE
from commfuse.groups import Group
from commfuse.operators import OPERATORS
from commfuse.operators.all_gather_mm.cases import AllReduceCase, BarrierCase, GatherScatterCase
from commfuse.operators.gmm_alltoallv.cases import GmmCase
from commfuse.operators.moe_distribute.cases import RoundTrip
from commfuse.spec.check import broken, violations
from commfuse.spec.model import Operator, Output, Rule
from commfuse.spec.scope import Scope, TensorInfo
from tests.misuse import bases

DISPATCH, COMBINE = (OPERATORS[f"npu_moe_distribute_{name}_v2"] for name in ("dispatch", "combine"))
PRODUCTS = (PORTABLE, A3, A2)

A2_16 = replace(bases.A2, id="a2-16", world_size=16, num_tokens=(2,) * 16, moe_expert_num=16)
A2_16_HIERARCHY = replace(A2_16, id="a2-16-hierarchy", comm_alg="hierarchy", with_expert_scales=True)

# Calls that a product accepts, which together make every rule apply that such calls can make apply.
VALID: list[tuple[str, RoundTrip]] = [
    *((PORTABLE, case) for case in (bases.PLAIN, bases.INT8, bases.SPECIAL, bases.SHARED, bases.TWO_SHARED, bases.MASKED)),
    *((PORTABLE, case) for case in (bases.MASKED_PAIRS, bases.SHARED_ROWS, bases.ELASTIC, bases.PARTNERS, bases.TP_ONE)),
    (PORTABLE, replace(bases.SHARED_ROWS, id="shared-rows-3d", shared_expert_x=3)),
    (PORTABLE, replace(bases.SPECIAL, id="special-2d", alpha="2d")),
    (PORTABLE, replace(bases.PLAIN, id="uneven", num_tokens=(3, 0, 1, 2), global_bs="max", with_performance_info=True)),
    *((A3, case) for case in (bases.A3, bases.A3_V2, bases.A3_PARTNERS)),
    (A3, replace(bases.A3, id="a3-everything", quant_mode=2, smooth=True, copy_expert_num=1, const_expert_num=1, mask="1d")),
    (A3, replace(bases.A3, id="a3-shared", shared_expert_rank_num=2, moe_expert_num=4)),
    (A3, replace(bases.A3, id="a3-uneven", num_tokens=(2, 1, 1, 2), global_bs="max")),
    (A2, A2_16),
    (A2, A2_16_HIERARCHY),
    (A2, replace(A2_16, id="a2-16-uneven", num_tokens=(2,) * 15 + (1,), global_bs="max")),
]

# The same for operators that stand alone; the sizes on A3 are those of the published examples.
_A3_EXPERTS = GmmCase(
    id="a3", world_size=8, num_experts=4, pattern="uniform", largest=128, H1=2048, N1=16, BS=512, dtype=torch.float16
)
_MM: dict[str, dict[str, Any]] = {
    "plain": {"bias": True},
    "int8": {"x2_scale": torch.float32, "x1_scale": True, "comm_mode": "aiv"},
}
_REDUCE: dict[str, dict[str, Any]] = {
    "plain": {"bias": True, "x3": True, "rows": (2, 3)},
    "antiquant": {"antiquant": "row", "antiquant_offset": True},
    "groups": {"antiquant": "group", "group_size": 100, "antiquant_offset": True},
    "int8": {"dequant": "column", "pertoken": True, "bias": True, "comm_quant": "row"},
}
ALONE: list[tuple[str, str, Any]] = [
    (PORTABLE, "npu_gmm_alltoallv", GmmCase(id="plain", BS=4, trans_mm_weight=True)),
    (PORTABLE, "npu_gmm_alltoallv", GmmCase(id="no-shared-expert")),
    (PORTABLE, "npu_alltoallv_gmm", GmmCase(id="no-shared-expert", operator="alltoallv_gmm")),
    (PORTABLE, "npu_alltoallv_gmm", GmmCase(id="plain", operator="alltoallv_gmm", BS=4, permute_out_flag=True)),
    (A3, "npu_gmm_alltoallv", _A3_EXPERTS),
    (A3, "npu_alltoallv_gmm", replace(_A3_EXPERTS, operator="alltoallv_gmm", trans_gmm_weight=True)),
    *(
        (product, f"npu_{operator}", GatherScatterCase(id=name, operator=operator, world_size=8, m=16, k=512, n=64, **more))
        for product in PRODUCTS
        for operator in ("all_gather_base_mm", "mm_reduce_scatter_base")
        for name, more in _MM.items()
    ),
    (A3, "npu_all_gather_base_mm", GatherScatterCase(id="32-ranks-aiv", world_size=32, m=1, k=256, n=4, comm_mode="aiv")),
    *(
        (product, "npu_mm_all_reduce_base", AllReduceCase(id=name, world_size=8, k=512, **more))
        for product in PRODUCTS
        for name, more in _REDUCE.items()
    ),
    *((product, "_npu_distribute_barrier", BarrierCase(id="plain", elastic_info=True, time_out=1)) for product in PRODUCTS),
]


@dataclass(frozen=True, kw_only=True)
class Bound:
    """A valid call of one rank and the names in it."""

    id: str
    operator: Operator
    product: str
    call: Call

    def scope(self, product: str = "", **changes: Any) -> Scope:
        """A scope of one's own, as ``product`` would have it, with some names changed; symbols are worked out anew."""
        derived = {symbol.name for symbol in self.operator.symbols}
        plain = {name: value for name, value in self.call.scope.items() if name not in derived}
        environment = {"HCCL_BUFFSIZE": 200, "HCCL_INTRA_PCIE_ENABLE": 0, "HCCL_INTRA_ROCE_ENABLE": 0}
        scope = Scope({**environment, **plain, "product": product or self.product, **changes}, self.operator.symbols)
        scope.origin.update(self.call.scope.origin)
        return scope


def domain(name: str, size: int, rank: int) -> Group:
    """A domain in name only: nothing is sent in this file."""
    return Group(name=name, size=size, rank=rank, members=tuple(range(size)), process_group=weakref.ref(set()))  # type: ignore[arg-type]


def complete(operator: Operator, case: RoundTrip, args: dict[str, Any]) -> dict[str, Any]:
    given = {**args, "group_ep": "ep", "group_tp": "tp" if case.tp_world_size == 2 else ""}
    return {row.name: given[row.name] if row.name in given else getattr(row, "default", None) for row in operator.args}


@cache
def valid_calls() -> tuple[Bound, ...]:
    """Every call of VALID on the first and the last rank: they may have different roles."""
    found = []
    for product, case in VALID:
        for rank in (0, case.world_size - 1):
            with commfuse.config.override(product=product):
                there = complete(DISPATCH, case, case.dispatch_args(rank))
                outputs = [torch.zeros(shape[0], dtype=shape[1]) for shape in fake_outputs(DISPATCH, there) if shape]
                y = torch.zeros(outputs[0].shape, dtype=case.dtype)
                home = complete(COMBINE, case, case.combine_args(rank, 0, outputs, y))
                for operator, args in ((DISPATCH, there), (COMBINE, home)):
                    call = bind(operator, args, domain("ep", case.world_size, rank), lambda name: domain(name, 2, 0))
                    found.append(Bound(id=f"{product}-{case.id}-rank-{rank}", operator=operator, product=product, call=call))
    return (*found, *calls_alone())


def calls_alone() -> Iterator[Bound]:
    """Every call of ALONE, on the last rank."""
    for product, name, case in ALONE:
        operator, rank = OPERATORS[name], case.world_size - 1
        args = {"input" if key == "self" else key: value for key, value in case.args(rank).items()}
        args = {row.name: args.get(row.name, getattr(row, "default", None)) for row in operator.args} | {operator.group: "ep"}
        with commfuse.config.override(product=product):
            call = bind(operator, args, domain("ep", case.world_size, rank), lambda name: domain(name, 2, 0))
        yield Bound(id=f"{product}-{case.id}", operator=operator, product=product, call=call)


def calls_of(operator: Operator) -> Iterator[Bound]:
    return (one for one in valid_calls() if one.operator is operator)


def scopes_where(operator: Operator, rule: Rule) -> Iterator[Scope]:
    """Scopes, under the products that have ``rule``, in which it applies; also of calls that another product or algorithm accepts."""
    for changes in ({}, {"comm_alg": "fullmesh_v2"}):
        for one in calls_of(operator):
            for product in PRODUCTS:
                if product in rule.on and one.scope(product, **changes).eval(rule.when):
                    yield one.scope(product, **changes)


def name_of(rule: Rule) -> str:
    return re.sub(
        r"[^A-Za-z0-9_]+", "-", f"{rule.subject} {rule.low} {rule.high} {rule.must[:20]} {rule.when} {'-'.join(sorted(rule.on))}"
    )


CHECKED = (DISPATCH, COMBINE, *(OPERATORS[name] for name in dict.fromkeys(name for _, name, _ in ALONE)))
PAIRS = [(operator, rule) for operator in CHECKED for rule in operator.rules]
EVERY_RULE = pytest.mark.parametrize(
    ("operator", "rule"), [pytest.param(*pair, id=f"{pair[0].name[4:]}-{name_of(pair[1])}") for pair in PAIRS]
)
RANGES = [pair for pair in PAIRS if pair[1].low]
EVERY_RANGE = pytest.mark.parametrize(
    ("operator", "rule"), [pytest.param(*pair, id=f"{pair[0].name[4:]}-{name_of(pair[1])}") for pair in RANGES]
)


# --- rules at their ends -----------------------------------------------------------------------------------------------------------


def at(operator: Operator, rule: Rule, value: int) -> str:
    """What ``rule`` says of a call in which its subject is ``value``."""
    scope = next(scopes_where(operator, rule))
    first, *others = dict.fromkeys(re.findall(r"[A-Za-z_]\w*", rule.subject))
    scope |= {first: value, **dict.fromkeys(others, 1)}
    assert scope.eval(rule.subject) == value
    assert scope.eval(rule.when)
    return broken(rule, scope)


@EVERY_RANGE
def test_ends(operator: Operator, rule: Rule) -> None:
    scope = next(scopes_where(operator, rule))
    low = scope.eval(rule.low)
    high = scope.eval(rule.high) if rule.high else low + 1_000_000
    for value in (low, min(low + 1, high), max(high - 1, low), high):
        assert at(operator, rule, value) == ""
    for value in (low - 1, high + 1) if rule.high else (low - 1,):
        text = at(operator, rule, value)
        allowed = f"in {rule.low}..{rule.high}" if rule.high else f"at least {rule.low}"
        assert text.startswith(f"{rule.subject} = {value}")
        assert f": must be {allowed}" in text
        assert re.search(rf"\b{low}\.\.{high}\b" if rule.high else rf"\b{low}\b", text)
        assert text.endswith(f"[{rule.source}]")


def test_there_are_ranges() -> None:
    assert len(RANGES) > 40
    assert {product for _, rule in RANGES for product in rule.on} == set(PRODUCTS)


# --- nothing in the rows is misspelt -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("one", valid_calls(), ids=lambda one: f"{one.operator.name[4:]}-{one.id}")
def test_valid_calls_break_no_rule(one: Bound) -> None:
    assert violations(one.operator, one.scope(), one.product) == []


@EVERY_RULE
def test_rule_evaluates(operator: Operator, rule: Rule) -> None:
    assert rule.source.strip()
    applies = list(scopes_where(operator, rule))  # evaluates `when` on every call of every product that has the rule
    assert applies, "no call makes this rule apply"
    for scope in applies:
        scope.eval(rule.test)
        scope.eval(rule.subject)
        for shown in re.findall(r"{([^}]*)}", rule.must):
            scope.eval(shown)


@pytest.mark.parametrize("operator", CHECKED, ids=lambda operator: operator.name)
def test_other_rows_evaluate(operator: Operator) -> None:
    evaluated = {symbol.name: False for symbol in operator.symbols}
    for one in calls_of(operator):
        scope = one.scope()
        for expression in filter(None, (*operator.agree, operator.world_size, operator.rank, operator.partner_when)):
            scope.eval(expression)
        for output in operator.outputs:
            assert_output(scope, output)
        for row in operator.tensors:
            info = scope[row.name]
            if isinstance(info, TensorInfo) and scope.eval(row.when):
                sizes = next(shape for shape in row.shapes if len(shape) == info.ndim)
                assert tuple(scope.eval(size) for size in sizes) == info.shape
        for name in evaluated:
            evaluated[name] |= evaluates(operator, scope, name)
    assert all(evaluated.values()), evaluated


def assert_output(scope: Scope, row: Output) -> None:
    assert scope.eval(row.given) in (True, False)
    if scope.eval(row.given):
        assert all(size >= 0 for size in scope.sizes(row.shape))
        assert isinstance(getattr(torch, scope.eval(row.dtype)), torch.dtype)


def evaluates(operator: Operator, scope: Scope, name: str) -> bool:
    """Whether the symbol has a value in this call; a name that no tensor of the operator defines raises NameError all the same."""
    absent = {size for row in operator.tensors if scope[row.name] is None for shape in row.shapes for size in shape}
    try:
        scope.eval(name)
    except ZeroDivisionError:
        return False
    except NameError as error:
        if error.name in absent:
            return False
        raise
    return True
