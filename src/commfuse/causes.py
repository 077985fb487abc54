"""Why a process group cannot be used any more: the first cause, kept for its later calls, and told to its other ranks.

For what runs over exchanges of the process group: a message that was broken off half-way stays on the line. The cause is put where all
ranks look for it while they wait, in the store behind the group, and the connections are closed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from . import notes
from .errors import CommfuseError, ExchangeError
from .groups import Group

REMEDY = "make a new process group of the ranks that are left"
_CAUSE = "given up"


@contextmanager
def giving_up(group: Group, subject: str, partner: Group | None = None) -> Iterator[None]:
    """Around exchanges within ``group`` (and ``partner``): what breaks them off gives the group up, for good and on all ranks.

    Raises:
        ExchangeError: the group has been given up, now or before; says why, the same on all ranks as far as they can be reached.
    """
    group.shared["subject"] = subject
    known = group.shared.get(_CAUSE)
    if known is not None:
        raise ExchangeError(_text(group, known))
    try:
        yield
    except ExchangeError as error:
        raise ExchangeError(_text(group, _give_up(group, partner, str(error)), str(error))) from error
    except CommfuseError:
        raise
    except BaseException as error:
        who = group.peers.who(group.rank)
        _give_up(group, partner, group.about(f"{who} broke off: {type(error).__name__}: {error}"))
        raise


def _text(group: Group, cause: dict[str, Any], own: str = "") -> str:
    """Return the text of an error; ``own`` is what this rank has found just now."""
    if cause["text"] != own:
        found = "" if cause["rank"] == group.rank else f" (found by {group.peers.who(cause['rank'])})"
        own = group.about(f"the group has been given up{found}: {cause['text']}")
    return f"{own}. Now: {REMEDY}"


def _give_up(group: Group, partner: Group | None, text: str) -> dict[str, Any]:
    """Note ``text`` as the cause unless there is an older one, tell the others, and return the first."""
    causes = []
    for domain in filter(None, (group, partner)):
        causes.append(_told(domain, {"rank": domain.rank, "text": text}))
        domain.shared[_CAUSE] = causes[-1]
        domain.close()
    return causes[0]


def _told(domain: Group, cause: dict[str, Any]) -> dict[str, Any]:
    process_group = domain.process_group()
    return cause if process_group is None else notes.first(process_group, cause)
