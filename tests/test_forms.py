"""A repeated call is not checked again, and a call that only looks like it is: forms are kept by all that they depend on."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import numpy as np
import pytest
import torch

import commfuse
from commfuse import call as calls
from commfuse.call import Call, bind
from commfuse.groups import Group
from commfuse.operators import OPERATORS

DISPATCH = OPERATORS["npu_moe_distribute_dispatch_v2"]
DEFAULTS = {row.name: getattr(row, "default", None) for row in DISPATCH.args}


def bound(**changes: Any) -> Call:
    group = Group(name="ep", size=2, rank=0, members=(0, 1), process_group=weakref.ref(set()))  # type: ignore[arg-type]
    x, expert_ids = torch.zeros(2, 8, dtype=torch.bfloat16), torch.tensor([[0, 1], [2, 3]], dtype=torch.int32)
    given = {"x": x, "expert_ids": expert_ids, "group_ep": "ep", "ep_world_size": 2, "ep_rank_id": 0, "moe_expert_num": 4}
    return bind(DISPATCH, {**DEFAULTS, **given, **changes}, group, lambda name: group)


@pytest.fixture(autouse=True)
def _no_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "_forms", {})


def test_a_repeated_call_finds_its_form() -> None:
    first = bound()
    assert first.broken == ()
    for again in ({}, {"x": torch.ones(2, 8, dtype=torch.bfloat16)}, {"x_active_mask": None}):
        assert bound(**again).form is first.form


@pytest.mark.parametrize(
    "change",
    [
        {"x": torch.zeros(3, 8, dtype=torch.bfloat16), "expert_ids": torch.tensor([[0, 1]] * 3, dtype=torch.int32)},
        {"x": torch.zeros(2, 8, dtype=torch.float16)},
        {"x": torch.zeros(8, 2, dtype=torch.bfloat16).T},
        {"x_active_mask": torch.ones(2, dtype=torch.bool)},
        {"moe_expert_num": 8},
        {"group_tp": "other"},
    ],
    ids=["tokens", "dtype", "strides", "mask", "experts", "group"],
)
def test_a_call_of_another_kind_does_not(change: dict[str, Any]) -> None:
    first = bound()
    assert bound(**change).form is not first.form


@pytest.mark.parametrize("value", [4.0, "4", torch.tensor(4.0)], ids=repr)
def test_an_equal_value_of_a_wrong_kind_is_refused_after_a_good_call(value: Any) -> None:
    bound()
    for _ in range(2):
        assert any(
            text.startswith("moe_expert_num = ") and "must be an int" in text for text in bound(moe_expert_num=value).broken
        )


@pytest.mark.parametrize("value", [np.int64(4), torch.tensor(4)], ids=repr)
def test_an_int_in_another_dress_is_taken_as_one(value: Any) -> None:
    for _ in range(2):
        made = bound(moe_expert_num=value)
        assert made.broken == ()
        assert type(made["moe_expert_num"]) is int


def test_an_int_that_changes_is_looked_at_each_time() -> None:
    experts = torch.tensor(4)
    assert bound(moe_expert_num=experts)["moe_expert_num"] == 4
    experts.fill_(8)
    assert bound(moe_expert_num=experts)["moe_expert_num"] == 8


def test_the_data_are_checked_each_time() -> None:
    assert bound().broken == ()
    wrong = torch.tensor([[0, 1], [2, 4]], dtype=torch.int32)
    twice = torch.tensor([[0, 1], [2, 2]], dtype=torch.int32)
    assert bound(expert_ids=wrong).broken == ("expert_ids[1, 1] = 4: must be in 0..3 (moe_expert_num)",)
    assert "must differ from expert_ids[1, 0]" in bound(expert_ids=twice).broken[0]
    assert bound().broken == ()


def test_the_product_and_its_environment_belong_to_the_form(monkeypatch: pytest.MonkeyPatch) -> None:
    assert bound().broken == ()
    with commfuse.product("A3"):
        few = bound().broken
        assert few
        monkeypatch.setenv("HCCL_BUFFSIZE", "1")
        assert bound().broken != few
        of_a3 = bound().form
    with commfuse.product("A2"):
        assert bound().form is not of_a3
    assert bound().broken == ()


def test_a_form_keeps_no_tensor_of_a_call() -> None:
    x = torch.zeros(2, 8, dtype=torch.bfloat16)
    seen = weakref.ref(x)
    bound(x=x)
    del x
    gc.collect()
    assert seen() is None
