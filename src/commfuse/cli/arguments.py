"""What the commands' arguments have in common."""

from __future__ import annotations

import argparse
from collections.abc import Callable


class UsageError(Exception):
    """The command line asks for something that cannot be; the text is one sentence."""


def whole_number(lowest: int, highest: int) -> Callable[[str], int]:
    """Return a reader of whole numbers in ``lowest..highest``, for ``add_argument(type=...)``."""

    def read(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a whole number in {lowest}..{highest}, not {text!r}") from None
        if not lowest <= number <= highest:
            raise argparse.ArgumentTypeError(f"must be in {lowest}..{highest}, not {number}")
        return number

    return read


def add_backend(parser: argparse.ArgumentParser) -> None:
    """Add ``--backend``."""
    from ..backends import BACKENDS

    names = ["auto", *BACKENDS]
    parser.add_argument(
        "--backend", choices=names, metavar="NAME", help=f"one of {', '.join(names)} (default: COMMFUSE_BACKEND, or auto)"
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add ``--json``."""
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
