"""Ranks that do not call the same: one error on all of them, which says who believes what, on every backend; then they go on."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import commfuse
from commfuse import config
from commfuse.operators import OPERATORS
from tests.conftest import RunRanks

from . import mismatches
from .mismatches import ROWS, Args, Differ

BACKENDS = "cpu", "portable"
SETTINGS = {"timeout": 20.0, "first_timeout": 20.0}  # who is left waiting reads an ExchangeError, and the case fails


def changed(row: Differ, args: Args) -> Args:
    """``args`` after the row's statements."""
    around = {"torch": torch, "np": np, "commfuse": commfuse, "__builtins__": __builtins__}
    variables = {**args, **around}
    exec(row.wrong, variables)
    return {name: value for name, value in variables.items() if name not in around}


def told(call: Callable[[], Any]) -> tuple[str, str]:
    try:
        call()
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


def every_row(rank: int, backend: str) -> list[tuple[str, str, str]]:
    """For each row: kind and text of the error, and what is wrong with the plain call after it."""
    with config.override(backend=backend, product="portable", **SETTINGS), warnings.catch_warnings():
        warnings.simplefilter("ignore", commfuse.CommfuseWarning)
        return [one_row(rank, row) for row in ROWS]


def one_row(rank: int, row: Differ) -> tuple[str, str, str]:
    args = mismatches.plain_args(row.operator, rank, row.case)
    with config.override(product="portable"):
        kind, text = told(lambda: mismatches.call(row.operator, changed(row, args) if rank == 1 else args))
    again = mismatches.plain_args(row.operator, rank, row.case)
    return kind, text, told(lambda: mismatches.call(row.operator, again))[1]


@pytest.fixture(scope="module")
def outcomes(run_ranks: RunRanks) -> Callable[[str], dict[Differ, list[tuple[str, str, str]]]]:
    known: dict[str, Any] = {}

    def of(backend: str) -> dict[Differ, list[tuple[str, str, str]]]:
        if backend not in known:
            known[backend] = dict(zip(ROWS, zip(*run_ranks(2, every_row, backend, deadline=120), strict=True), strict=True))
        return known[backend]

    return of


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.operator}-{row.what.replace(' ', '-')}")
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_difference_is_named_on_both_ranks(outcomes: Any, backend: str, row: Differ) -> None:
    (kind, text, again), (other_kind, other_text, other_again) = outcomes(backend)[row]
    assert (kind, text) == (other_kind, other_text)
    assert kind == ("ArgumentError" if row.refused else "MismatchError"), text
    assert row.operator in text
    if row.refused:
        assert "refused on rank 1 of 2" in text
        assert f"{row.what} = " in text
    else:
        (line,) = (line for line in text.splitlines() if line.startswith(f"  {row.what}: "))
        assert " on rank 0 of 2; " in line
        assert line.endswith(" on rank 1 of 2")
    assert (again, other_again) == ("", "")


def test_everything_that_must_agree_has_a_row() -> None:
    wanted = {(name, what) for name, operator in OPERATORS.items() for what in ("product", *operator.agree) if operator.agree}
    assert {(row.operator, row.what) for row in ROWS} == wanted
    assert len(wanted) > 100
