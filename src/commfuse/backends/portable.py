"""torch.distributed alone: runs on whatever backend the process group has, also across hosts. Slow and right."""

from __future__ import annotations

from ..agreement import accept, agree, agree_on
from ..call import Call
from ..errors import BackendError, CommfuseError, ExchangeError
from ..groups import Group
from .base import Outputs


class Portable:
    """Every operator through its ``steps``, over point-to-point exchanges of the group."""

    name = "portable"

    def why_not(self, group: Group) -> list[str]:
        """Nothing is needed beyond the process group itself."""
        return []

    def place(self) -> str:
        """See `Backend.place`: anywhere."""
        return ""

    def run(self, call: Call) -> Outputs:
        """See `Backend.run`. After an exchange that failed or was broken off, the group repeats why: messages may be under way."""
        name, cause = call.operator.name, call.group.shared.get("given up")
        if cause is not None:
            raise ExchangeError(f"{name}: group {call.group.name!r} has been given up: {cause}. Now: {_REMEDY}")
        try:
            return self._run(call)
        except ExchangeError as error:
            call.group.shared["given up"] = str(error)
            raise ExchangeError(f"{name}: {error}") from error
        except CommfuseError:
            raise
        except BaseException as error:
            call.group.shared["given up"] = f"rank {call.group.rank} broke off {name}: {type(error).__name__}: {error}"
            raise

    def _run(self, call: Call) -> Outputs:
        members = call.group.among(call.operator.alive(call))
        waited_us = [0.0] * len(members.members)
        if call.operator.phase == "teardown":
            accept(call)
        elif call.operator.phase == "whole" or call.broken:
            agree(call, members, waited_us)
        return call.operator.steps(call, members, waited_us)

    def agree_on(self, members: Group, subject: str) -> None:
        """See `Backend.agree_on`."""
        agree_on(members, subject)

    def survivors(self, group: Group) -> tuple[int, ...]:
        """See `Backend.survivors`: not without the dead, since the exchanges of a process group do not outlive a peer."""
        raise BackendError(f"group {group.name!r} runs on {self.name}, which cannot go on without a rank: {_REMEDY}")

    def reset(self, group: Group) -> None:
        """See `Backend.reset`: not after an exchange has failed."""
        raise BackendError(f"group {group.name!r} runs on {self.name}, which cannot start afresh: {_REMEDY}")


_REMEDY = "make a new process group of the ranks that are left"
