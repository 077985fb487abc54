"""Every misuse case reads what it says, on every rank alike, and leaves the group usable; odd but right calls run."""

from __future__ import annotations

import os
import pickle
import re
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from unittest import mock

import pytest
import torch

import commfuse
from commfuse.checking.moe_distribute import groups_of
from commfuse.operators import OPERATORS
from commfuse.spec.model import Rule, Tensor
from tests.conftest import RunRanks

from . import all_gather_mm, combine, dispatch, gmm_alltoallv, odd
from .bases import A2, ELASTIC
from .case import COMBINE, DISPATCH, TIMEOUT, Misuse, Odd, Outcome, hold_against_golden, plain_calls

Outcomes = dict[str, list[Outcome]]

# What no call can break: torch gives no group a name of 128 characters.
UNREACHABLE = {(name, "1 to 127 characters") for name in ("group_ep", "hcom")}

# Which module has the cases of which operator.
CATALOGUE = [
    (DISPATCH, "dispatch"),
    (COMBINE, "combine"),
    ("npu_gmm_alltoallv", "gmm_alltoallv"),
    ("npu_alltoallv_gmm", "gmm_alltoallv"),
    ("npu_all_gather_base_mm", "all_gather_mm"),
    ("npu_mm_reduce_scatter_base", "all_gather_mm"),
    ("npu_mm_all_reduce_base", "all_gather_mm"),
    ("_npu_distribute_barrier", "all_gather_mm"),
]


def check(case: Misuse, found: list[Outcome]) -> None:
    """Assert that every process raised the same error with the right text, and that its group is usable."""
    text = found[0].text
    assert [one.error for one in found] == [case.error.__name__] * len(found), text
    by_domain = {(one.domain if case.own_domain else "", one.text) for one in found}
    assert len(by_domain) == len({domain for domain, _ in by_domain}), by_domain
    missing = [fragment for fragment in (case.operator, *case.says) if fragment not in text]
    assert not missing, f"{missing} not in:\n{text}"
    assert [one.afterwards for one in found] == [""] * len(found)


@pytest.mark.parametrize("case", dispatch.CASES, ids=lambda case: case.id)
def test_dispatch(outcomes: Callable[[str], Outcomes], case: Misuse) -> None:
    check(case, outcomes("dispatch")[case.id])


@pytest.mark.parametrize("case", combine.CASES, ids=lambda case: case.id)
def test_combine(outcomes: Callable[[str], Outcomes], case: Misuse) -> None:
    check(case, outcomes("combine")[case.id])


@pytest.mark.parametrize("case", gmm_alltoallv.CASES, ids=lambda case: case.id)
def test_gmm_alltoallv(outcomes: Callable[[str], Outcomes], case: Misuse) -> None:
    check(case, outcomes("gmm_alltoallv")[case.id])


@pytest.mark.parametrize("case", all_gather_mm.CASES, ids=lambda case: case.id)
def test_all_gather_mm(outcomes: Callable[[str], Outcomes], case: Misuse) -> None:
    check(case, outcomes("all_gather_mm")[case.id])


@pytest.mark.parametrize("case", odd.CASES, ids=lambda case: case.id)
def test_odd_and_right(outcomes: Callable[[str], Outcomes], case: Odd) -> None:
    for one in outcomes("odd")[case.id]:
        assert (one.error, one.text, one.differs, one.afterwards) == ("", "", "", "")


# --- the catalogue has a case for everything that can be wrong ---------------------------------------------------------------------


@pytest.mark.parametrize(("operator", "module"), CATALOGUE)
def test_every_rule_has_a_case(outcomes: Callable[[str], Outcomes], operator: str, module: str) -> None:
    lines = list(read_lines(outcomes(module), operator))
    rules = [rule for rule in OPERATORS[operator].rules if (rule.subject, rule.must) not in UNREACHABLE]
    missing = [(rule.subject, rule.must, rule.when) for rule in rules if not any(is_of(rule, line) for line in lines)]
    assert not missing


