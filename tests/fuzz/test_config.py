"""Whatever stands in a variable is a value that fits its use, or an ArgumentError with what is allowed."""

from __future__ import annotations

import math
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st

import commfuse
from commfuse import config
from commfuse.config import SETTINGS

SEEDED = settings(derandomize=True, database=None, deadline=None, max_examples=300)

PARTS = st.sampled_from(
    ["A2", "a3", "portable", ",", "warn", "1", "0", "9" * 30, "-", ".", "e", "G", "K", "t", "inf", "nan", "_", " "]
)
TEXTS = st.text(max_size=12) | st.lists(PARTS, max_size=5).map("".join)
VALUES = TEXTS | st.integers() | st.floats() | st.booleans() | st.lists(st.integers(), max_size=2)
FITS: dict[str, Any] = {
    "timeout": lambda value: 0 < value <= 1e6,
    "first_timeout": lambda value: 0 < value <= 1e6,
    "window_max": lambda value: 0 <= value < 1 << 63,  # the core's sizes have 64 bits
    "check": lambda value: isinstance(value, bool),
    "poison": lambda value: isinstance(value, bool),
    "product": lambda value: value.name in ("portable", "A2", "A3"),
    "const_expert": lambda value: value in ("linear", "softmax"),
    "log": lambda value: value in ("off", "calls", "statistics"),
}


@SEEDED
@given(st.sampled_from([setting.name for setting in SETTINGS]), VALUES)
@example("window_max", "9" * 30 + "T")  # more than any address
@example("window_max", 2**63)
@example("window_max", "9" * 5000)  # more digits than Python reads
@example("timeout", math.nan)
@example("product", "A3,")
def test_a_value_fits_its_use_or_is_refused(name: str, value: Any) -> None:
    with config.override(**{name: None}):
        refused = ""
        try:
            config.set(**{name: value})
        except commfuse.ArgumentError as error:
            refused = str(error)
        if refused:
            assert next(setting.allowed for setting in SETTINGS if setting.name == name) in refused
        else:
            assert FITS.get(name, lambda value: isinstance(value, str))(config.get(name))
