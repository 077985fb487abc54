"""Calls that are like one before: of the checks only those of the data, and all steps in one go in the core (csrc/bind_repeat.cpp).

A repeated call publishes all that the others read of `dispatch` and `combine`, so the ranks of one call need not all repeat it. Whatever is
out of the ordinary (other arguments, ids that break a rule, a group that has been given up) is left to them, before anything has
been published; what comes up later is handed to the session, as they do.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ClassVar, NoReturn

import torch

from ... import _core, config
from ...call import Call
from ...observe.statistics import record_of
from ...operators.moe_distribute import values
from . import combine, domain, routing
from .domain import Domain
from .leaving import LeftOut
from .session import NUMBER, REFUSED_AND_DIGEST, Session
from .staging import DTYPES

Args = dict[str, Any]
Outputs = tuple[torch.Tensor, ...]


class Repeat:
    """One form of a call in one group."""

    _ABSENT: ClassVar[tuple[str, ...]]  # arguments that must not be given, or be 0
    _core: Any

    def __init__(self, call: Call, domain: Domain, bind: Callable[[Args], Call]) -> None:
        self.form, self._name, self._bind = call.form, call.operator.name, bind
        self._domain, self._session = domain, domain.whole

    @classmethod
    def suits(cls, call: Call) -> bool:
        """Whether calls like ``call``, which has given a result, can be carried out this way."""
        return (
            call.product == config.PORTABLE
            and call.partner is None
            and not config.get("check")
            and not config.get("poison")
            and call["layout"] == "triplets"
            and not call["split_shared"]
            and call["BS"] > 0
            and not any(isinstance(call[name], torch.Tensor) or call[name] for name in cls._ABSENT)
        )

    @property
    def is_current(self) -> bool:
        """Whether the group is as it was when this was made."""
        current: bool = self._core.is_current
        return current

    def run(self, args: Args) -> Outputs | None:
        """Carry out the call; None if it is another one, or not an ordinary one, and nothing has been published.

        Raises:
            CommfuseError: as the operator does.
        """
        try:
            outputs: Any = self._core.run(args)
            while isinstance(outputs, int):
                outputs = self._see_to(outputs, args)
        except BaseException as error:
            if not self._core.is_under_way:  # it came when the call was over
                raise
            is_left_out = isinstance(error, LeftOut)  # the others have gone on without this rank: the long way agrees again
            try:
                if not is_left_out:
                    self._domain.broke_off(self._name, error)
                    raise
            finally:
                self._core.give_up(not is_left_out)
            return None
        return outputs  # type: ignore[no-any-return]

    def _see_to(self, stop: int, args: Args) -> Any:
        """Do what the core has stopped for; return what comes of going on."""
        self._meet(args)
        if stop == _core.DIFFERS:
            raise _core.CoreError("headers that differed are equal now")
        return self._core.finish()

    def _meet(self, args: Args) -> None:
        """Wait on for who has not come, and find out what is wrong, as every other call does.

        Raises:
            CommfuseError: something is.
        """
        error = self._session.meet(self._bind(args), self._core.sequence, self._core.offer)
        if error is not None:
            self._session.end(self._core.sequence)
            raise error

    def _header_outputs_tally(self, call: Call) -> tuple[bytes, int, list[tuple[Any, torch.Tensor]], Any]:
        """Return the header's body, where the number stands in it, the outputs, and where calls are counted."""
        outputs = [(shape, blank) for _, shape, blank in call.form.blanks]
        return _body(self._session, call), REFUSED_AND_DIGEST, outputs, record_of(call.group).tally(self._name).numbers


class RepeatedDispatch(Repeat):
    """Of npu_moe_distribute_dispatch_v2."""

    _ABSENT = ("scales", "elastic_info", "performance_info")

    def __init__(self, call: Call, domain: Domain, bind: Callable[[Args], Call], args: Args) -> None:
        super().__init__(call, domain, bind)
        session = self._session
        route = routing.of(session, call)
        _, shape, blank = call.form.blanks[0]
        self._core = _core.RepeatedDispatch(
            args,
            session.calls,
            route.check,
            route.sort,
            *self._header_outputs_tally(call),
            DTYPES[call["x"].dtype],
            call["quant_mode"] == 2,
            call["expert_token_nums_type"] == 0,
            session.large_copy,
            torch.is_inference_mode_enabled,
            functools.partial(session.slabs.tensor, shape=shape, dtype=blank.dtype),
        )


class RepeatedCombine(Repeat):
    """Of npu_moe_distribute_combine_v2."""

    _ABSENT = (
        "shared_expert_x",
        "elastic_info",
        "performance_info",
        "comm_quant_mode",
        "copy_expert_num",
        "const_expert_num",
    )

    def __init__(self, call: Call, domain: Domain, bind: Callable[[Args], Call], args: Args) -> None:
        super().__init__(call, domain, bind)
        self._route = routing.of(self._session, call)
        _, num_counts, room = values.used_and_room(call)
        self._core = _core.RepeatedCombine(
            args,
            self._session.calls,
            self._route.check,
            self._route.terms,
            self._route.sort,
            *self._header_outputs_tally(call),
            DTYPES[call["expand_x"].dtype],
            num_counts,
            room,
            self._session.large_copy,
        )

    def _see_to(self, stop: int, args: Args) -> Any:
        session, core = self._session, self._core
        if stop == _core.FAULT:
            self._refute(args)
        if stop == _core.UNHEARD:
            combine.hear_verdicts(self._bind(args), session, core.sequence, "")
            return core.close()
        return super()._see_to(stop, args)

    def _refute(self, args: Args) -> NoReturn:
        """Say what is wrong with the rows that the others hold for this rank."""
        session, call, core = self._session, self._bind(args), self._core
        problem = combine.in_words(call, session, self._route, core.keys, core.fault)
        session.channel.advance(_core.PROGRESS, 2 * core.sequence + 1)
        session.end(core.sequence)
        combine.hear_verdicts(call, session, core.sequence, problem)
        raise _core.CoreError(problem)  # not reached: it was the verdict of all


def _body(session: Session, call: Call) -> bytes:
    """Return what stands in the header of every call of this form, with room for its number."""
    head, name = session.body(call)
    return head + bytes(NUMBER) + name


_KINDS = {"npu_moe_distribute_dispatch_v2": RepeatedDispatch, "npu_moe_distribute_combine_v2": RepeatedCombine}


def make(call: Call, bind: Callable[[Args], Call], args: Args) -> Repeat | None:
    """Return how to carry out calls like ``call``, which has given a result and was made of ``args``; None if there is no short way."""
    kind = _KINDS.get(call.operator.name)
    if kind is None or not kind.suits(call):
        return None
    try:
        return kind(call, domain.of(call.group), bind, args)
    except _core.CoreError:  # an argument that cannot be compared, or tensors that cannot be looked at
        return None
