"""The documentation: generated parts are fresh, links lead somewhere, and the drawn examples are what the operators compute."""

from __future__ import annotations

import inspect
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from commfuse import call, config, errors
from commfuse.operators import OPERATORS
from commfuse.operators.moe_distribute.spec_combine import COMBINE_V2
from commfuse.operators.moe_distribute.spec_dispatch import DISPATCH_V2
from commfuse.spec import docs, render
from tests.conftest import RunRanks

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md")) + sorted(ROOT.glob("*.md"))


# --- generated parts -------------------------------------------------------------------------------------------------------


def test_generated_parts_are_fresh() -> None:
    assert docs.stale(DOCS) == []


def test_check_names_what_is_stale_and_a_run_mends_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "docs"
    shutil.copytree(DOCS, folder)
    docs.write(folder)
    changed, gone = folder / "environment.md", folder / "operators" / f"{DISPATCH_V2.name}.md"
    changed.write_text(changed.read_text().replace("COMMFUSE_TIMEOUT", "COMMFUSE_PATIENCE"))
    by_hand = changed.read_text().partition("<!-- generated")[0]
    gone.unlink()
    assert docs.main(["--check", "--folder", str(folder)]) == 1
    found = capsys.readouterr().out
    assert "environment.md: stale" in found
    assert f"operators/{DISPATCH_V2.name}.md: missing" in found
    assert "compatibility.md" not in found
    assert docs.main(["--folder", str(folder)]) == 0
    assert docs.main(["--check", "--folder", str(folder)]) == 0
    assert changed.read_text().partition("<!-- generated")[0] == by_hand
    assert changed.read_text() == (DOCS / "environment.md").read_text()


@pytest.mark.parametrize("wrong", ["nothing generated at all", docs.part("settings", "") + docs.part("extra", "")])
def test_a_file_with_other_parts_is_refused(tmp_path: Path, wrong: str) -> None:
    shutil.copytree(DOCS, tmp_path, dirs_exist_ok=True)
    (tmp_path / "environment.md").write_text(wrong)
    assert any(line.startswith("environment.md: has the generated parts") for line in docs.stale(tmp_path))
    with pytest.raises(ValueError, match=r"environment\.md"):
        docs.write(tmp_path)


# --- what people write around them -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPERATORS)
def test_every_operator_has_a_page_written_for_people(name: str) -> None:
    text = (DOCS / "operators" / f"{name}.md").read_text()
    headings = re.findall(r"^## (.+)$", text, re.MULTILINE)
    for heading in ("What it computes", "Arguments", "Outputs", "Limits", "What is raised"):
        assert heading in headings


@pytest.mark.parametrize("kind", [c for c in vars(errors).values() if inspect.isclass(c)], ids=lambda c: c.__name__)
def test_every_error_is_explained(kind: type) -> None:
    text = (DOCS / "errors.md").read_text()
    assert kind.__name__ in docs.error_tree()
    if kind is errors.CommfuseError:
        return
    section = text.partition(f"## {kind.__name__}\n")[2].partition("\n## ")[0]
    wanted = ["*What it means.*", "*What to do.*"] + ["*The group.*"] * issubclass(kind, errors.CommfuseError)
    assert [word for word in wanted if word not in section] == []


def test_the_tree_drawn_in_the_code_is_the_same() -> None:
    def names(text: str) -> list[str]:
        return [re.sub(r"^(\W*\w+).*", r"\1", line) for line in text.splitlines() if re.match(r"[ │├└─]*[A-Z]\w+(\s{2}|$)", line)]

    drawn, generated = names(errors.__doc__ or ""), names(docs.error_tree())
    assert drawn
    assert drawn == generated[: len(drawn)]


def test_every_variable_that_the_package_reads_is_described() -> None:
    source = "".join(path.read_text() for path in (ROOT / "src").rglob("*.py"))
    read = set(re.findall(r"\bCOMMFUSE_[A-Z_]+", source)) | set(call._READ)
    text = (DOCS / "environment.md").read_text()
    assert [name for name in sorted(read) if f"`{name}`" not in text] == []
    assert {setting.variable for setting in config.SETTINGS} <= read


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", page.read_text())
    assert [target for target in targets if not (page.parent / target).exists()] == []


# --- the tables ------------------------------------------------------------------------------------------------------------


def compared(operator: Any) -> dict[str, tuple[str, str]]:
    return {row.name: render.difference(operator, row) for row in operator.args}


def test_how_dispatch_compares_with_torch_npu() -> None:
    found = compared(DISPATCH_V2)
    assert found["ep_rank_id"] == ("same", "")
    assert found["expert_shard_type"] == ("same", "only 0, as torch_npu")
    assert found["y_dtype"][0] == "refused"
    assert "newer products" in found["y_dtype"][1]
    assert found["x"][0] == "wider"
    assert "float32" in found["x"][1]
    assert found["performance_info"] == ("wider", "`performance_info` without the limits of A3")


def test_how_combine_compares_with_torch_npu() -> None:
    found = compared(COMBINE_V2)
    assert found["expert_scales"] == ("same", "")
    assert found["group_ep"] == ("wider", "a ProcessGroup object too")
    assert found["ori_x"] == ("wider", "float32 too, under portable rules; `ori_x` without the limits of A2")


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=lambda operator: operator.name)
def test_the_tables_hold_every_row(operator: Any) -> None:
    def lines(text: str) -> int:
        tables = re.findall(r"^\| ---.*\n((?:\|.*\n)+)", text, re.MULTILINE)
        return sum(table.count("\n") for table in tables)

    assert lines(render.arguments(operator)) == len(operator.args)
    assert lines(render.outputs(operator)) == len(operator.outputs)
    assert lines(render.limits(operator)) == len(operator.rules)
    assert lines(render.symbols(operator)) >= len(operator.symbols)
    assert lines(render.compatibility([operator], "x")) == len(operator.args)
    assert "{" not in "".join(render.must(rule) for rule in operator.rules)


