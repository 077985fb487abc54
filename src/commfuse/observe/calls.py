"""What is noted at the end of each call. The engine's hot path: well under a microsecond while ``log`` is "off"."""

from __future__ import annotations

import time

from .. import config
from ..call import Call
from . import log
from .statistics import record_of


def ended(call: Call, begin_ns: int, backend: str = "", error: BaseException | None = None) -> None:
    """Note that ``call``, begun at ``begin_ns`` of `time.perf_counter_ns`, is over: ``backend`` ran it, or it raised ``error``."""
    nanoseconds = time.perf_counter_ns() - begin_ns
    record = record_of(call.group)
    record.tally(call.operator.name).count(nanoseconds, failed=error is not None)
    if error is None:
        record.backend = backend
    if config.get("log") != "off":
        log.tell(call, nanoseconds, error)
