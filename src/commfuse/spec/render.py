"""Rows to Markdown: the tables in the documentation of an operator. Plain functions from an `Operator` to text."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Sequence

from ..config import PORTABLE
from .model import Attr, Operator, Rule, Tensor

SAME, WIDER, REFUSED = "same", "wider", "refused"

_SCHEMA = {
    "group": "group name or ProcessGroup",
    "int?": "int or None",
    "str?": "str or None",
    "int[]": "sequence of ints",
    "ScalarType?": "torch.dtype or None",
}


def arguments(operator: Operator) -> str:
    """Return the table of arguments, in the published order."""
    rows = [
        (
            code(row.name),
            _kind(row),
            ", ".join(row.dtype) if isinstance(row, Tensor) else "",
            _default(row),
            row.meaning + _only_when(row),
            _products(rule for rule in _hardware(operator) if row.name in concerns(operator, rule)),
        )
        for row in operator.args
    ]
    head = ("argument", "kind or shape", "dtype", "default", "meaning", "limited on")
    keywords = (
        f"Keyword-only from {code(operator.first_keyword)} on." if operator.first_keyword else "All positional or by keyword."
    )
    return f"{keywords}\n\n{table(head, rows)}"


def symbols(operator: Operator) -> str:
    """Return the legend: the sizes that dimensions name, then the derived ones with their formulas."""
    dimensions = [(code(name), code(place), "") for name, place in _dimensions(operator).items()]
    derived = [(code(symbol.name), code(symbol.formula), symbol.meaning) for symbol in operator.symbols]
    return table(("symbol", "is", "meaning"), [*dimensions, *derived])


def outputs(operator: Operator) -> str:
    """Return the table of outputs, in order."""
    rows = [
        (
            code(row.name),
            code(_shape(row.shape)),
            _dtype(row.dtype),
            row.meaning + (f"; None unless {code(row.given)}" if row.given != "True" else ""),
        )
        for row in operator.outputs
    ]
    return table(("output", "shape", "dtype", "content"), rows)


def limits(operator: Operator) -> str:
    """Return one line per rule: first those of every product, then what products refuse besides."""
    everywhere = [_limit(operator, rule) for rule in operator.rules if PORTABLE in rule.on]
    hardware = [(_products([rule]), *_limit(operator, rule)) for rule in _hardware(operator)]
    head = ("what", "must be", "when", "source", "torch_npu says")
    parts = [f'"Page" is the published page of this operator. On every product:\n\n{table(head, everywhere)}']
    if hardware:
        parts.append(f"Under the rules of A2 or A3 in addition:\n\n{table(('product', *head), hardware)}")
    return "\n".join(parts)


def agreement(operator: Operator) -> str:
    """Return the list of what must be equal on all ranks of a call."""
    return ", ".join(_agreed(expression) for expression in ("product", *operator.agree)) + ".\n"


def index(operators: Iterable[Operator]) -> str:
    """Return the table of operators, each a link to its page beside this one."""
    return table(("operator", "what it does"), [(f"[{o.name}]({o.name}.md)", o.summary) for o in operators])


def compatibility(operators: Iterable[Operator], pages: str) -> str:
    """Return every operator with every parameter beside torch_npu's; ``pages`` is the folder of the operators' pages."""
    parts = []
    for operator in operators:
        rows = [(code(row.name), *difference(operator, row)) for row in operator.args]
        parts.append(f"### [{operator.name}]({pages}/{operator.name}.md)\n\n{table(('parameter', 'here', 'notes'), rows)}")
    return "\n".join(parts)


def difference(operator: Operator, row: Tensor | Attr) -> tuple[str, str]:
    """Return how argument ``row`` compares with torch_npu's: `SAME`, `WIDER` or `REFUSED`, and a note.

    Refused is what a rule of every product pins to one value although no text of torch_npu does. Wider is what takes
    float32 rows, a ProcessGroup, or values that only the rules of A2 or A3 forbid.
    """
    pins = [rule for rule in operator.rules if row.name in concerns(operator, rule) and _pinned(rule)]
    for rule in pins:
        if not rule.says:
            return REFUSED, cell(f"must be {must(rule)}; {rule.source}")
    more = []
    if isinstance(row, Tensor) and {"float32", "bfloat16"} <= set(row.dtype):
        more.append("float32 too, under portable rules")
    if isinstance(row, Attr) and row.schema == "group":
        more.append("a ProcessGroup object too")
    limited = _limited(operator, row.name)
    if limited:
        more.append(limited)
    if more:
        return WIDER, "; ".join(more)
    return SAME, cell(f"only {must(pins[0])}, as torch_npu") if pins else ""


def concerns(operator: Operator, rule: Rule) -> set[str]:
    """Return the arguments that ``rule`` limits: those its subject names, else the tensors that define its sizes, else its heading's."""
    dimensions = _dimensions(operator)
    named = {node.id for node in ast.walk(ast.parse(rule.subject)) if isinstance(node, ast.Name)}
    sized = {dimensions[name].partition(".")[0] for name in named if name in dimensions}
    found = {name for name in named if name in operator.names} or sized
    heading = re.search(r", (\w+)", rule.source)
    if heading and heading[1] in operator.names and (not found or heading[1] in found):
        return {heading[1]}
    return found


