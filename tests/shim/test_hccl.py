"""Groups of the backend "hccl": names, collectives, sub-groups."""

from __future__ import annotations

import pytest

from .running import SCRIPTS, free_port, run

PORT = free_port()  # one for all runs: as with the published scripts, it must serve again at once
DONE = sorted(f"groups: rank {rank} done" for rank in range(4))


@pytest.mark.parametrize(
    ("backend", "debug"), [("hccl", "OFF"), ("hccl", "DETAIL"), ("cpu:gloo,npu:hccl", "OFF")], ids=["plain", "wrapped", "both"]
)
def test_groups(backend: str, debug: str) -> None:
    outcome = run(SCRIPTS / "groups.py", PORT, backend, env={"TORCH_DISTRIBUTED_DEBUG": debug})
    assert outcome.code == 0, outcome
    assert sorted(outcome.out.splitlines()) == DONE, outcome
    assert "UserWarning" not in outcome.err, outcome
