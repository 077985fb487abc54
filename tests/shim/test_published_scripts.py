"""The example scripts printed in the published operator documents, run unmodified at their printed world sizes.

They are third-party text and do not ship with this project: ``COMMFUSE_PUBLISHED_SCRIPTS`` names their folder.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from .operators import missing_operators, named_operators
from .running import run

ROOT = Path(__file__).parents[2]
DEADLINE = 240  # seconds; eight or sixteen processes on two cores, some of them compiling
LONG = (  # what others show as well, and takes longest
    "npu_gmm_alltoallv.",
    "npu_all_gather_base_mm.",
    "npu_moe_distribute_combine_setup.",
    "npu_moe_distribute_dispatch_v2.graph",
)
FAILURES = ("Traceback (most recent call last)", "Error type")


def published_scripts() -> list[Path]:
    """The scripts, where there are any."""
    folder = Path(os.environ.get("COMMFUSE_PUBLISHED_SCRIPTS", ROOT / ".." / "shared" / "seeds" / "scripts"))
    return sorted(folder.glob("*.py"))


def marked(script: Path) -> Any:
    return pytest.param(script, id=script.name, marks=pytest.mark.long if script.name.startswith(LONG) else ())


def test_there_is_something_to_run() -> None:
    if "COMMFUSE_PUBLISHED_SCRIPTS" not in os.environ and not published_scripts():
        pytest.skip("needs the published scripts: set COMMFUSE_PUBLISHED_SCRIPTS to their folder")
    assert published_scripts()
    assert all(named_operators(script) for script in published_scripts())


@pytest.mark.timeout(DEADLINE + 60)
@pytest.mark.usefixtures("no_ranks")
@pytest.mark.parametrize("script", [marked(script) for script in published_scripts()])
def test_published_script(script: Path) -> None:
    if missing := missing_operators(script):
        pytest.skip(f"commfuse has no {', '.join(missing)} yet")
    outcome = run(script, deadline=DEADLINE)
    assert outcome.code == 0, outcome
    assert not any(sign in outcome.out + outcome.err for sign in FAILURES), outcome