def must(rule: Rule) -> str:
    """Return the allowed range of ``rule`` as formulas, without the places for a call's values."""
    without_values = re.sub(r" = (?:[^={}]*\.\.)?\{[^}]*\}", "", rule.must)
    return re.sub(r"\{([^}]*)\}", r"\1", without_values)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table; columns that are empty in every row are left out."""
    lines = [tuple(head), *(tuple(row) for row in rows)]
    used = [i for i in range(len(head)) if i == 0 or any(line[i] for line in lines[1:])]
    picked = [tuple(line[i] for i in used) for line in lines]
    rule = tuple("---" for _ in used)
    return "".join(f"| {' | '.join(line)} |\n" for line in (picked[0], rule, *picked[1:]))


def cell(text: str) -> str:
    """Return ``text`` safe inside a table cell."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


def code(text: str) -> str:
    """Return ``text`` as code inside a table cell; '' stays ''."""
    return f"`{text}`".replace("|", "\\|") if text else ""


def _kind(row: Tensor | Attr) -> str:
    if isinstance(row, Attr):
        return _SCHEMA.get(row.schema, row.schema)
    return " or ".join(code(_shape(shape)) for shape in row.shapes) + (", written in place" if row.written else "")


def _default(row: Tensor | Attr) -> str:
    if isinstance(row, Tensor):
        return "`None`" if row.optional else "required"
    return "required" if row.required else code(repr(row.default))


def _only_when(row: Tensor | Attr) -> str:
    return f"; looked at when {code(row.when)}" if isinstance(row, Tensor) and row.when not in ("True", "False") else ""


def _limit(operator: Operator, rule: Rule) -> tuple[str, ...]:
    says = f"“{rule.says}”" if rule.says else ""
    when = rule.when if rule.when != "True" else ""
    source = rule.source.replace(f"{operator.name} page", "page")
    return code(rule.subject), cell(must(rule)), code(when), cell(source), cell(says)


def _hardware(operator: Operator) -> list[Rule]:
    return [rule for rule in operator.rules if PORTABLE not in rule.on]


def _products(rules: Iterable[Rule]) -> str:
    return ", ".join(sorted({product for rule in rules for product in rule.on}))


def _dimensions(operator: Operator) -> dict[str, str]:
    """The sizes that are bare new names in a shape, and the dimension that defines each."""
    taken = {symbol.name for symbol in operator.symbols} | set(operator.names)
    found: dict[str, str] = {}
    for row in operator.tensors:
        for shape in row.shapes:
            for axis, name in enumerate(shape):
                if name.isidentifier() and name not in taken:
                    found.setdefault(name, f"{row.name}.shape[{axis}]")
    return found


def _shape(sizes: Sequence[str]) -> str:
    if len(sizes) == 1 and sizes[0].startswith("*"):
        return sizes[0][1:]  # one expression that is the whole shape
    return f"({', '.join(sizes)}{',' if len(sizes) == 1 else ''})"


def _dtype(expression: str) -> str:
    return expression.strip("'") if re.fullmatch(r"'\w+'", expression) else code(expression)


def _agreed(expression: str) -> str:
    given = re.fullmatch(r"(\w+) is not None", expression)
    return f"whether {code(given[1])} is given" if given else code(expression)


def _pinned(rule: Rule) -> bool:
    """Whether ``rule`` leaves one value, on every product and in every call."""
    if PORTABLE not in rule.on or rule.when != "True":
        return False
    test = ast.parse(rule.test, mode="eval").body
    if not isinstance(test, ast.Compare):
        return False
    (relation, value), *more = zip(test.ops, test.comparators, strict=True)
    one = isinstance(value, ast.Tuple) and len(value.elts) == 1
    return not more and (isinstance(relation, ast.Is) or (isinstance(relation, ast.In) and one))


def _limited(operator: Operator, name: str) -> str:
    """What the rules of A2 or A3 alone limit about argument ``name``; '' for nothing."""
    rules = [rule for rule in _hardware(operator) if name in concerns(operator, rule) and not rule.subject.endswith(".dtype")]
    if not rules:
        return ""
    subjects = ", ".join(dict.fromkeys(code(rule.subject) for rule in rules))
    return f"{subjects} without the limits of {_products(rules).replace(', ', ' and ')}"
