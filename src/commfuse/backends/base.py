"""What a backend is: a name, the reasons why it cannot run here, and ``run``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

from ..call import Call, Form
from ..groups import Group

Outputs = tuple[torch.Tensor | None, ...]


class Repeat(Protocol):
    """A short way for the calls of one form in one group."""

    form: Form

    @property
    def is_current(self) -> bool:
        """Whether the group is as it was when this was made; otherwise it is of no more use."""
        ...

    def run(self, args: dict[str, Any]) -> Outputs | None:
        """Carry out the call with these arguments; None, with nothing sent, if it has another form or needs the long way."""
        ...


class Backend(Protocol):
    """A way to carry out calls."""

    name: str

    def why_not(self, group: Group) -> list[str]:
        """Return the reasons why this process cannot run ``group``'s calls this way; empty means it can."""
        ...

    def place(self) -> str:
        """Return where this process is; ranks can use the backend together only if all return the same. Empty: anywhere."""
        ...

    def run(self, call: Call) -> Outputs:
        """Carry out ``call`` together with the other ranks and return this rank's outputs.

        Raises:
            CommfuseError: on every rank alike, if any rank refused its arguments or ranks disagree.
        """
        ...

    def repeat(self, call: Call, args: dict[str, Any], bind: Callable[[dict[str, Any]], Call]) -> Repeat | None:
        """Return a short way for calls like ``call``, which has just given a result; None if this backend has none for it.

        ``args``: what it was bound from; ``bind`` does that.
        """
        ...

    def agree_on(self, members: Group, subject: str) -> None:
        """Make sure that every rank, as calls go now, is about to do ``subject``, something that is not an operator.

        Raises:
            MismatchError: a rank is in another call.
        """
        ...

    def survivors(self, group: Group) -> tuple[int, ...]:
        """Return the ranks of ``group`` that live, the same on all of them.

        Raises:
            BackendError: this backend cannot go on without a rank.
        """
        ...

    def reset(self, group: Group) -> None:
        """Make ``group`` usable again after it has been given up.

        Raises:
            BackendError: this backend cannot.
        """
        ...
