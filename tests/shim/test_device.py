"""The device name "npu", in eager and in compiled code."""

from __future__ import annotations

import pytest

from .running import SCRIPTS, run


def test_device_names() -> None:
    outcome = run(SCRIPTS / "device_names.py")
    assert (outcome.code, outcome.out) == (0, "device names: done\n"), outcome
    assert "Warning" not in outcome.err, outcome


@pytest.mark.long
def test_compiled_code() -> None:
    # Without caches: an entry from another run would hide that something can no longer be compiled.
    outcome = run(SCRIPTS / "compiled.py", deadline=200, env={"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"})
    assert (outcome.code, outcome.out) == (0, "compiled: done\n"), outcome
