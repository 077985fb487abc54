"""Breadth-first search over all states that a machine can reach."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import TypeVar

State = TypeVar("State", bound=Hashable)


class Violation(Exception):  # noqa: N818 - what is found, not an error of the search
    """A step that must never be possible."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a search has seen: how much, and the shortest way to what must not happen, if there is one."""

    num_states: int
    num_ends: int
    violation: str = ""
    trace: tuple[str, ...] = ()


def explore(
    start: State,
    steps: Callable[[State], Iterable[tuple[str, State]]],
    judge_end: Callable[[State], str],
) -> Found:
    """Visit every state that ``steps`` (label, next state) leads to from ``start``.

    ``steps`` raises Violation, with the step in its text; ``judge_end`` says what is wrong with a state in which nobody can take a
    step, or "". The search stops at the first thing that is wrong.
    """
    came_from: dict[State, tuple[State, str] | None] = {start: None}
    waiting, num_ends = deque([start]), 0
    while waiting:
        state = waiting.popleft()
        wrong, is_end = "", True
        try:
            for label, following in steps(state):
                is_end = False
                if following not in came_from:
                    came_from[following] = state, label
                    waiting.append(following)
        except Violation as violation:
            wrong, is_end = str(violation), False
        if is_end:
            num_ends += 1
            wrong = judge_end(state)
        if wrong:
            return Found(num_states=len(came_from), num_ends=num_ends, violation=wrong, trace=_way(came_from, state))
    return Found(num_states=len(came_from), num_ends=num_ends)


def _way(came_from: dict[State, tuple[State, str] | None], state: State) -> tuple[str, ...]:
    labels: list[str] = []
    while (before := came_from[state]) is not None:
        state, label = before
        labels.append(label)
    return tuple(reversed(labels))