@pytest.mark.parametrize(("operator", "module"), CATALOGUE)
def test_every_argument_has_cases(outcomes: Callable[[str], Outcomes], operator: str, module: str) -> None:
    lines = list(read_lines(outcomes(module), operator))
    wanted = []
    for row in OPERATORS[operator].args:
        if row.name == OPERATORS[operator].group:
            continue  # a group that is not there is a GroupError: tests/test_groups.py
        if not isinstance(row, Tensor):
            wanted.append(rf"{row.name} = .*: must be .*, got ")
            continue
        wanted.append(rf"{row.name} = .*: must be a tensor( or None)?, got ")
        if row.when == "False":
            continue  # no tensor is accepted, whatever its shape
        wanted.append(rf"{row.name}\.dtype = .*: must be ")
        wanted += [rf"{row.name}\.shape = .*: must be .*[123]-D", rf"{row.name} = None: must be a tensor"][: 2 - row.optional]
    unique = {pattern for pattern in wanted if not any(re.match(pattern, line) for line in lines)}
    assert not unique


def test_ids_are_unique() -> None:
    for module in (dispatch, combine, gmm_alltoallv, all_gather_mm, odd):
        names = [case.id for case in module.CASES]
        assert len(names) == len(set(names))


def read_lines(outcomes: Outcomes, operator: str) -> Iterable[str]:
    for found in outcomes.values():
        for one in found:
            if not one.text.startswith(operator):
                continue
            yield from (line.strip() for line in one.text.splitlines())


def is_of(rule: Rule, line: str) -> bool:
    """Whether ``line`` is what a user reads about ``rule``."""
    condition = f" when {rule.when}" if rule.when != "True" else ""
    must = re.sub(r"\\\{.*?\\\}", ".*", re.escape(rule.must))
    return re.fullmatch(rf"{re.escape(rule.subject)} = .*: must be {must}{re.escape(condition)}(;.*)?  \[.*\]", line) is not None


# --- one rank alone, and products that only warn -----------------------------------------------------------------------------------


def removed(rank: int) -> str:
    """Ranks 0, 1 and 3 carry on without rank 2, which calls all the same."""
    args = {**ELASTIC.dispatch_args(rank), "group_ep": groups_of(ELASTIC)[0][0]}
    args["elastic_info"] = torch.tensor([1, 3, 0, 6, 0, 1, -1, 2, 0, 1, 3, -1], dtype=torch.int32)
    args["expert_ids"][:] = torch.arange(3, dtype=torch.int32)
    try:
        with commfuse.config.override(timeout=TIMEOUT):
            commfuse.npu_moe_distribute_dispatch_v2(**args)
    except commfuse.ArgumentError as error:
        return str(error)
    return ""


def test_removed_rank_that_calls_reads_why_and_the_others_go_on(run_ranks: RunRanks) -> None:
    texts = run_ranks(4, removed)
    assert [texts[0], texts[1], texts[3]] == [""] * 3
    assert texts[2].startswith(f"{DISPATCH}: refused on rank 2 of 4")
    assert "elastic_info[6] = -1: this rank (ep_rank_id = 2) is removed and must not call" in texts[2]


def warned(rank: int, how: str) -> tuple[list[tuple[str, str]], bytes]:
    """Dispatch and combine where A2 only warns: (text, file) of each warning, and the plain calls."""
    with (
        warnings.catch_warnings(record=True) as caught,
        mock.patch.dict(os.environ),
        commfuse.config.override(product="portable"),
    ):
        warnings.simplefilter("always")
        if how == "environment":
            os.environ["COMMFUSE_PRODUCT"] = "A2,warn"
            commfuse.config.set(product=None)
        else:
            commfuse.product("A2", warn=True)
        plain = plain_calls(rank, A2)
    told = [(str(warning.message), warning.filename) for warning in caught if warning.category is commfuse.CommfuseWarning]
    return told, pickle.dumps(plain)


@pytest.mark.parametrize("how", ["environment", "program"])
def test_product_that_warns(run_ranks: RunRanks, how: str) -> None:
    replies = run_ranks(4, warned, how)
    for told, _ in replies:
        assert len(told) == 2
        for operator, (text, file) in zip((DISPATCH, COMBINE), told, strict=True):
            assert text.startswith(
                f"{operator}: A2 would refuse this call: ep_world_size = 4: must be one of 16, 32, 64, 128, 256"
            )
            assert "npu_moe_distribute_dispatch_v2 page, ep_world_size" in text
            assert Path(file).name == "case.py"  # Python shows the line that calls
    hold_against_golden([{(A2, "A2,warn"): pickle.loads(plain)} for _, plain in replies])
