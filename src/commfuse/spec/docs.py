"""``python -m commfuse.spec.docs``: write the generated parts of the documentation anew; with ``--check`` only compare.

A generated part stands between two comments, ``<!-- generated: NAME -->`` and ``<!-- end of the generated part -->``. All else
in those files is written by hand and left alone. This is a command: nothing imports it but its test.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .. import errors
from ..config import SETTINGS
from ..operators import OPERATORS
from ..shim import surface
from . import render
from .model import Operator

_PART = re.compile(r"(<!-- generated(?: by|:) ([^>]+?) -->\n).*?(<!-- end of the generated part -->)", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Page:
    """A file of the documentation: its path in the folder, and its generated parts by name."""

    path: str
    title: str
    summary: str = ""
    parts: Mapping[str, str]

    def blank(self) -> str:
        """Return the file as it begins: title, summary and parts, for somebody to write the rest around them."""
        summary = f"{self.summary[:1].upper()}{self.summary[1:]}.\n\n" if self.summary else ""
        parts = "".join(f"## {name.capitalize()}\n\n{part(name, '')}\n\n" for name in self.parts)
        return f"# {self.title}\n\n{summary}{parts}".rstrip() + "\n"

    def fresh(self, text: str) -> str:
        """Return ``text`` with its generated parts made anew.

        Raises:
            ValueError: the file lacks a part, or has one that nothing generates.
        """
        there = [found[1] for found in _PART.findall(text)]
        if sorted(there) != sorted(self.parts):
            raise ValueError(f"{self.path}: has the generated parts {sorted(there)}, should have {sorted(self.parts)}")
        return _PART.sub(lambda found: f"{found[1]}{self.parts[found[2]]}{found[3]}", text)


def part(name: str, text: str) -> str:
    """Return a generated part with the comments around it."""
    return f"<!-- generated: {name} -->\n{text}<!-- end of the generated part -->"


def pages() -> tuple[Page, ...]:
    """Return every file with generated parts."""
    operators = OPERATORS.values()
    return (
        *(_operator(operator) for operator in operators),
        Page(path="operators/README.md", title="Operators", parts={"operators": render.index(operators)}),
        Page(path="environment.md", title="Environment", parts={"settings": settings()}),
        Page(path="errors.md", title="Errors", parts={"tree": error_tree()}),
        Page(
            path="compatibility.md",
            title="Compatibility",
            parts={"parameters": render.compatibility(operators, "operators")},
        ),
        Page(path="shim.md", title="Scripts", parts={"commfuse.shim.surface.render_table()": surface.render_table()}),
    )


def settings() -> str:
    """Return the table of settings."""
    head = ("variable", "in the program", "default", "allowed", "meaning")
    rows = [
        (render.code(s.variable), render.code(f"config.set({s.name}=...)"), render.code(s.default), s.allowed, s.meaning)
        for s in SETTINGS
    ]
    return render.table(head, rows)


def error_tree() -> str:
    """Return the classes of `errors` as a drawn tree, each with the first line of its description."""
    roots = [errors.CommfuseError, errors.CommfuseWarning]
    lines = [f"{root.__base__.__name__}\n" + _branch(root, "", last=True) for root in roots if root.__base__]
    return f"```\n{''.join(lines)}```\n"


def stale(folder: Path) -> list[str]:
    """Return the files in ``folder`` that are missing or whose generated parts are not fresh, each with what is wrong."""
    return [f"{page.path}: {problem}" for page in pages() if (problem := _problem(page, folder))]


def write(folder: Path) -> list[str]:
    """Make all generated parts in ``folder`` fresh, and files that are missing; return the files that changed.

    Raises:
        ValueError: a file lacks a part, or has one that nothing generates.
    """
    changed = []
    for page in pages():
        path = folder / page.path
        before = path.read_text(encoding="utf-8") if path.exists() else ""
        after = page.fresh(before or page.blank())
        if after != before:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(after, encoding="utf-8")
            changed.append(page.path)
    return changed


def main(args: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 1 if ``--check`` found something."""
    parser = argparse.ArgumentParser(
        prog="python -m commfuse.spec.docs", description="write the generated parts of the docs anew"
    )
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 and name the files that are not fresh")
    parser.add_argument("--folder", type=Path, default=Path("docs"), help="where the documentation is (default: ./docs)")
    options = parser.parse_args(args)
    if not options.folder.is_dir():
        parser.error(f"no folder {options.folder}; run this in the repository or name it with --folder")
    found = stale(options.folder) if options.check else write(options.folder)
    for line in found:
        print(f"{options.folder}/{line}")
    if options.check and found:
        print("the generated parts above are stale: run `make docs`", file=sys.stderr)
    return int(options.check and bool(found))


def _operator(operator: Operator) -> Page:
    parts = {
        "arguments": render.arguments(operator),
        "outputs": render.outputs(operator),
        "symbols": render.symbols(operator),
        "limits": render.limits(operator),
        "agreement": render.agreement(operator),
    }
    return Page(path=f"operators/{operator.name}.md", title=operator.name, summary=operator.summary, parts=parts)


def _problem(page: Page, folder: Path) -> str:
    path = folder / page.path
    if not path.exists():
        return "missing"
    text = path.read_text(encoding="utf-8")
    try:
        return "" if page.fresh(text) == text else "stale"
    except ValueError as error:
        return str(error).removeprefix(f"{page.path}: ")


def _branch(kind: type, indent: str, last: bool) -> str:
    name = f"{indent}{'└── ' if last else '├── '}{kind.__name__}"
    line = f"{name:<36}{(inspect.getdoc(kind) or '').splitlines()[0].replace('``', '')}\n"
    below = [c for c in vars(errors).values() if isinstance(c, type) and c.__base__ is kind]
    deeper = indent + ("    " if last else "│   ")
    return line + "".join(_branch(child, deeper, child is below[-1]) for child in below)


if __name__ == "__main__":
    sys.exit(main())
