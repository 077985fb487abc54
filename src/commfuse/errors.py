"""Everything that commfuse raises.

RuntimeError
└── CommfuseError                the common base; torch_npu raises RuntimeError, so callers catch the same
    ├── ArgumentError            an argument breaks a rule of the operator, on this rank or on a peer
    │   └── MismatchError        ranks disagree on something that must be equal on all of them
    ├── GroupError               a communication domain is unknown, destroyed, or not usable from here
    ├── BackendError             no backend can run a group's calls; lists every rank's reasons
    └── ExchangeError            the exchange itself failed: a peer died, stopped, or the transport broke
"""

from __future__ import annotations


class CommfuseError(RuntimeError):
    """Base of every error that commfuse raises on purpose."""


class ArgumentError(CommfuseError):
    """An argument breaks a rule; every broken rule is in the message. Nothing has been sent, unless only the rows themselves
    showed it (combine, whose handed-on tensors are not those of one dispatch).
    """


class MismatchError(ArgumentError):
    """Ranks of one call disagree on the operator or on an argument that must be equal on all of them."""


class GroupError(CommfuseError):
    """A group name is unknown, or its process group no longer exists."""


class BackendError(CommfuseError):
    """No backend can run the calls of a group; the message lists the reasons of every rank and backend."""


class ExchangeError(CommfuseError):
    """Data could not be exchanged with a peer; the message names the operator, the peer and the cause."""


class CommfuseWarning(UserWarning):
    """A call that runs here although the chosen product would refuse it (``COMMFUSE_PRODUCT=A3,warn``)."""
