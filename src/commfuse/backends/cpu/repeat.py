"""Calls that are like one before: of the checks only those of the data, and the steps before and after the wait in one go each.

A repeated call publishes and reads what `dispatch` and `combine` do, so the ranks of one call need not all repeat it. Whatever is
out of the ordinary (other arguments, ids that break a rule, a group that has been given up) is left to them, before anything has
been published; what comes up later is handed to the session, as they do.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

import torch

from ... import _core, config
from ...call import Call
from ...observe.statistics import record_of
from ...operators.moe_distribute import values
from . import combine, routing
from .leaving import LeftOut
from .session import NUMBER, REFUSED_AND_DIGEST, SLICE, Session
from .staging import DTYPES

if TYPE_CHECKING:
    from .domain import Domain

Args = dict[str, Any]
Outputs = tuple[torch.Tensor, ...]

_INVALID = -1  # of `start`: the ids break a rule; nothing has been published
_DIFFERS = -1  # of `count`, `find` and `hear`: a header, or what a rank has found


class Repeat:
    """One form of a call in one group."""

    _ABSENT: ClassVar[tuple[str, ...]]  # arguments that must not be given, or be 0
    _core: Any

    def __init__(self, call: Call, domain: Domain, bind: Callable[[Args], Call]) -> None:
        self._name, self._members, self._bind = call.operator.name, domain.members, bind
        self._domain, self._session = domain, domain.whole
        self._record = record_of(call.group)
        self._tally = self._record.tally(self._name)

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
        return self._domain.members is self._members

    def run(self, args: Args) -> Outputs | None:
        """Carry out the call; None if it is another one, or not an ordinary one, and nothing has been published.

        Raises:
            CommfuseError: as the operator does.
        """
        domain = self._domain
        if domain.members is not self._members or not domain.enter():
            return None
        begin = time.perf_counter_ns()
        try:
            sequence = self._session.next_call() if self._core.match(args) else 0
            outputs = self._run(args, sequence) if sequence else None
        except LeftOut:  # the long way agrees with the others again
            return None
        except BaseException as error:
            self._note(begin, failed=True)
            domain.broke_off(self._name, error)
            raise
        finally:
            domain.leave()
        if outputs is not None:
            self._note(begin)
        return outputs

    def _run(self, args: Args, sequence: int) -> Outputs | None:
        raise NotImplementedError

    def _note(self, begin: int, *, failed: bool = False) -> None:
        self._record.calls += 1
        self._tally.count(time.perf_counter_ns() - begin, failed=failed)

    def _meet(self, args: Args, sequence: int) -> None:
        """Wait on for who has not come, and find out what is wrong, as every other call does.

        Raises:
            CommfuseError: something is.
        """
        error = self._session.meet(self._bind(args), sequence, self._core.offer)
        if error is not None:
            self._session.end(sequence)
            raise error

    def _explain(self, args: Args, sequence: int) -> NoReturn:
        """Raise what is wrong with headers that are not all equal."""
        self._meet(args, sequence)
        raise _core.CoreError("headers that differed are equal now")


class RepeatedDispatch(Repeat):
    """Of npu_moe_distribute_dispatch_v2."""

    _ABSENT = ("scales", "elastic_info", "performance_info")

    def __init__(self, call: Call, domain: Domain, bind: Callable[[Args], Call], args: Args) -> None:
        super().__init__(call, domain, bind)
        route, session = routing.of(self._session, call), self._session
        (_, self._shape, blank), *others = call.form.blanks
        self._dtype, self._row_bytes = blank.dtype, self._shape[1] * blank.element_size()
        self._core = _core.RepeatedDispatch(
            args,
            torch.Tensor,
            session.channel,
            route.check,
            route.sort,
            _body(session, call),
            REFUSED_AND_DIGEST,
            [(shape, one) for _, shape, one in others],
            DTYPES[call["x"].dtype],
            call["quant_mode"] == 2,
            call["expert_token_nums_type"] == 0,
            session.large_copy,
        )
        self._staged = self._core.staged_bytes

    def _run(self, args: Args, sequence: int) -> Outputs | None:
        session, core = self._session, self._core
        try:
            staging = session.stages.take(sequence, self._staged)
        except _core.CoreMemoryError:
            return None  # the long way tells the peers
        session.took(sequence)
        status = core.start(sequence, self._domain.calls, staging, SLICE)
        if status:
            if status == _INVALID:
                session.forget(sequence)
                return None
            self._meet(args, sequence)
        total = core.count(sequence)
        if total == _DIFFERS:
            self._explain(args, sequence)
        session.take_back()  # who is here has read what earlier calls lent: its memory may serve this one
        rows = session.slabs.empty(self._shape, self._dtype, total)
        others: Outputs = core.place(rows.data_ptr(), self._shape[0] * self._row_bytes, total)
        session.end(sequence)
        return (rows, *others)


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
            torch.Tensor,
            self._session.channel,
            self._route.check,
            self._route.terms,
            self._route.sort,
            _body(self._session, call),
            REFUSED_AND_DIGEST,
            [(shape, one) for _, shape, one in call.form.blanks],
            DTYPES[call["expand_x"].dtype],
            num_counts,
            room,
            self._session.large_copy,
        )

    def _run(self, args: Args, sequence: int) -> Outputs | None:
        session, core = self._session, self._core
        slab = session.slabs.at(core.rows)
        in_place = slab is not None
        num_bytes = core.prepare(in_place)
        if num_bytes < 0:
            return None
        try:
            staging = session.stages.take(sequence, num_bytes)
        except _core.CoreMemoryError:
            return None
        if slab is not None:
            slab.add_reader(session.reading(sequence))  # first: an interrupt may end the wait once peers can read it
        session.took(sequence)
        status = core.start(sequence, self._domain.calls, staging, in_place, SLICE)
        if status == _INVALID:
            session.forget(sequence)
            return None
        if in_place:
            session.lend(args["expand_x"], sequence)
        if status:
            self._meet(args, sequence)
        fault = core.find(sequence)
        if fault:
            self._explain(args, sequence) if fault == _DIFFERS else self._refute(args, sequence, fault)
        total = core.sum()
        session.end(sequence)
        if core.hear(sequence, SLICE):
            combine.hear_verdicts(self._bind(args), session, sequence, "")
        session.take_back()
        return (total,)

    def _refute(self, args: Args, sequence: int, fault: int) -> NoReturn:
        """Say what is wrong with the rows that the others hold for this rank."""
        session, call = self._session, self._bind(args)
        problem = combine.in_words(call, session, self._route, self._core.keys, fault)
        session.channel.advance(_core.PROGRESS, 2 * sequence + 1)
        session.end(sequence)
        combine.hear_verdicts(call, session, sequence, problem)
        raise _core.CoreError(problem)  # not reached: it was the verdict of all


def _body(session: Session, call: Call) -> bytes:
    """Return what stands in the header of every call of this form, with room for its number."""
    head, name = session.body(call)
    return head + bytes(NUMBER) + name


_KINDS = {"npu_moe_distribute_dispatch_v2": RepeatedDispatch, "npu_moe_distribute_combine_v2": RepeatedCombine}


def make(call: Call, domain: Domain, bind: Callable[[Args], Call], args: Args) -> Repeat | None:
    """Return how to carry out calls like ``call``, which has given a result and was made of ``args``; None if there is no short way."""
    kind = _KINDS.get(call.operator.name)
    if kind is None or not kind.suits(call):
        return None
    try:
        return kind(call, domain, bind, args)
    except _core.CoreError:  # an argument that cannot be compared, or tensors that cannot be looked at
        return None
