"""What every group's calls have cost so far, and whom they waited for."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch.distributed as dist

from .. import groups
from ..groups import Group

_KEY = "record"


class Tally:
    """The calls of one operator so far."""

    def __init__(self) -> None:
        self.numbers = array("q", bytes(24))  # calls, of them errors, nanoseconds in all; in memory where the core can count, too

    @property
    def calls(self) -> int:
        """All calls."""
        return self.numbers[0]

    @property
    def errors(self) -> int:
        """Those that raised."""
        return self.numbers[1]

    @property
    def nanoseconds(self) -> int:
        """In all of them together."""
        return self.numbers[2]

    def count(self, nanoseconds: int, *, failed: bool = False) -> None:
        """Add one call that took so long."""
        for i, more in enumerate((1, failed, nanoseconds)):
            self.numbers[i] += more


@dataclass(eq=False, kw_only=True, slots=True)
class Record:
    """What is written down about the calls of one group. Holds nothing of the group, so that it may outlive it."""

    group: str
    rank: int
    size: int
    tallies: dict[str, Tally] = field(default_factory=dict)
    backend: str = ""  # of the latest call that gave a result
    waited_us: dict[int, float] = field(default_factory=dict)  # when somebody last looked
    refreshed: int = 0  # after how many calls

    @property
    def calls(self) -> int:
        """The calls of all operators."""
        return sum(tally.calls for tally in self.tallies.values())

    def tally(self, operator: str) -> Tally:
        """Return the calls of an operator, none so far if it is new."""
        tally = self.tallies.get(operator)
        if tally is None:
            tally = self.tallies[operator] = Tally()
        return tally

    def refresh(self, group: Group) -> dict[int, float]:
        """Note what ``group`` knows now; return the microseconds that the latest call waited for each rank, nothing if not known."""
        before, self.waited_us = self.waited_us, group.waited_us()
        one_call, self.refreshed = self.refreshed == self.calls - 1, self.calls
        return {rank: waited - before.get(rank, 0.0) for rank, waited in self.waited_us.items()} if one_call else {}


def record_of(group: Group) -> Record:
    """Return the record of a group, a new one if there is none yet."""
    record: Record | None = group.shared.get(_KEY)
    if record is None:
        record = group.shared[_KEY] = Record(group=group.name, rank=group.rank, size=group.size)
    return record


@dataclass(frozen=True, kw_only=True)
class OperatorStats:
    """The calls of one operator in one group, by this process."""

    calls: int  # all of them
    errors: int  # those that raised
    time_us: float  # in all of them together, waiting included


@dataclass(frozen=True, kw_only=True)
class Stats:
    """What this process has seen of one group; ``str`` gives a table."""

    group: str
    rank: int  # of this process
    size: int
    backend: str  # of the latest call that gave a result; empty before the first
    operators: Mapping[str, OperatorStats]
    waited_us: tuple[float, ...]  # for each rank; 0 for this one

    @property
    def straggler(self) -> int | None:
        """The rank that was waited for longest; None if none was waited for."""
        longest = max(self.waited_us)
        return self.waited_us.index(longest) if longest > 0 else None

    def __str__(self) -> str:
        """A table of the operators, and one of the ranks."""
        on = f" on {self.backend}" if self.backend else ""
        width = max(map(len, ["operator", *self.operators]))
        lines = [f"group {self.group!r}{on}, rank {self.rank} of {self.size}"]
        lines.append(f"  {'operator':{width}}  {'calls':>9}  {'errors':>6}  {'time [us]':>14}  {'per call [us]':>13}")
        for name, row in self.operators.items():
            each = row.time_us / row.calls
            lines.append(f"  {name:{width}}  {row.calls:>9,}  {row.errors:>6,}  {row.time_us:>14,.1f}  {each:>13,.1f}")
        lines.append(f"  {'rank':>4}  {'waited for it [us]':>18}")
        for rank, waited in enumerate(self.waited_us):
            mark = "  this process" if rank == self.rank else "  longest" if rank == self.straggler else ""
            lines.append(f"  {rank:>4}  {waited:>18,.1f}{mark}")
        return "\n".join(lines)


def stats(group: str | dist.ProcessGroup) -> Stats:
    """Return what this process has seen of ``group`` since it was made: calls, time in them, waiting for each rank. Not collective.

    Raises:
        GroupError: there is no such group.
    """
    found = groups.resolve(group)
    record = record_of(found)
    record.refresh(found)
    return summary(record)


def summary(record: Record) -> Stats:
    """Return ``record`` as it stands."""
    operators = {
        name: OperatorStats(calls=tally.calls, errors=tally.errors, time_us=tally.nanoseconds / 1000)
        for name, tally in record.tallies.items()
    }
    return Stats(
        group=record.group,
        rank=record.rank,
        size=record.size,
        backend=record.backend,
        operators=operators,
        waited_us=tuple(0.0 if rank == record.rank else record.waited_us.get(rank, 0.0) for rank in range(record.size)),
    )
