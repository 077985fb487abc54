"""A peer's header may hold anything: the call raises on both ranks, and the next one runs."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

pytest.importorskip("commfuse._core")

import commfuse
from commfuse import groups
from commfuse.backends.cpu import session
from tests.conftest import RunRanks
from tests.operators.moe_distribute.halves import world

OWN = "_npu_distribute_barrier"
HEAD = 17  # bytes: refused or not, and a digest


def barrier() -> str:
    """'' or the class of what was raised."""
    try:
        commfuse._npu_distribute_barrier(torch.zeros(1), world(), 2)
    except Exception as error:  # whatever it is, it is what the user reads
        return f"{type(error).__name__}: {error}"
    return ""


def with_header(rank: int, head: bytes, name: bytes) -> tuple[str, str]:
    """A barrier to which rank 1 comes with another header, and a right one."""
    with commfuse.config.override(timeout=10.0):  # the ranks of one host take the cpu backend
        barrier()
        kept = groups.resolve(world()).shared["windows"][0].whole._offers
        kept.clear()
        with mock.patch.object(session.Session, "body", return_value=(head, name)) if rank == 1 else mock.patch.dict({}):
            first = barrier()
        kept.clear()
        return first, barrier()


@settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=40,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.binary(min_size=HEAD, max_size=HEAD), st.binary(max_size=32))
@example(bytes(HEAD), OWN.encode())
@example(b"\xff" * HEAD, b"\xff" * 32)
def test_any_header_raises_on_both_ranks(run_ranks: RunRanks, head: bytes, name: bytes) -> None:
    for first, then in run_ranks(2, with_header, head, name, deadline=40):
        assert first.partition(":")[0] in ("MismatchError", "ArgumentError"), first
        assert then == ""
