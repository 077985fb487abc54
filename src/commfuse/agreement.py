"""The small exchange at the start of a call: every rank tells its peers whether it accepts its own arguments, and what it believes
the call to be. A refusal or a disagreement raises on all ranks alike; nobody is left waiting.

Telling and listening are two steps, so that a setup can do the one and its teardown the other. What has been announced is heard in
order: whoever waits for a call hears the calls before it first. A rank that refuses a setup waits to be heard, and meets its peers
wherever they come to it.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch

from . import peers
from .call import Call
from .config import PORTABLE
from .errors import ArgumentError, CommfuseError, MismatchError
from .groups import Group, Posted

_OK, _REFUSED = 0, 1
_FIRST_TAG, _TAGS = 0x10000, 0x10000  # a call's messages carry its number, so that several may be under way
_T = TypeVar("_T")


@dataclass(eq=False, kw_only=True)
class Announcement:
    """What this rank has told its peers at the start of a call; after `hear`, what they have told it."""

    subject: str  # the operator, or what else the ranks do together
    rules: str
    broken: Sequence[str]
    members: Group
    partner: Group | None
    mine: Mapping[str, Any]
    headers: torch.Tensor  # to each member: refused or not, digest of ``mine``, bytes of its block
    own_block: torch.Tensor
    posted: Sequence[Posted]
    tag: int
    blocks: list[torch.Tensor] = field(default_factory=list)
    error: CommfuseError | None = None

    @property
    def number(self) -> int:
        """The number of the call among those of these ranks."""
        return int(self.mine["call number"])


@dataclass(eq=False, kw_only=True)
class _Line:
    """The calls that the same ranks have announced so far."""

    calls: int = 0
    unheard: deque[Announcement] = field(default_factory=deque)


def announce(call: Call, members: Group, blocks: Sequence[torch.Tensor] | None = None) -> Announcement:
    """Tell the peers whether this rank accepts its arguments, and a digest of what it believes the call to be; waits for nobody.

    ``blocks``: bytes that go along, one uint8 tensor for each member.
    """
    return _announce(members, call.operator.name, call.agreed, call.broken, call.product, call.partner, blocks)


def agree_on(members: Group, subject: str) -> None:
    """Make sure that every rank is about to do ``subject``, something that is not an operator. Raises MismatchError as `hear` does."""
    hear(_announce(members, subject, {}))


def _announce(
    members: Group,
    subject: str,
    agreed: Mapping[str, Any],
    broken: Sequence[str] = (),
    rules: str = PORTABLE,
    partner: Group | None = None,
    blocks: Sequence[torch.Tensor] | None = None,
) -> Announcement:
    line = _line(members)
    line.calls += 1
    tag = _FIRST_TAG + line.calls % _TAGS
    mine = {"operator": subject, "call number": line.calls, **agreed}
    for group in filter(None, (members, partner)):
        group.shared.update(subject=subject, number=line.calls)
    blocks = blocks or [torch.empty(0, dtype=torch.uint8)] * len(members.members)
    status, digest = _REFUSED if broken else _OK, _digest(mine)
    headers = torch.tensor([[status, digest, block.numel()] for block in blocks])
    what = _what(line.calls)
    announced = Announcement(
        subject=subject,
        rules=rules,
        broken=broken,
        members=members,
        partner=partner,
        mine=mine,
        headers=headers,
        own_block=blocks[members.index],
        posted=[members.post(list(headers), tag, what), members.post(blocks, tag, what)],
        tag=tag,
    )
    line.unheard.append(announced)
    return announced


def _line(members: Group) -> _Line:
    lines: dict[frozenset[int], _Line] = members.shared.setdefault("calls", {})  # ranks that were left out have not counted
    return lines.setdefault(frozenset(members.members), _Line())


def hear(announced: Announcement, waited_us: list[float] | None = None) -> list[torch.Tensor]:
    """Wait for what the peers have announced, this call and those before it; return the blocks that came along, by member.

    Raises:
        ArgumentError: this or another rank refused its arguments; the text names the ranks and every broken rule.
        MismatchError: ranks are in different operators or disagree on an argument; the text says who holds what.
    """
    unheard = _line(announced.members).unheard
    while announced in unheard:
        _listen(unheard[0], waited_us)
        unheard.popleft()
    if announced.error is not None:
        raise announced.error
    return announced.blocks


def agree(call: Call, members: Group, waited_us: list[float] | None = None) -> None:
    """Announce and hear: the start of every call that may wait for its peers. Raises as `hear` does."""
    hear(announce(call, members), waited_us)


def accept(call: Call) -> None:
    """Raise ArgumentError if this rank refuses ``call``; for calls that no peer waits for."""
    if call.broken:
        raise ArgumentError(refusal(call, call.group))


def refusal(call: Call, members: Group) -> str:
    """Return the text with which this rank refuses ``call``."""
    broken = [call.broken if rank == members.rank else () for rank in members.members]
    return _refusals(call.operator.name, call.product, members, broken)


def refuse(call: Call, problem: str) -> None:
    """Raise ArgumentError on this rank alone if there is a ``problem`` ('' for none) that only the data showed."""
    accept(replace(call, broken=(problem,) if problem else ()))


def verdict(call: Call, members: Group, problem: str) -> None:
    """Raise ArgumentError on every rank if any rank reports a ``problem`` ('' for none) that only the data showed."""
    problems = members.gather_objects(problem)
    if any(problems):
        raise ArgumentError(_refusals(call.operator.name, call.product, members, [(text,) if text else () for text in problems]))


def _listen(announced: Announcement, waited_us: list[float] | None) -> None:
    """Take what the peers have sent for this call off the line, whatever it says."""
    members, headers = announced.members, announced.headers.clone()
    members.receive(list(headers), announced.tag, waited_us, _what(announced.number))
    blocks = members.room(headers[:, 2].tolist())
    members.receive(blocks, announced.tag, waited_us, _what(announced.number))
    blocks[members.index] = announced.own_block
    for posted in announced.posted:
        posted.wait()
    announced.blocks = blocks
    announced.error = _compare(announced, headers)
    if announced.partner is not None:
        announced.error = ask_partner(announced.partner, announced.error)


def _what(number: int) -> str:
    return f"arguments of call {number}"


def _compare(announced: Announcement, headers: torch.Tensor) -> CommfuseError | None:
    if not headers[:, 0].any() and (headers[:, 1] == headers[0, 1]).all():
        return None
    return explain(announced.members, announced.subject, announced.rules, announced.broken, announced.mine, announced.tag)


def explain(
    members: Group, subject: str, rules: str, broken: Sequence[str], mine: Mapping[str, Any], tag: int
) -> ArgumentError | MismatchError:
    """Return what is wrong with a call that some rank refuses, or that is not the same everywhere; every member asks, at the same call.

    ``broken``, ``mine``: the rules that this rank's arguments break, and what it believes the call to be.
    """
    members.shared.update(subject=subject, number=mine["call number"])
    details = members.gather_objects((broken, dict(mine)), tag)
    stated = [detail for _, detail in details]
    differing = [name for name in ("operator", "call number") if len({str(s[name]) for s in stated}) > 1]
    if not differing and any(broken for broken, _ in details):
        return ArgumentError(_refusals(subject, rules, members, [broken for broken, _ in details]))
    return MismatchError(_differences(members, stated, differing))


def ask_partner(partner: Group, error: CommfuseError | None) -> CommfuseError | None:
    """Return what stops this rank or its tensor-parallel partner, None if nothing does."""
    mine = None if error is None else (type(error), str(error))
    card = None if partner.peers.have_met else peers.own()  # the same on both
    theirs, cards = zip(*partner.gather_objects((mine, card)), strict=True)
    if card is not None:
        partner.peers.meet(partner.members, cards)
    told = [found for found in theirs if found is not None]
    return told[0][0]("\n".join(dict.fromkeys(text for _, text in told))) if told else None


def _digest(values: Mapping[str, Any]) -> int:
    text = repr(sorted(values.items())).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little", signed=True)


def _refusals(subject: str, product: str, members: Group, broken: Sequence[Sequence[str]]) -> str:
    rules = "" if product == PORTABLE else f" under the rules of {product}"
    by_text: dict[tuple[str, ...], list[int]] = {}
    for rank, texts in _by_rank(members, broken):
        if texts:
            by_text.setdefault(tuple(texts), []).append(rank)
    parts = []
    for texts, ranks in by_text.items():
        parts.append(f"{subject}: refused{rules} on {_ranks(ranks, members)}:")
        parts += [f"  {text}" for text in texts]
    return "\n".join(parts)


def _differences(members: Group, stated: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    known = dict.fromkeys(name for _, values in _by_rank(members, stated) for name in values)  # some ranks may state more
    names = names or [n for n in known if len({repr(s.get(n)) for s in stated}) > 1]
    operators = sorted({s["operator"] for s in stated})
    lines = [f"{' / '.join(operators)}: ranks of group {members.name!r} disagree:"]
    for name in names:
        holders: dict[str, list[int]] = {}
        for rank, values in _by_rank(members, stated):
            holders.setdefault(repr(values.get(name)), []).append(rank)
        lines.append(f"  {name}: " + "; ".join(f"{value} on {_ranks(ranks, members)}" for value, ranks in holders.items()))
    return "\n".join(lines)


def _by_rank(members: Group, items: Sequence[_T]) -> list[tuple[int, _T]]:
    """Rank and item, ascending, so that all ranks say the same: their members may stand in different orders."""
    return sorted(zip(members.members, items, strict=True), key=lambda pair: pair[0])


def _ranks(ranks: Sequence[int], members: Group) -> str:
    if len(ranks) == len(members.members):
        return f"all {len(ranks)} ranks" if len(ranks) > 1 else f"rank {ranks[0]} (the only one)"
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))} of {members.size}"
