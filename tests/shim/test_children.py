"""A script that says "success" over failed ranks does not end with 0."""

from __future__ import annotations

import re

import pytest

from .running import SCRIPTS, run

SCRIPT = SCRIPTS / "children.py"


CODE_1, CODE_3, SIGNAL_9 = "exited with code 1", "exited with code 3", "was ended by signal 9"


@pytest.mark.parametrize(
    ("how", "failures"),
    [
        (["fork", "spawn", "forkserver"], [CODE_1, CODE_3] * 3),
        (["killed", "grandchild", "not joined"], [SIGNAL_9, CODE_1, CODE_1]),
    ],
    ids=["methods", "ends"],
)
def test_failures_that_nobody_saw(how: list[str], failures: list[str]) -> None:
    outcome = run(SCRIPT, *how)
    assert (outcome.code, outcome.out) == (1, "run success.\n"), outcome
    said = f"commfuse run: of the processes that the script started, {len(failures)} failed; "
    assert said + "the script itself ended with 0, so this command ends with 1\n" in outcome.err
    assert re.findall(r"^  process \d+ (.*)$", outcome.err, re.MULTILINE) == failures


def test_the_scripts_own_affairs() -> None:
    outcome = run(SCRIPT, "looked at", "ended", "daemon", "pool")
    assert (outcome.code, outcome.out) == (0, "run success.\n"), outcome
    assert "commfuse run" not in outcome.err


def test_torchs_spawn_tells_by_itself() -> None:
    outcome = run(SCRIPT, "torch spawn")
    assert (outcome.code, outcome.out) == (1, ""), outcome
    assert "ValueError: this rank failed" in outcome.err


def test_failures_may_be_ignored() -> None:
    outcome = run("--ignore-failed-children", SCRIPT, "fork")
    assert (outcome.code, outcome.out) == (0, "run success.\n"), outcome
    assert "commfuse run" not in outcome.err
