"""Groups of the backend "hccl": names, collectives, sub-groups."""

from __future__ import annotations

import pytest

from .running import SCRIPTS, free_port, run

DONE = sorted(f"groups: rank {rank} done" for rank in range(4))


@pytest.fixture(scope="module")
def port() -> str:
    """One for all runs: as with the published scripts, it must serve again at once."""
    return free_port()


@pytest.mark.parametrize(
    ("backend", "debug"), [("hccl", "OFF"), ("hccl", "DETAIL"), ("cpu:gloo,npu:hccl", "OFF")], ids=["plain", "wrapped", "both"]
)
def test_groups(port: str, backend: str, debug: str) -> None:
    outcome = run(SCRIPTS / "groups.py", port, backend, env={"TORCH_DISTRIBUTED_DEBUG": debug})
    assert outcome.code == 0, outcome
    assert sorted(outcome.out.splitlines()) == DONE, outcome
    assert "UserWarning" not in outcome.err, outcome
