"""Skips a module's tests where the core is not built."""

from __future__ import annotations

import importlib.util

import pytest

if importlib.util.find_spec("commfuse._core") is None:
    pytest.skip("commfuse._core is not built (needs a C++ compiler at install)", allow_module_level=True)
