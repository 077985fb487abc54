"""``commfuse.product("A3")``: choose whose rules apply, for good or within a ``with`` block."""

from __future__ import annotations

from types import TracebackType

from . import config


class product:  # noqa: N801  reads as a verb
    """Apply the rules of a product: "portable", "A2" or "A3"; with ``warn`` they are reported and the call runs.

    >>> import commfuse
    >>> with commfuse.product("A3"):
    ...     commfuse.config.get("product").name
    'A3'

    Raises:
        ArgumentError: there is no such product.
    """

    def __init__(self, name: str, *, warn: bool = False) -> None:
        self._before = config.get("product")
        config.set(product=f"{name},warn" if warn else name)

    def __enter__(self) -> config.Product:
        now: config.Product = config.get("product")
        return now

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        config.set(product=self._before)
