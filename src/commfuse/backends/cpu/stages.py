"""Where repeated calls put what they publish: a few slabs in turn, free again when every peer has read what lies there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ... import _core
from .slabs import Slab

if TYPE_CHECKING:
    from .session import Session


@dataclass(eq=False, kw_only=True, slots=True)
class _Stage:
    slab: Slab
    sequence: int  # the call that used it last


class Stages:
    """Of one session."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._all: list[_Stage] = []

    def take(self, sequence: int, num_bytes: int) -> int:
        """Return the address of ``num_bytes`` for call ``sequence`` to publish.

        Raises:
            CoreMemoryError: there is not enough memory; nothing has been touched.
        """
        channel = self._session.channel
        for stage in self._all:  # always in this order: the pages of the first ones stay warm
            if stage.slab.used >= num_bytes and channel.reached(_core.CONSUMED, stage.sequence):
                break
        else:
            stage = self._new(num_bytes)
        stage.sequence = sequence
        return stage.slab.address

    def _new(self, num_bytes: int) -> _Stage:
        """Return a new one, in the place of one that was too small if there is such."""
        channel, slabs = self._session.channel, self._session.slabs
        for stage in self._all:
            if channel.reached(_core.CONSUMED, stage.sequence):
                self._all.remove(stage)
                slabs.give(stage.slab)
                break
        self._all.append(_Stage(slab=slabs.staging(num_bytes), sequence=0))
        return self._all[-1]

    def retire(self) -> None:
        """Give all up: others take part from now on, and those who did may still be reading."""
        for stage in self._all:
            stage.slab.add_reader(self._session.reading(stage.sequence))
            self._session.slabs.give(stage.slab)
        self._all.clear()
