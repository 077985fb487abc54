"""The course that the matmul operators share: stage, publish, meet, read, close."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ... import _core
from ...call import Call
from ...errors import CommfuseError
from ...observe.ranges import phase
from .session import Session
from .slabs import Slab
from .staging import Staging


class Publication:
    """What one call publishes, and its number while that may be read."""

    def __init__(self, call: Call, session: Session, sizes: Sequence[int]) -> None:
        """Begin ``call`` with segments of ``sizes`` bytes, to be written before `publish`.

        Raises:
            CommfuseError: there is not enough memory here: the call is refused on all ranks; or see `Session.begin`.
        """
        self.call, self.session = call, session
        self.sequence, self.offer = session.begin(call), session.offer(call)
        try:
            self.staging = Staging(session, sizes)
        except _core.CoreMemoryError as lack:
            session.refuse(call, self.sequence, str(lack))
        self.staging.fill(self.offer)

    def put(self, segment: int, rows: torch.Tensor) -> None:
        """Publish ``rows`` as ``segment``: where they lie if they can be lent, otherwise as a copy; see `staged_bytes`."""
        slab = _lendable(self.session, rows)
        if slab is None:
            self.staging.copy_in(segment, rows)
            return
        self.offer.set_segment(segment, rows.data_ptr(), _num_bytes(rows))
        slab.add_reader(self.session.reading(self.sequence))
        self.session.lend(rows, self.sequence)

    @phase("publish")
    def publish(self) -> None:
        """Show the segments to the peers."""
        self.session.channel.publish(self.sequence, self.offer)

    def meet(self) -> None:
        """Wait until the peers have published theirs.

        Raises:
            CommfuseError: see `Session.meet`; what was staged is given back then.
        """
        try:
            error = self.session.meet(self.call, self.sequence, self.offer)
        except CommfuseError:  # the group is given up, or begins anew: there is nothing left to end
            self.staging.release(self.sequence)
            raise
        if error is not None:
            self.close()
            raise error

    def publish_again(self) -> None:
        """End the first reading, show the segments as they are now, and wait for the peers to do so. Raises as `meet` does."""
        self.session.end(self.sequence)
        self.sequence, self.offer = self.session.begin(self.call), self.session.offer(self.call)
        self.staging.fill(self.offer)
        self.publish()
        self.meet()

    def close(self) -> None:
        """Say that this rank has read all it needs, and take back what the peers have read: at least what earlier calls lent them."""
        self.session.end(self.sequence)
        self.staging.release(self.sequence)
        self.session.take_back()


def staged_bytes(session: Session, rows: torch.Tensor) -> int:
    """Return how much room `Publication.put` needs for ``rows``: none where they can be lent."""
    return 0 if _lendable(session, rows) else _num_bytes(rows)


def _lendable(session: Session, rows: torch.Tensor) -> Slab | None:
    return session.slabs.holding(rows) if rows.is_contiguous() and rows.numel() else None


def _num_bytes(rows: torch.Tensor) -> int:
    return rows.nbytes
