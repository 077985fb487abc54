"""Ranges for the profiler: one for each phase, waits with the peer's name, and none outside a profiler."""

from __future__ import annotations

import pytest

from commfuse.observe import ranges
from tests.conftest import RunRanks

from .calls import LATE_S, profiled

DISPATCH, COMBINE = "commfuse::npu_moe_distribute_dispatch_v2", "commfuse::npu_moe_distribute_combine_v2"


@pytest.mark.parametrize("backend", ["cpu", "portable"])
def test_every_phase_has_a_range_and_a_wait_names_its_peer(run_ranks: RunRanks, backend: str) -> None:
    for rank, found in enumerate(run_ranks(2, profiled, backend, 1)):
        waits = {name for name in found if "wait for" in name}
        assert set(found) - waits == {DISPATCH, COMBINE, "commfuse::publish", "commfuse::pull", "commfuse::sum"}
        assert waits == {f"commfuse::wait for rank {1 - rank}"}
    assert run_ranks(2, profiled, backend, 0)[1]["commfuse::wait for rank 0"] > 0.5e6 * LATE_S


def test_without_a_profiler_there_is_no_range(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges.torch.profiler, "record_function", None)  # would fail
    assert ranges.phase("publish")(lambda x: x + 1)(2) == 3
    with ranges.waiting(3):
        pass
    assert not ranges.active()
