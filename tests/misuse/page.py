"""``python -m tests.misuse.page``: carry out every misuse case and write docs/misuse.md, what one writes and what one reads.

The tests compare the page with the texts that they have just read (test_page.py), so it cannot grow old unseen.
"""

from __future__ import annotations

import importlib
import itertools
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from commfuse.operators import OPERATORS
from commfuse.ranks import Ranks

from . import case as alone
from . import chains
from .case import Misuse, Outcome

PAGE = Path(__file__).parents[2] / "docs" / "misuse.md"
MODULES: Mapping[str, Callable[..., dict[str, list[Outcome]]]] = {  # where cases are, and what carries them out
    "dispatch": alone.carry_out,
    "combine": alone.carry_out,
    "gmm_alltoallv": alone.carry_out,
    "all_gather_mm": alone.carry_out,
    "companions": chains.carry_out,
    "split": chains.carry_out,
}

HEAD = """\
# What one writes wrongly, and what one reads

Every entry is a test: the call is valid until somebody, on every rank or on one, writes the statements shown about its
arguments; then every rank reads the message (of a teardown: its own rank's), and the next, right call runs. This page is
written by `make docs` from what those tests read. {shown:,} of the {all:,} cases are here; left out are those whose message
asks for the same as one above, about another argument, value or operator.

What the classes mean, and in which state an error leaves its group: [Errors](errors.md).
"""


def page(texts: Mapping[str, Mapping[str, str]]) -> str:
    """Return the page; ``texts``: by module and case id, what the first process has read."""
    everything = [(case, readable(texts[module][case.id])) for module in MODULES for case in cases(module)]
    everything.sort(key=lambda pair: list(OPERATORS).index(pair[0].operator))
    shown = list(unlike(everything))
    parts = [HEAD.format(shown=len(shown), all=len(everything))]
    for operator, entries in itertools.groupby(shown, key=lambda pair: pair[0].operator):
        parts += [f"\n## {operator}\n", *(entry(case, text) for case, text in entries)]
    return "".join(parts)


def cases(module: str) -> list[Misuse]:
    """The cases of a module."""
    found: list[Misuse] = importlib.import_module(f"tests.misuse.{module}").CASES
    return found


def unlike(entries: Iterable[tuple[Misuse, str]]) -> Iterator[tuple[Misuse, str]]:
    """Those of ``entries`` whose message says something that none before has said."""
    said: set[Any] = set()
    for case, text in entries:
        key = case.error, case.product, case.on_rank is None, tuple(re.sub(r"'.*?'|\d+", "_", line) for line in _demands(text))
        if key not in said:
            said.add(key)
            yield case, text


def _demands(text: str) -> list[str]:
    """What the lines of a message ask for, without the names and values that they are about, and without the source."""
    lines = [line for line in text.splitlines() if line.startswith(" ")] or [text]
    return sorted({re.sub(r"^.*?: must ", "", line).partition("  [")[0] for line in lines})


def readable(text: str) -> str:
    """``text`` without what differs between runs: the names that groups happen to have."""
    text = re.sub(r"there are '\w+'(, '\w+')*", "there are '0'", text)
    return re.sub(r"group '\d+'", "group '0'", text)


def entry(case: Misuse, text: str) -> str:
    """One entry of the page."""
    return f"\n`{case.wrong}`{_where(case)}\n\n```text\n{case.error.__name__}: {text}\n```\n"


def _where(case: Misuse) -> str:
    under = [] if case.product == "portable" else [f"under the rules of {case.product}"]
    who = [] if case.on_rank is None else [f"on rank {case.on_rank} alone"]
    return ", ".join(["", *who, *under])


def carry_out_all() -> dict[str, dict[str, str]]:
    """Carry out all cases on processes of their own; texts by module and case id."""
    pools: dict[int, Ranks] = {}

    def run(size: int, function: Callable[..., Any], *args: Any, deadline: float) -> list[Any]:
        if size not in pools:
            pools[size] = Ranks(size, preload=("pytest", "numpy"))
        return pools[size].run(function, *args, deadline=deadline)

    texts = {}
    try:
        for module, carry_out in MODULES.items():
            with tempfile.TemporaryDirectory() as folder:
                texts[module] = first_texts(carry_out(run, f"tests.misuse.{module}", Path(folder)))
            print(f"{module}: {len(texts[module])} cases", file=sys.stderr)
    finally:
        for ranks in pools.values():
            ranks.close()
    return texts


def first_texts(outcomes: Mapping[str, list[Outcome]]) -> dict[str, str]:
    """What the first process has read, by case id.

    Raises:
        AssertionError: it has read nothing of its own: run the tests, they say more.
    """
    silent = [name for name, found in outcomes.items() if not found[0].text or found[0].error == "not run"]
    assert not silent, f"no error was raised by {', '.join(silent)}"
    return {name: found[0].text for name, found in outcomes.items()}


if __name__ == "__main__":
    PAGE.write_text(page(carry_out_all()), encoding="utf-8")
