"""``commfuse run``: run a script unmodified, with look-alikes of torch_npu and torchair where there is no real one."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import FrameType

from commfuse import shim
from commfuse.shim import children

CHILDREN_FAILED = 1
"""The exit code when the script ended well and a process that it started had failed unseen."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to ``parser``."""
    parser.add_argument(
        "--ignore-failed-children",
        action="store_true",
        help="return the script's own exit code even when processes that it started have failed unseen",
    )
    parser.add_argument(
        "-m",
        dest="module",
        nargs=argparse.REMAINDER,
        metavar=("MODULE", "ARGS"),
        help="run a module by its name, with its arguments, as `python -m` does; the last option here",
    )
    parser.add_argument("script", nargs="?", metavar="SCRIPT", help="a Python file")
    parser.add_argument("args", nargs=argparse.REMAINDER, metavar="ARGS", help="the script's arguments")


def main(args: argparse.Namespace) -> int:
    """Run the script and return its exit code; 1 if only processes that it started failed, 2 if it cannot be started."""
    target = ["-m", *args.module] if args.module else [args.script, *args.args]
    problem = _problem(args)
    if problem:
        print(f"commfuse run: {problem}", file=sys.stderr)
        return 2
    real = shim.real_torch_npu(sys.path if getattr(sys.flags, "safe_path", False) else sys.path[1:])
    if real is not None:
        print(f"commfuse run: torch_npu is installed ({real}): it is used, not the look-alike", file=sys.stderr)
        return _wait([sys.executable, *target], os.environ)
    with tempfile.TemporaryDirectory(prefix="commfuse-run-") as folder:
        log = Path(folder) / "children"
        shim.write_entry_point(Path(folder))
        code = _wait([sys.executable, *target], environment(os.environ, Path(folder), log))
        failed = children.unseen(log)
    return code if args.ignore_failed_children else _judge(code, failed)


def _problem(args: argparse.Namespace) -> str:
    if args.module:
        return ""
    if args.script is None:
        return "name a script or -m MODULE"
    return "" if Path(args.script).exists() else f"no such file: {args.script}"


def environment(base: Mapping[str, str], folder: Path, log: Path) -> dict[str, str]:
    """Return ``base`` with what the look-alikes need: they come first on the path, and children inherit it.

    One intra-op thread per process, unless ``OMP_NUM_THREADS`` is set: a script's ranks share this machine's cores.
    """
    return {
        "OMP_NUM_THREADS": "1",
        **base,
        "PYTHONPATH": shim.search_path(folder, base.get("PYTHONPATH")),
        children.LOG_VARIABLE: str(log),
    }


def _judge(code: int, failed: list[str]) -> int:
    if not failed:
        return code
    verdict = "" if code else f"; the script itself ended with 0, so this command ends with {CHILDREN_FAILED}"
    print(f"commfuse run: of the processes that the script started, {len(failed)} failed{verdict}", file=sys.stderr)
    for line in failed:
        print(f"  {line}", file=sys.stderr)
    return code or CHILDREN_FAILED


def _wait(command: list[str], env: Mapping[str, str]) -> int:
    """Run ``command`` to its end and return its exit code, 128 + the signal where one ended it; pass signals on.

    A process of its own and not `exec`, since somebody has to look at what the script leaves behind.
    """
    process = subprocess.Popen(command, env=env)

    def pass_on(number: int, frame: FrameType | None) -> None:
        process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGHUP)}
    before[signal.SIGINT] = signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to the script as well
    try:
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return code if code >= 0 else 128 - code
