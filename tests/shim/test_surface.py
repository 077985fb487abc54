"""The rows of names: complete, true, and the same as in the documentation."""

from __future__ import annotations

from pathlib import Path

import pytest

from commfuse.shim import npu, surface

from .running import SCRIPTS, run

DOCS = Path(__file__).parents[2] / "docs" / "shim.md"


def test_every_name_has_one_row() -> None:
    paths = [row.path for row in surface.ROWS]
    assert len(paths) == len(set(paths))
    assert {row.kind for row in surface.ROWS} == {surface.PRESENT, surface.NOTHING, surface.REFUSED}
    assert all(row.note for row in surface.ROWS if row.kind == surface.REFUSED)


def test_torch_npu_has_no_public_name_without_a_row() -> None:
    here = {
        name
        for name, value in vars(npu).items()
        if not name.startswith("_") and getattr(value, "__module__", npu.__name__) == npu.__name__
    }
    rows = {row.name for row in surface.ROWS if row.owner == "torch.npu"}
    modules = {"annotations", "os", "resource", "surface", "time", "torch"}
    assert here - modules - rows == set()


def test_names_are_what_their_rows_say() -> None:
    outcome = run(SCRIPTS / "names.py")
    assert outcome.code == 0, outcome
    assert outcome.out.split()[-1] == str(len(surface.ROWS))


def test_a_missing_name_is_answered_with_the_nearest() -> None:
    error = surface.missing("torch_npu", "npu_moe_dispatch", ["npu_moe_distribute_dispatch_v2", "npu_swiglu"])
    assert "there are npu_moe_distribute_dispatch_v2" in str(error)
    assert "npu_swiglu" not in str(error)
    assert "npu_swiglu" in str(surface.missing("torch_npu", "xyz", ["npu_swiglu"]))


@pytest.mark.parametrize("row", [row for row in surface.ROWS if row.kind == surface.REFUSED], ids=lambda row: row.path)
def test_a_refused_name_is_answered_with_its_reason(row: surface.Name) -> None:
    assert row.note in str(surface.missing(row.owner, row.name))


def test_the_documented_table_is_fresh() -> None:
    assert surface.render_table() in DOCS.read_text(), "put surface.render_table() into docs/shim.md"
