"""The look-alike of torch_npu and torchair, for scripts that must run unmodified.

A folder, `SITE`, holds importable packages of those two names. `commfuse run` puts it on ``PYTHONPATH``, so that spawned
and forked children find them too; nothing of these names is ever installed. Importing either package calls `install`.
Importing this module does no work.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

SITE = Path(__file__).resolve().parent / "site"
"""The folder with the look-alike packages."""

_ENTRY_POINT = "[torch.backends]\ntorch_npu = torch_npu:_autoload\n"
_METADATA = "Metadata-Version: 2.1\nName: commfuse-shim\nVersion: 0\n"


def real_torch_npu(path: Sequence[str] | None = None) -> str | None:
    """Return the file of a torch_npu that is importable and not the look-alike, or None.

    ``path``: the folders to look in (default: ``sys.path``). Nothing is imported.
    """
    folders = [folder for folder in (sys.path if path is None else path) if Path(folder or ".").resolve() != SITE]
    for finder in sys.meta_path:
        spec = finder.find_spec("torch_npu", folders)
        if spec is not None and spec.origin is not None and not Path(spec.origin).resolve().is_relative_to(SITE):
            return spec.origin
    return None


def search_path(extra: Path, before: str | None) -> str:
    """Return the ``PYTHONPATH`` under which a process and its children see the look-alikes.

    ``extra`` is a folder that `write_entry_point` has filled, ``before`` the ``PYTHONPATH`` so far.
    """
    rest = [folder for folder in (before or "").split(os.pathsep) if folder and Path(folder).resolve() != SITE]
    return os.pathsep.join([str(SITE), str(extra), *rest])


def write_entry_point(folder: Path) -> None:
    """Make ``import torch`` alone load the look-alike where ``folder`` is on the path, as the real torch_npu does.

    Written per run and not shipped: package tools rightly dislike a ``.dist-info`` inside a package.
    """
    info = folder / "commfuse_shim-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(_METADATA)
    (info / "entry_points.txt").write_text(_ENTRY_POINT)


def version() -> str:
    """Return what ``torch_npu.__version__`` says: torch's version, marked as commfuse's."""
    import torch

    return str(torch.__version__).partition("+")[0] + "+commfuse"


def install() -> None:
    """Make "npu" a device and "hccl" a process-group backend of this process, and note failed children; once.

    Raises:
        ImportError: a real torch_npu can be imported; the look-alike never stands in its place.
        RuntimeError: another device extension has taken torch's only place for one.
    """
    from . import children, device, hccl

    if device.installed():
        return
    if (real := real_torch_npu()) is not None:
        raise ImportError(f"a real torch_npu is installed ({real}): commfuse's look-alike does not stand beside it")
    device.install()
    hccl.install()
    children.watch()
