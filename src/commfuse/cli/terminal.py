"""How the commands write: results on stdout, plain where that is no terminal; progress on stderr, only on a terminal."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any, Protocol

from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

INDENT = 2


class Show(Protocol):
    """Tell the user what is going on, and how much of it is done."""

    def __call__(self, what: str, done: int | None = None, total: int | None = None) -> None:
        """Show ``what``; with ``total`` as a bar of which ``done`` is filled."""


def console() -> Console:
    """Return a console for results."""
    return Console(highlight=False, soft_wrap=False)


def table(*heads: str) -> Table:
    """Return a table without lines: names to the left, numbers to the right."""
    made = Table(box=None, pad_edge=False, padding=(0, 1), header_style="dim")
    for i, head in enumerate(heads):
        made.add_column(head, justify="right" if i else "left")
    return made


def facts() -> Table:
    """Return a table of two columns without heads: a name, and what there is to say."""
    made = Table(box=None, pad_edge=False, padding=(0, 1), show_header=False)
    made.add_column(style="dim", no_wrap=True)
    made.add_column()
    return made


def indented(what: RenderableType) -> Padding:
    """Return ``what`` two columns to the right."""
    return Padding(what, (0, 0, 0, INDENT), expand=False)


def title(text: str) -> Text:
    """Return the head of a section, after an empty line."""
    return Text(f"\n{text}", style="bold")


def knows_blocks(out: Console) -> bool:
    """Whether block characters can be printed; otherwise pictures are made of plain ones."""
    return out.encoding.startswith("utf")


@contextlib.contextmanager
def progress() -> Iterator[Show]:
    """Give a function that shows what is going on, with the time since the start; nothing of it stays on the screen."""
    err = Console(stderr=True, highlight=False)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=24), TimeElapsedColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bars:
        task = bars.add_task("", total=None)

        def show(what: str, done: int | None = None, total: int | None = None) -> None:
            bars.update(task, description=what, completed=done or 0, total=total)

        yield show


def print_json(value: dict[str, Any]) -> None:
    """Print one object."""
    print(json.dumps(value, indent=2))
