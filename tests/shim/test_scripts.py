"""Own scripts in the idiom of the published examples, run unmodified; each checks its numbers itself."""

from __future__ import annotations

import pytest

from .operators import missing_operators
from .running import SCRIPTS, free_port, run
from .test_published_scripts import published_scripts


@pytest.mark.parametrize(
    ("name", "ranks"),
    [
        ("eager_dispatch_combine.py", 4),
        ("graph_dispatch_combine.py", 4),
        ("spawn_all_gather_mm.py", 2),
        ("spawn_gmm_alltoallv.py", 2),
        ("queue_setup_teardown.py", 2),
    ],
)
def test_script(name: str, ranks: int, request: pytest.FixtureRequest) -> None:
    if published_scripts() and not request.config.getoption("--long"):
        pytest.skip("the published scripts themselves are there and run; with --long both do")
    if missing := missing_operators(SCRIPTS / name):
        pytest.skip(f"commfuse has no {', '.join(missing)} yet")
    outcome = run(SCRIPTS / name, free_port(), deadline=200)
    assert outcome.code == 0, outcome
    assert sum(line.endswith("npu finished!") for line in outcome.out.splitlines()) == ranks, outcome
