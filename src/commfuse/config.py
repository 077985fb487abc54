"""Every setting: its environment variable, default, unit and meaning, in one table.

A setting is read from its variable at first use and may be changed in the program:

>>> import commfuse
>>> commfuse.config.set(product="A3")
>>> with commfuse.config.override(product="A2,warn"):
...     commfuse.config.get("product")
Product(name='A2', warn=True)
>>> commfuse.config.set(product="portable")
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from .errors import ArgumentError

PORTABLE, A2, A3 = "portable", "A2", "A3"


@dataclass(frozen=True)
class Product:
    """A product whose rules apply; with ``warn`` they are reported and the call runs."""

    name: str
    warn: bool = False


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One row of the table."""

    name: str
    variable: str
    default: str
    allowed: str
    parse: Callable[[str], Any]
    meaning: str


def _choice(*values: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in values:
            raise ValueError
        return text

    return parse


def _product(text: str) -> Product:
    name, comma, mode = text.partition(",")
    by_name = {p.lower(): p for p in (PORTABLE, A2, A3)}
    if mode != ("warn" if comma else "") or name.lower() not in by_name:
        raise ValueError
    return Product(by_name[name.lower()], mode == "warn")


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value <= _LONGEST:
        raise ValueError
    return value


def _bytes(text: str) -> int:
    scale = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
    number = text.rstrip("KMGTkmgt")
    if not number.isdecimal():
        raise ValueError
    value = int(number) * scale[text[len(number) :].upper()]
    if value >= 1 << 63:
        raise ValueError
    return value


_LONGEST = 1e6  # seconds; torch takes no infinite one


def _flag(text: str) -> bool:
    return {"0": False, "1": True}[text]


SETTINGS = (
    Setting(
        name="product",
        variable="COMMFUSE_PRODUCT",
        default=PORTABLE,
        allowed="portable, A2, A3, each optionally followed by ',warn'",
        parse=_product,
        meaning="whose rules apply: portable refuses only what the formulas cannot do; A2 and A3 refuse what that hardware refuses",
    ),
    Setting(
        name="backend",
        variable="COMMFUSE_BACKEND",
        default="auto",
        allowed="auto or the name of a backend (see `commfuse info`)",
        parse=str,
        meaning="what runs the calls of a group; auto takes the first backend that every rank of the group can run",
    ),
    Setting(
        name="timeout",
        variable="COMMFUSE_TIMEOUT",
        default="600",
        allowed="seconds, above 0, at most 1000000",
        parse=_seconds,
        meaning="longest wait for one peer within a call, in seconds",
    ),
    Setting(
        name="first_timeout",
        variable="COMMFUSE_FIRST_TIMEOUT",
        default="1800",
        allowed="seconds, above 0, at most 1000000",
        parse=_seconds,
        meaning="the same within the first call of a group, to which ranks may come at very different times",
    ),
    Setting(
        name="window_max",
        variable="COMMFUSE_WINDOW_MAX",
        default="0",
        allowed="bytes below 2**63, as 4294967296, 4G or 512M; 0 for no limit but the memory there is",
        parse=_bytes,
        meaning="most memory that this process's window may hold; what would go beyond is refused before it is touched (cpu backend)",
    ),
    Setting(
        name="host",
        variable="COMMFUSE_HOST",
        default="",
        allowed="any text",
        parse=str,
        meaning="part of this host's identity: ranks with different values count as on different hosts, which the cpu backend refuses",
    ),
    Setting(
        name="const_expert",
        variable="COMMFUSE_CONST_EXPERT",
        default="linear",
        allowed="linear, softmax",
        parse=_choice("linear", "softmax"),
        meaning="what a constant expert with 2-D alphas computes: the printed formula, or the softmax gate of newer hardware",
    ),
    Setting(
        name="log",
        variable="COMMFUSE_LOG",
        default="off",
        allowed="off, calls, statistics",
        parse=_choice("off", "calls", "statistics"),
        meaning='what is told on the logger "commfuse": nothing, a line for each call, or a table of each group when the process ends',
    ),
    Setting(
        name="check",
        variable="COMMFUSE_CHECK",
        default="0",
        allowed="0, 1",
        parse=_flag,
        meaning="1: also refuse what only the data shows: a mask that is not true-then-false, NaN or infinity in rows to quantise",
    ),
    Setting(
        name="poison",
        variable="COMMFUSE_POISON",
        default="0",
        allowed="0, 1",
        parse=_flag,
        meaning="1: fill the unspecified tails of outputs (NaN, or 0x7f in integers), so that a reader of a tail is caught",
    ),
)

_BY_NAME = {setting.name: setting for setting in SETTINGS}
_values: dict[str, Any] = {}
changes = 0  # how often settings have been changed: what follows from them may be kept while this stays


def get(name: str) -> Any:
    """Return the value in force of setting ``name`` (see the table for its type)."""
    if name not in _values:
        setting = _setting(name)
        _values[name] = _parse(setting, os.environ.get(setting.variable, setting.default), setting.variable)
    return _values[name]


def set(**values: Any) -> None:  # reads as config.set(product="A3")
    """Change settings for this process; ``None`` returns a setting to its environment variable.

    Raises:
        ArgumentError: the name or the value is not in the table.
    """
    parsed = {
        name: None if value is None else _parse(_setting(name), value, f"config.set({name}=...)")
        for name, value in values.items()
    }
    _put(parsed)


@contextlib.contextmanager
def override(**values: Any) -> Iterator[None]:
    """Change settings within a ``with`` block."""
    before = {name: _values.get(name) for name in values}
    set(**values)
    try:
        yield
    finally:
        _put(before)


def _put(values: dict[str, Any]) -> None:
    global changes
    for name, value in values.items():
        changes += value != _values.get(name)
        _values.pop(name, None) if value is None else _values.__setitem__(name, value)


def _setting(name: str) -> Setting:
    if name not in _BY_NAME:
        raise ArgumentError(f"config: no setting {name!r}; there are {', '.join(sorted(_BY_NAME))}")
    return _BY_NAME[name]


def _parse(setting: Setting, value: Any, where: str) -> Any:
    if isinstance(value, bool):
        value = str(int(value))
    if isinstance(value, Product):
        return value
    try:
        return setting.parse(str(value).strip())
    except (ValueError, KeyError):
        raise ArgumentError(f"{where} = {value!r}: must be {setting.allowed}") from None
