"""``COMMFUSE_LOG``: one line for each call, or a table of each group when the process ends, on the logger "commfuse".

Lines are of level INFO. A program that has set up `logging` gets them its own way; otherwise they go to stderr.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from multiprocessing.util import Finalize

import torch

from .. import config
from ..call import Call
from .statistics import Record, record_of, summary

LOGGER = logging.getLogger("commfuse")

_to_report: dict[int, list[Record]] = {}  # by process: a forked child reports what it has seen itself


def tell(call: Call, nanoseconds: int, error: BaseException | None) -> None:
    """Log a call that has ended, after ``nanoseconds``, with ``error`` if it raised; for ``log`` other than "off"."""
    _prepare()
    record = record_of(call.group)
    waited = record.refresh(call.group)
    if config.get("log") == "calls":
        LOGGER.info("%s", line(call, record, nanoseconds / 1000, waited, error))
    else:
        _report_at_exit(record)


def line(call: Call, record: Record, time_us: float, waited_us: Mapping[int, float], error: BaseException | None) -> str:
    """Return a call in one line: operator, group, rank, number of the call, shapes, duration, waits or what was raised."""
    where = f"{call.operator.name}: group {record.group!r}, rank {record.rank} of {record.size}, call {record.calls}"
    if error is not None:
        told = f"{error}".strip().partition("\n")[0]
        return f"{where}: {type(error).__name__} after {time_us:,.1f} us: {told}"
    waits = ", ".join(f"{us:,.1f} us for rank {rank}" for rank, us in sorted(waited_us.items()) if us > 0)
    return f"{where}: {_shapes(call)}: {time_us:,.1f} us{', waited ' + waits if waits else ''}"


def _shapes(call: Call) -> str:
    given = ((row.name, call.args[row.name]) for row in call.operator.tensors)
    return ", ".join(f"{name} {_short(tensor)}" for name, tensor in given if isinstance(tensor, torch.Tensor))


def _short(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _prepare() -> None:
    """Let lines be seen where the program has said nothing about them."""
    if LOGGER.level == logging.NOTSET:
        LOGGER.setLevel(logging.INFO)
    if not LOGGER.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("commfuse: %(message)s"))
        LOGGER.addHandler(handler)


def _report_at_exit(record: Record) -> None:
    process = os.getpid()
    if process not in _to_report:
        _to_report[process] = []
        Finalize(None, _report, exitpriority=0)  # unlike atexit it is heeded in children of multiprocessing, too
    if record not in _to_report[process]:
        _to_report[process].append(record)


def _report() -> None:
    for record in _to_report.get(os.getpid(), ()):
        LOGGER.info("%s", summary(record))
