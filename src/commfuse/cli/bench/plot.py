"""A picture of the round trips. matplotlib is needed here and nowhere else."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from ..arguments import UsageError
from .figures import Figures
from .launch import Launch
from .methods import METHODS

_TALL = 2.6  # inches for each workload
_WIDE = 9.0


def need() -> None:
    """Raise UsageError if matplotlib is missing: before anything is measured."""
    if find_spec("matplotlib") is None:
        raise UsageError("--plot needs matplotlib; pip install 'commfuse[plot]' brings it")


def draw(launches: Sequence[Launch], file: Path) -> None:
    """Write a picture of all launches to ``file``: a bar for each method, from p10 to p90 a line, on a logarithmic axis."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    picture, axes = pyplot.subplots(len(launches), 1, figsize=(_WIDE, _TALL * len(launches)), squeeze=False, layout="constrained")
    for axis, launch in zip(axes[:, 0], launches, strict=True):
        measured = bars(launch)
        medians = [found.round_trip.median for _, found in measured]
        below = [found.round_trip.median - found.round_trip.p10 for _, found in measured]
        above = [found.round_trip.p90 - found.round_trip.median for _, found in measured]
        axis.barh([name for name, _ in measured], medians, xerr=(below, above), color="#3478b0", ecolor="#1c263a")
        axis.set(xscale="log", xlabel="round trip, microseconds")
        axis.set_title(launch.workload.title, fontsize="small", loc="left")
        axis.invert_yaxis()
    picture.savefig(file, dpi=150)
    pyplot.close(picture)


def bars(launch: Launch) -> list[tuple[str, Figures]]:
    """Return the methods that have figures, in the order of the table of methods."""
    order = [row.name for row in METHODS]
    measured = [(row.name, row.figures) for row in launch.rows if row.figures is not None]
    return sorted(measured, key=lambda bar: order.index(bar[0]) if bar[0] in order else len(order))
