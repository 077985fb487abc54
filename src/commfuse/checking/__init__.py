"""Backends against the goldens: cases run on real ranks, and every output is compared with what the published formula gives.

`commfuse check` and the parity tests are the two users. A family of operators takes part by one entry in `FAMILIES`.
"""

from __future__ import annotations

import pickle
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from .. import config
from ..compare import difference, outside
from ..errors import CommfuseError
from ..ranks import RankFailedError
from .companions import COMPANIONS
from .matmul import ALL_GATHER_MM, GMM_ALLTOALLV
from .moe_distribute import MoeDistribute
from .results import Expected, RankRun

__all__ = ["FAMILIES", "SETTINGS", "Case", "Expected", "Family", "Outcome", "RankRun", "RunRanks", "check"]

RunRanks = Callable[..., list[Any]]
"""``run(world_size, function, *args, deadline=seconds)``: function(rank, *args) on every rank, results in rank order."""

SETTINGS = {"product": "portable", "const_expert": "linear", "check": False, "poison": True}
"""What the cases are made for; poison shows whoever reads what is unspecified."""

_AT_ONCE = 25  # cases that ranks get in one job
_DEADLINE = 120  # seconds for such a job


class Case(Protocol):
    """One configuration; anything picklable that has a name."""

    @property
    def id(self) -> str:
        """Lower-case words joined by hyphens."""
        ...


class Family(Protocol):
    """Operators that are run together, and the configurations to run them in."""

    @property
    def name(self) -> str:
        """Lower-case words joined by underscores, unlike that of any other family."""
        ...

    @property
    def operators(self) -> tuple[str, ...]:
        """Names of the operators that a case runs."""
        ...

    def named_cases(self) -> Sequence[Any]:
        """Return cases that together take every value of every argument."""
        ...

    def random_case(self, seed: int) -> Any:
        """Return a small valid case, the same for the same ``seed``."""
        ...

    def world_size(self, case: Any) -> int:
        """Return how many processes the case needs."""
        ...

    def run_on_rank(self, rank: int, case: Any) -> RankRun | None:
        """Call the operators on this rank, which makes its own inputs; None where the rank has no part in the case."""
        ...

    def expected(self, case: Any) -> dict[int, list[Expected]]:
        """Return what each rank that has a part should return, in the order of its `RankRun.outputs`; all in this process."""
        ...


_ALL: tuple[Family, ...] = (MoeDistribute(), *COMPANIONS, *GMM_ALLTOALLV, *ALL_GATHER_MM)
FAMILIES: dict[str, Family] = {family.name: family for family in _ALL}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of one case."""

    family: str
    case: str
    backends: tuple[str, ...] = ()  # that ran it
    compared: Counter[str] = field(default_factory=Counter)  # outputs, per operator
    wrong: dict[str, list[str]] = field(default_factory=dict)  # per operator, each output that is not the golden's
    error: str = ""  # why there is nothing to compare

    @property
    def passed(self) -> bool:
        """Everything was there and as expected."""
        return all(self.passed_for(operator) for operator in FAMILIES[self.family].operators)

    @property
    def problems(self) -> list[str]:
        """All that is wrong, in words."""
        found = ([self.error] if self.error else []) + [text for texts in self.wrong.values() for text in texts]
        return found or ([] if self.passed else [f"{self.case}: an operator returned nothing to compare"])

    def passed_for(self, operator: str) -> bool:
        """There were outputs of ``operator``, all as expected."""
        return not self.error and not self.wrong.get(operator) and self.compared[operator] > 0


def check(run: RunRanks, family: Family, cases: Sequence[Any], **settings: Any) -> Iterator[Outcome]:
    """Run ``cases`` on ranks and compare; outcomes come by number of processes, not in the order of ``cases``.

    ``settings`` (see `config`) hold on the ranks, beside `SETTINGS`.
    """
    by_size: dict[int, list[Any]] = defaultdict(list)
    for case in cases:
        by_size[family.world_size(case)].append(case)
    for size, group in sorted(by_size.items()):
        for first in range(0, len(group), _AT_ONCE):
            yield from _check_at_once(run, family, size, group[first : first + _AT_ONCE], {**SETTINGS, **settings})


def _check_at_once(run: RunRanks, family: Family, size: int, cases: Sequence[Any], settings: dict[str, Any]) -> Iterator[Outcome]:
    try:
        data = run(size, on_rank, family.name, cases, settings, deadline=_DEADLINE)
    except RankFailedError as error:
        for case in cases:
            yield Outcome(family=family.name, case=case.id, error=f"with the cases beside it: {error}")
        return
    by_rank = [pickle.loads(part) for part in data]
    for i, case in enumerate(cases):
        yield judge(family, case, [results[i] for results in by_rank])


def on_rank(rank: int, family: str, cases: Sequence[Any], settings: dict[str, Any]) -> bytes:
    """Run ``cases`` on this rank; pickled: per case a `RankRun`, None, or the text of commfuse's error."""
    with config.override(**settings):
        return pickle.dumps([_run(FAMILIES[family], rank, case) for case in cases])


def _run(family: Family, rank: int, case: Any) -> RankRun | str | None:
    try:
        return family.run_on_rank(rank, case)
    except CommfuseError as error:
        return f"{type(error).__name__}: {error}"


def judge(family: Family, case: Any, by_rank: Sequence[RankRun | str | None]) -> Outcome:
    """Compare what the ranks returned for ``case`` with the golden."""
    errors = _by_text({rank: found for rank, found in enumerate(by_rank) if isinstance(found, str)})
    expected = family.expected(case)
    runs = {rank: run for rank, run in enumerate(by_rank) if isinstance(run, RankRun)}
    if not errors and set(runs) != set(expected):
        errors = [f"ranks {sorted(expected)} have a part in the case, ranks {sorted(runs)} returned something"]
    if errors:
        return Outcome(family=family.name, case=case.id, error="\n".join(errors))
    compared: Counter[str] = Counter()
    wrong: dict[str, list[str]] = defaultdict(list)
    for rank, run in runs.items():
        for wanted, got in zip(expected[rank], run.outputs, strict=True):
            compared[wanted.operator] += 1
            if text := _difference(f"{case.id}, {family.name} rank {rank}, {wanted.name}", wanted, got):
                wrong[wanted.operator].append(text)
    backends = tuple(sorted({run.backend for run in runs.values()}))
    return Outcome(family=family.name, case=case.id, backends=backends, compared=compared, wrong=dict(wrong))


def _by_text(errors: dict[int, str]) -> list[str]:
    ranks: dict[str, list[str]] = defaultdict(list)
    for rank, text in errors.items():
        ranks[text].append(str(rank))
    return [f"rank{'s' * (len(named) > 1)} {', '.join(named)}: {text}" for text, named in ranks.items()]


def _difference(name: str, wanted: Expected, got: torch.Tensor | None) -> str:
    if wanted.bounds is None or wanted.tensor is None or got is None:
        return difference(name, wanted.tensor, got, wanted.valid)
    if wanted.tensor.shape != got.shape:
        return difference(name, wanted.tensor, got)
    return outside(name, wanted.tensor[: wanted.valid], got[: wanted.valid], wanted.bounds)
