"""What became of the cases, for all tests of this folder: every module's cases are carried out once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.conftest import RunRanks

from . import case as alone
from .case import Outcome
from .page import MODULES

Outcomes = dict[str, list[Outcome]]


@pytest.fixture(scope="session")
def outcomes(_pool: Any, run_ranks: RunRanks, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Outcomes]:
    """Outcomes of the cases of a module, carried out once, also where that fails."""
    known: dict[str, Outcomes | AssertionError] = {}

    def of(module: str) -> Outcomes:
        if module not in known:
            carry_out = MODULES.get(module, alone.carry_out)
            _pool.close()  # fresh ranks: cases change backends, so what groups have been on before would count
            try:
                known[module] = carry_out(run_ranks, f"tests.misuse.{module}", tmp_path_factory.mktemp(module))
            except AssertionError as error:
                known[module] = error
        found = known[module]
        if isinstance(found, AssertionError):
            raise found
        return found

    return of
