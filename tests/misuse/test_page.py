"""docs/misuse.md is what the cases read, today."""

from __future__ import annotations

import difflib
from collections.abc import Callable

import pytest

from .conftest import Outcomes
from .page import MODULES, PAGE, first_texts, page


@pytest.mark.long
def test_the_page_is_what_one_reads(outcomes: Callable[[str], Outcomes]) -> None:
    fresh = page({module: first_texts(outcomes(module)) for module in MODULES})
    written = PAGE.read_text(encoding="utf-8")
    changes = list(difflib.unified_diff(written.splitlines(), fresh.splitlines(), "docs/misuse.md", "what is read", lineterm=""))
    assert not changes, "run `make docs`:\n" + "\n".join(changes[:40])
    assert fresh.count("\n```text\n") >= 500