def test_a_table_survives_any_text() -> None:
    text = render.table(("a", "b", "empty"), [(render.code("x | y"), render.cell("1 * 2 | <3>"), "")])
    assert text.splitlines()[0] == "| a | b |"
    assert text.splitlines()[2] == "| `x \\| y` | 1 \\* 2 \\| &lt;3> |"


# --- the drawn examples ----------------------------------------------------------------------------------------------------


def page(name: str) -> str:
    return (DOCS / "operators" / f"{name}.md").read_text()


def program(name: str) -> str:
    return str(re.findall(r"```python\n(.*?)```", page(name), re.DOTALL)[0])


def drawn(name: str, pattern: str) -> list[list[str]]:
    """What ``pattern`` finds in the page's drawing, once for each rank: left half, right half."""
    drawing = re.findall(r"```\n(.*?)```", page(name), re.DOTALL)[0]
    halves = [[], []]  # type: list[list[str]]
    for line in drawing.splitlines():
        for half, text in zip(halves, (line[:42], line[42:]), strict=True):
            if found := re.fullmatch(pattern, text.strip()):
                half.append(" ".join(found.groups()))
    return halves


def numbers(*values: Any) -> str:
    return " ".join(f"{value:g}" for value in values)


def run_program(rank: int, source: str) -> list[Any]:
    """The program's result on this rank; tensors as lists, since half-precision tensors need not travel."""
    namespace: dict[str, Any] = {}
    exec(source, namespace)
    results = namespace["example"](rank)
    return [result.tolist() for result in results]


ROW = r"(\d+) +(\d+) \.\.\.  (\d) +(\d) +(\d) +(\d)"


def test_the_drawn_dispatch_is_what_happens(run_ranks: RunRanks) -> None:
    name = DISPATCH_V2.name
    results = run_ranks(2, run_program, program(name))
    rows, sums, nums = (
        drawn(name, ROW),
        drawn(name, r"ep_recv_counts +(\d) (\d) (\d) (\d)"),
        drawn(name, r"expert_token_nums +(\d) (\d)"),
    )
    tokens = drawn(name, r"(\d) +(\d+) \.\.\. +(\d) (\d)")
    for rank, (expand_x, _, assist, counts, prefix, _, _) in enumerate(results):
        ids = eval(re.findall(r"IDS = (.*)", program(name))[0])[rank]
        assert tokens[rank] == [numbers(t, 100 * rank + 10 * t, *ids[t]) for t in range(3)]
        experts = [2 * rank + i for i, n in enumerate(counts) for _ in range(n)]
        assert rows[rank] == [numbers(i, expand_x[i][0], experts[i], *assist[3 * i : 3 * i + 3]) for i in range(prefix[-1])]
        assert (sums[rank], nums[rank]) == ([numbers(*prefix)], [numbers(*counts)])
        assert len(expand_x) == 12


def test_the_drawn_combine_is_what_happens(run_ranks: RunRanks) -> None:
    name = COMBINE_V2.name
    results = run_ranks(2, run_program, program(name))
    rows, sums = drawn(name, ROW), drawn(name, r"(\d) +([\d.]+) +([\d.]+) +([\d.]+) +\.\.\.")
    places = drawn(DISPATCH_V2.name, ROW)
    for rank, (returned, x) in enumerate(results):
        weights = eval(re.findall(r"WEIGHTS = (.*)", program(name))[0])[rank]
        assert sums[rank] == [numbers(t, *weights[t], x[t][0]) for t in range(3)]
        rest = [" ".join(place.split()[2:]) for place in places[rank]]
        assert rows[rank] == [f"{numbers(i, returned[i][0])} {rest[i]}" for i in range(6)]


def refuse(rank: int, kind: str) -> str:
    """The message of a refused or disagreeing dispatch, as on the page."""
    namespace: dict[str, Any] = {}
    source = program(DISPATCH_V2.name)
    if kind == "refused":
        source = source.replace("[[1, 0], [2, 0], [3, 1]]", "[[1, 9], [2, 0], [3, 1]]")
    else:
        source = source.replace("moe_expert_num=4", "moe_expert_num=4 + 4 * rank")
    exec(source, namespace)
    with pytest.raises(errors.ArgumentError) as caught:
        namespace["example"](rank)
    return str(caught.value)


@pytest.mark.parametrize("kind", ["refused", "disagree"])
def test_the_messages_on_the_page_are_real(run_ranks: RunRanks, kind: str) -> None:
    for message in run_ranks(2, refuse, kind):
        assert kind in message
        quoted = "\n".join(f"  {line}" for line in message.splitlines())
        assert re.sub(r"group '\w+'", "group '0'", quoted) in page(DISPATCH_V2.name)


def refuse_combine(rank: int) -> str:
    namespace: dict[str, Any] = {}
    source = program(COMBINE_V2.name).replace("    first = 0\n", "    if rank == 0:\n        assist[1] = 1\n    first = 0\n")
    exec(source, namespace)
    with pytest.raises(errors.ArgumentError) as caught:
        namespace["example"](rank)
    return str(caught.value)


def test_the_message_on_combines_page_is_real(run_ranks: RunRanks) -> None:
    for message in run_ranks(2, refuse_combine):
        assert "\n".join(f"  {line}" for line in message.splitlines()) in page(COMBINE_V2.name)
