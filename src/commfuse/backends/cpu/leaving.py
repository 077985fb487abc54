"""How a call learns that others have gone on without this rank; apart, so that it can be imported without the core."""

from __future__ import annotations


class LeftOut(Exception):  # noqa: N818  no error of the caller
    """Others have gone on without this rank, or this rank without them: agree again, and call again."""
