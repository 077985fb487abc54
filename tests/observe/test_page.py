"""The program and the table of docs/observing.md are what one writes and reads."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import commfuse
from tests.conftest import RunRanks

PAGE = (Path(__file__).parents[2] / "docs" / "observing.md").read_text()


def run_program(rank: int, source: str) -> str:
    namespace: dict[str, Any] = {}
    exec(source, namespace)
    with commfuse.config.override(backend="cpu"):
        return str(namespace["example"](rank))


def words(text: str) -> list[str]:
    """The table's words without its figures and the group's name; who was the longest differs."""
    return re.sub(r"[\d,]+\.\d|'\w+'|longest", "", text).split()


def test_the_table_on_the_page_is_what_the_program_prints(run_ranks: RunRanks) -> None:
    source = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)[0]
    drawn = re.findall(r"```\n(group .*?)```", PAGE, re.DOTALL)[0]
    assert words(run_ranks(4, run_program, source)[0]) == words(drawn)
