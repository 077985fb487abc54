"""When the look-alike applies, and what makes it importable."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

from commfuse import shim


def _package(folder: Path, name: str) -> Path:
    (folder / name).mkdir(parents=True)
    file = folder / name / "__init__.py"
    file.write_text("")
    return file


def test_a_real_torch_npu_is_found(tmp_path: Path) -> None:
    file = _package(tmp_path, "torch_npu")
    assert shim.real_torch_npu([str(shim.SITE), str(tmp_path)]) == str(file)


def test_the_look_alike_is_not_a_real_torch_npu(tmp_path: Path) -> None:
    (tmp_path / "torch_npu").mkdir()  # a folder without __init__.py is no package either
    (tmp_path / "link").symlink_to(shim.SITE)
    assert shim.real_torch_npu([str(shim.SITE), str(tmp_path), str(tmp_path / "link")]) is None


def test_the_look_alike_comes_first_on_the_path_once(tmp_path: Path) -> None:
    before = os.pathsep.join(["/first", str(shim.SITE), "/second"])
    expected = os.pathsep.join([str(shim.SITE), str(tmp_path), "/first", "/second"])
    assert shim.search_path(tmp_path, before) == expected
    assert shim.search_path(tmp_path, None) == os.pathsep.join([str(shim.SITE), str(tmp_path)])


def test_the_entry_point_is_torchs(tmp_path: Path) -> None:
    shim.write_entry_point(tmp_path)
    (distribution,) = importlib.metadata.distributions(path=[str(tmp_path)])
    (entry,) = distribution.entry_points
    assert (entry.group, entry.name, entry.value) == ("torch.backends", "torch_npu", "torch_npu:_autoload")


def test_importing_the_package_changes_nothing() -> None:
    program = "import commfuse.shim, torch; print(hasattr(torch, 'npu'), torch._C._get_privateuse1_backend_name())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout == "False privateuseone\n", done.stderr


def test_one_device_extension_per_process() -> None:
    program = "import torch; torch.utils.rename_privateuse1_backend('other'); from commfuse import shim; shim.install()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert "RuntimeError: this process already has a device extension, 'other'" in done.stderr


def test_it_refuses_to_stand_beside_a_real_one(tmp_path: Path) -> None:
    file = _package(tmp_path, "torch_npu")
    path = os.pathsep.join([str(shim.SITE), str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", "import torch_npu"],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert f"ImportError: a real torch_npu is installed ({file})" in done.stderr
