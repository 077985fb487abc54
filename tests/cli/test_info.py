"""``commfuse info``: what it says about this installation is so."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import commfuse
from commfuse import backends, config
from commfuse.cli import info, machine
from commfuse.groups import Group

from .commands import here


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    before = dist.is_initialized()  # another test of this process may have done so
    outcome = here(capsys, "info", "--json")
    found = json.loads(outcome.out)
    assert outcome.code == 0
    assert found["versions"]["commfuse"] == commfuse.__version__
    assert found["versions"]["torch"] == torch.__version__
    assert found["cores"]["affinity"] == len(os.sched_getaffinity(0))
    assert found["backends"] == {name: [] for name in ("portable", "reference")} | {
        name: found["backends"][name] for name in backends.BACKENDS
    }
    assert found["core"]["built"] == (importlib.util.find_spec("commfuse._core") is not None)
    assert [row["variable"] for row in found["settings"]] == [setting.variable for setting in config.SETTINGS]
    assert dist.is_initialized() == before


@pytest.fixture
def variables(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Set variables, as if they had been set before the process began."""

    def use(**values: str) -> None:
        for name, value in values.items():
            monkeypatch.setenv(name, value)
        config.set(**{setting.name: None for setting in config.SETTINGS})

    yield use
    monkeypatch.undo()
    config.set(**{setting.name: None for setting in config.SETTINGS})


def test_text_without_a_terminal(capsys: pytest.CaptureFixture[str], variables: Callable[..., None]) -> None:
    variables(COLUMNS="80", COMMFUSE_PRODUCT="a2,warn", COMMFUSE_TIMEOUT="2.5")
    outcome = here(capsys, "info")
    assert (outcome.code, outcome.err) == (0, "")
    assert "\x1b" not in outcome.out
    assert all(len(line) <= 80 for line in outcome.out.splitlines())
    assert "the rules of A2,warn are in force" in outcome.out
    values = dict(line.split()[:2] for line in outcome.out.splitlines() if line.startswith("  COMMFUSE_"))
    assert (values["COMMFUSE_PRODUCT"], values["COMMFUSE_TIMEOUT"], values["COMMFUSE_POISON"]) == ("A2,warn", "2.5", "0")


def test_a_refused_value_is_named(capsys: pytest.CaptureFixture[str], variables: Callable[..., None]) -> None:
    variables(COMMFUSE_TIMEOUT="-1", COMMFUSE_PRODUCT="A4")
    outcome = here(capsys, "info", "--json")
    assert outcome.code == 1
    row = next(row for row in json.loads(outcome.out)["settings"] if row["name"] == "timeout")
    assert row["error"].startswith("COMMFUSE_TIMEOUT = '-1': must be seconds, above 0")
    assert "COMMFUSE_PRODUCT = 'A4': must be portable, A2, A3" in " ".join(here(capsys, "info").out.split())


def test_reasons_of_a_backend(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    class Absent:
        name = "absent"

        def why_not(self, group: Group) -> list[str]:
            return [f"{group.size} rank has no windows"]

    monkeypatch.setitem(backends.BACKENDS, "absent", Absent())
    outcome = here(capsys, "info")
    assert "no: 1 rank has no windows" in outcome.out


def test_a_core_that_is_missing_or_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    missing = info.core()
    assert (missing["built"], missing["reason"]) == (False, "not built")
    assert "g++" in missing["remedy"]

    def fail(name: str) -> None:
        raise ImportError("GLIBCXX_9 not found")

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib, "import_module", fail)
    assert info.core() == {"built": False, "reason": "GLIBCXX_9 not found", "remedy": info.NOT_LOADED}


def test_a_real_torch_npu(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch_npu.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    assert json.loads(here(capsys, "info", "--json").out)["torch_npu"] == str(tmp_path / "torch_npu.py")


@pytest.mark.parametrize(
    ("membership", "files", "quota"),
    [
        ("0::/\n", {}, None),
        ("0::/\n", {"cpu.max": "max 100000\n"}, None),
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),
        ("0::/a/b\n", {"a/cpu.max": "200000 100000\n", "a/b/cpu.max": "max 100000\n"}, 2.0),
        ("0::/a/b\n", {"a/cpu.max": "100000 100000\n", "a/b/cpu.max": "400000 100000\n"}, 1.0),
        ("0::/../outside\n", {"cpu.max": "50000 100000\n"}, 0.5),
        (
            "5:memory:/x\n4:cpu,cpuacct:/x\n0::/x\n",
            {"cpu/x/cpu.cfs_quota_us": "300000\n", "cpu/x/cpu.cfs_period_us": "100000\n"},
            3.0,
        ),
        ("4:cpu,cpuacct:/x\n", {"cpu/x/cpu.cfs_quota_us": "-1\n", "cpu/x/cpu.cfs_period_us": "100000\n"}, None),
    ],
)
def test_cgroup_quota(tmp_path: Path, membership: str, files: dict[str, str], quota: float | None) -> None:
    (tmp_path / "membership").write_text(membership)
    for name, text in files.items():
        file = tmp_path / "cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    assert machine.quota_cores(tmp_path / "membership", tmp_path / "cgroup") == quota
    cores = machine.cores(tmp_path / "membership", tmp_path / "cgroup")
    assert cores == min(machine.affinity_cores(), quota or float("inf"))
