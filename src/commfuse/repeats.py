"""Short ways for calls that have been made before, kept for each operator of a group.

The second call of a form that gives a result asks the backend for one. It serves as long as neither a setting nor the ranks that take
part have changed; what it does not serve goes the long way, which finds and says everything that is wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import config
from .backends.base import Backend, Repeat
from .call import Call, Form
from .groups import Group

_KEEP = 16  # short ways of one operator in one group
_COUNT = 512  # forms whose calls are counted
_KEY = "repeats"

Args = dict[str, Any]


class Repeats:
    """Of one operator in one group."""

    def __init__(self) -> None:
        self._changes = config.changes
        self._known: dict[Form, Repeat] = {}  # the latest comes last
        self._times: dict[Form, int] = {}

    def run(self, args: Args) -> tuple[torch.Tensor | None, ...] | None:
        """Carry out a call that has been made before; None, with nothing sent, if there is no short way for it."""
        if self._changes != config.changes:
            self.forget()
        for form in reversed(self._known):
            outputs = self._known[form].run(args)
            if outputs is not None:
                self._known[form] = self._known.pop(form)  # layers call in turn, so what served last is tried first
                return outputs
        return None

    def learn(self, backend: Backend, call: Call, args: Args, bind: Callable[[Args], Call]) -> None:
        """Take note of a call that has given a result on the long way."""
        if any(not known.is_current for known in self._known.values()):
            self.forget()
        if call.form in self._known:  # it was out of the ordinary
            return
        if len(self._times) >= _COUNT:
            self._times.clear()
        times = self._times[call.form] = self._times.get(call.form, 0) + 1
        if times % 4 == 2 and (made := backend.repeat(call, args, bind)) is not None:
            self._known[call.form] = made
            if len(self._known) > _KEEP:
                del self._known[next(iter(self._known))]

    def forget(self) -> None:
        """Begin anew."""
        self._changes = config.changes
        self._known.clear()
        self._times.clear()


def of(group: Group, operator: str) -> Repeats:
    """Return what is kept for an operator of ``group``."""
    by_operator: dict[str, Repeats] = group.shared.setdefault(_KEY, {})
    known = by_operator.get(operator)
    if known is None:
        known = by_operator[operator] = Repeats()
    return known


def may_run() -> bool:
    """Whether nobody listens to the phases and ends of calls, which a short way does not tell."""
    return not torch.autograd._profiler_enabled() and config.get("log") == "off"
