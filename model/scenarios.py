"""What the ranks do in each search, and what must hold when nobody can go on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

from . import align
from .calls import Calls, Step
from .explore import Found, explore
from .state import ALIGN, DEAD, DONE, ERROR, FAILED, HALVES, RUN, TELL, WHOLE, Line, Rank, World, with_rank


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """Ranks that carry out ``words`` each; after a death, if they go on, those in ``after``.

    The words: ``exchange``, ``setup``, ``teardown``; ``tensor`` makes one in the window, ``lend`` is an exchange that publishes it
    where it lies, ``touch`` may change it, ``drop`` gives it up. ``senders`` read nothing. ``depth``: headers that each line keeps.
    ``deaths`` of the ``mortal``, at most, each at any step.
    """

    name: str
    num_ranks: int
    words: str
    after: str = ""
    depth: int = 2
    deaths: int = 0
    mortal: tuple[int, ...] = ()
    senders: tuple[int, ...] = ()

    def search(self, *broken: str) -> Found:
        """Visit every state; ``broken`` names rules that are left out."""
        rules = frozenset(broken)
        everybody = tuple(range(self.num_ranks))
        programs = tuple((self._program(me, self.words), self._program(me, self.after)) for me in everybody)
        calls = Calls(programs=programs, depth=self.depth, broken=rules, elastic=bool(self.after))
        line = Line(ring=((0, -1),) * self.depth)
        start = (Rank(active=everybody, lines=(line, line)),) * self.num_ranks
        return explore(start, lambda world: self._steps(world, calls), self._judge_end)

    def _program(self, me: int, words: str) -> tuple[Step, ...]:
        return tuple(chain.from_iterable(self._spell(me, word) for word in words.split()))

    def _spell(self, me: int, word: str) -> list[Step]:
        others = [] if me in self.senders else [one for one in range(self.num_ranks) if one != me]
        line = HALVES if word in ("setup", "teardown") else WHOLE
        pulls: list[Step] = [("pull", line, one) for one in others]
        if word == "setup":
            return [("begin", line, 0), ("publish", line, 0)]
        if word == "teardown":
            return [("hear", line, 1), *pulls, ("end", line, 0)]
        if word in ("tensor", "touch", "drop"):
            return [(word, WHOLE, 0)]
        lend = int(word == "lend")
        begin = "lend" if lend else "begin"
        return [(begin, WHOLE, lend), ("publish", WHOLE, lend), ("hear", WHOLE, 0), ("meet", WHOLE, 0), *pulls, ("end", WHOLE, 0)]

    def _steps(self, world: World, calls: Calls) -> Iterator[tuple[str, World]]:
        for me, rank in enumerate(world):
            if rank.mode in (DONE, ERROR, DEAD):
                continue
            if me in self.mortal and sum(one.mode == DEAD for one in world) < self.deaths:
                yield f"rank {me} dies", with_rank(world, me, rank._replace(mode=DEAD))
            for following in self._own_steps(world, me, calls):
                yield f"rank {me}: {_what(rank, calls, me)}", following

    def _own_steps(self, world: World, me: int, calls: Calls) -> list[World]:
        mode = world[me].mode
        if mode == RUN:
            return calls.steps(world, me)
        if mode == TELL:
            return calls.tell(world, me)
        return align.propose(world, me) if mode == FAILED else align.look(world, me, calls.broken)

    def _judge_end(self, world: World) -> str:
        living = [(me, rank) for me, rank in enumerate(world) if rank.mode != DEAD]
        for me, rank in living:
            if rank.mode not in (DONE, ERROR):
                return f"rank {me} waits for ever"
            if rank.is_misread and rank.mode == DONE:
                return f"what rank {me} had lent and changed was read, and nobody was told"
            if rank.mode == ERROR and self.after:
                return f"rank {me} has not found together with the others"
            if rank.mode == ERROR and rank.poison != world[0].poison:
                return f"rank {me} tells another cause than rank 0"
            ended, needed = rank.lines[WHOLE].consumed, [world[one].lines[WHOLE].published for one in rank.active]
            if rank.mode == DONE and min(needed) < ended:
                return f"rank {me} is through with a call that was never published"
        if len(living) == len(world) and "touch" not in self.words and any(rank.mode == ERROR for rank in world):
            return "an error without a reason"
        return ""


def _what(rank: Rank, calls: Calls, me: int) -> str:
    program = calls.programs[me][rank.program]
    if rank.mode != RUN or rank.step == len(program):
        return {RUN: "is through", ALIGN: "looks at the boards", FAILED: "calls again"}.get(rank.mode, "tells the cause")
    verb, line, member = program[rank.step]
    return f"{verb} {'halves' if line == HALVES else 'whole'}" + (f" from {member}" if verb == "pull" else "")


LENT = "exchange tensor lend touch exchange drop exchange"
SETUPS = "setup setup teardown setup teardown exchange teardown setup teardown"
SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario(name="exchanges, 2 ranks", num_ranks=2, words="exchange " * 4, depth=1, mortal=(0, 1), deaths=1),
        Scenario(name="exchanges, 3 ranks", num_ranks=3, words="exchange " * 3, depth=1, mortal=(0, 1, 2), deaths=1),
        Scenario(name="setups, 2 ranks", num_ranks=2, words=SETUPS, mortal=(0, 1), deaths=1),
        Scenario(name="setups, 3 ranks", num_ranks=3, words="setup setup teardown teardown", mortal=(0, 1, 2), deaths=1),
        Scenario(name="setup and exchange, 3 ranks", num_ranks=3, words="setup exchange teardown", mortal=(0, 1, 2), deaths=1),
        Scenario(name="one-way sender, 2 ranks", num_ranks=2, words=SETUPS, mortal=(0, 1), deaths=1, senders=(0,)),
        Scenario(name="one-way senders, 3 ranks", num_ranks=3, words=SETUPS, senders=(0, 1)),
        Scenario(name="lent tensor, 2 ranks", num_ranks=2, words=LENT, depth=1, mortal=(0, 1), deaths=1),
        Scenario(name="lent tensor, 3 ranks", num_ranks=3, words="tensor lend touch exchange", depth=1, mortal=(0, 1), deaths=1),
        Scenario(name="going on, 3 ranks", num_ranks=3, words="exchange", after="exchange exchange", mortal=(0, 1, 2), deaths=1),
        Scenario(
            name="going on from setups, 3 ranks",
            num_ranks=3,
            words="setup setup exchange teardown teardown",
            after="setup exchange teardown",
            depth=3,
            mortal=(0, 1, 2),
            deaths=1,
        ),
        Scenario(name="two deaths, 3 ranks", num_ranks=3, words="exchange", after="exchange", mortal=(0, 1, 2), deaths=2),
        Scenario(
            name="two deaths, 4 ranks",
            num_ranks=4,
            words="exchange",
            after="exchange",
            mortal=(2, 3),
            deaths=2,
            senders=(0, 1, 2, 3),
        ),
    )
}
