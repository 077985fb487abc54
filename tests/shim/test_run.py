"""``commfuse run`` as a command: what it starts, with what, and what it returns."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from commfuse.cli import run as command
from commfuse.shim import children

from .running import SCRIPTS, run


def _parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(arguments)


def test_script_and_spawned_child_see_the_same() -> None:
    outcome = run(SCRIPTS / "environment.py", "--flag", "-m", "x", env={"EXIT_CODE": "5"})
    assert outcome.code == 5, outcome
    script, child = [json.loads(line) for line in outcome.out.splitlines()]
    common = {"argv": ["--flag", "-m", "x"], "npu": True, "device": "npu:3"}
    assert script.items() >= {"who": "script", "main": "__main__", **common}.items()
    assert child.items() >= {"who": "child", "main": "__mp_main__", **common}.items()


def test_one_thread_per_process_unless_told_otherwise() -> None:
    folder = Path("/somewhere")
    assert command.environment({}, folder, folder / "log")["OMP_NUM_THREADS"] == "1"
    assert command.environment({"OMP_NUM_THREADS": "2"}, folder, folder / "log")["OMP_NUM_THREADS"] == "2"


def test_a_module_with_options() -> None:
    outcome = run("-m", "timeit", "-n", "1", "-r", "1", "import torch_npu; print(torch_npu.__version__)")
    assert outcome.code == 0, outcome
    assert "+commfuse\n" in outcome.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["no_such_script.py"], "no such file: no_such_script.py"), ([], "name a script or -m MODULE"), (["-m"], "name a script")],
)
def test_nothing_to_run(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(_parse(*arguments)) == 2
    assert message in capsys.readouterr().err


def test_a_real_torch_npu_is_used(tmp_path: Path) -> None:
    (tmp_path / "torch_npu").mkdir()
    file = tmp_path / "torch_npu" / "__init__.py"
    file.write_text("print('the real one')\n")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    outcome = run("-m", "timeit", "-n", "1", "-r", "1", "import torch_npu", env={"PYTHONPATH": path})
    assert outcome.out.startswith("the real one\n"), outcome
    assert f"commfuse run: torch_npu is installed ({file}): it is used, not the look-alike\n" in outcome.err


def test_signals_reach_the_script(tmp_path: Path) -> None:
    script = tmp_path / "waits.py"
    script.write_text("import time\nprint('up', flush=True)\ntime.sleep(60)\n")
    process = subprocess.Popen([sys.executable, "-m", "commfuse", "run", str(script)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 128 + signal.SIGTERM
    process.stdout.close()


def test_unseen_failures_are_those_not_looked_at(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert children.unseen(log) == []
    log.write_text("failed 1:2 process 2 exited with code 1\nfailed 1:3 process 3 was ended by signal 9\nseen 1:2 -\n")
    assert children.unseen(log) == ["process 3 was ended by signal 9"]
