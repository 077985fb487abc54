"""The table of settings: where values come from, what is refused, what a block leaves behind."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest

import commfuse
from commfuse import config
from commfuse.config import SETTINGS, Product, Setting

GOOD: dict[str, tuple[str, Any]] = {  # name: what one writes, what it means
    "product": ("a3,warn", Product("A3", warn=True)),
    "backend": ("reference", "reference"),
    "timeout": ("2.5", 2.5),
    "first_timeout": ("30", 30.0),
    "window_max": ("3G", 3 << 30),
    "host": ("rack 7", "rack 7"),
    "const_expert": ("softmax", "softmax"),
    "log": ("calls", "calls"),
    "check": ("1", True),
    "poison": ("1", True),
}
BAD = {
    "product": ["A4", "A3,quiet", "A3,warn,warn", ""],
    "timeout": ["0", "-1", "nan", "soon", ""],
    "first_timeout": ["0", "-1"],
    "window_max": ["-1", "G", "many", "1.5G", "1KK"],
    "const_expert": ["Linear", "gate"],
    "log": ["on", "CALLS", "calls,statistics"],
    "check": ["yes", "2", "true"],
    "poison": ["on", "-1"],
}
BY_SETTING = pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)


@pytest.fixture(autouse=True)
def untouched(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No variables, nothing set, before and after."""
    for setting in SETTINGS:
        monkeypatch.delenv(setting.variable, raising=False)
    with config.override(**dict.fromkeys((setting.name for setting in SETTINGS), None)):
        yield


@BY_SETTING
def test_a_setting_has_a_default_a_variable_and_a_meaning(setting: Setting) -> None:
    assert config.get(setting.name) == setting.parse(setting.default)
    assert setting.variable == f"COMMFUSE_{setting.name.upper()}"
    assert setting.meaning.strip()
    assert setting.allowed.strip()


@BY_SETTING
def test_the_variable_is_read_at_first_use_and_again_when_asked(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    text, value = GOOD[setting.name]
    config.get(setting.name)
    monkeypatch.setenv(setting.variable, text)
    assert config.get(setting.name) == setting.parse(setting.default)
    config.set(**{setting.name: None})
    assert config.get(setting.name) == value
    assert type(config.get(setting.name)) is type(value)


@BY_SETTING
def test_the_program_comes_before_the_variable(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    text, value = GOOD[setting.name]
    monkeypatch.setenv(setting.variable, "not looked at")
    config.set(**{setting.name: text})
    assert config.get(setting.name) == value


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in BAD.items() for text in texts])
def test_a_bad_value_is_refused_with_what_is_allowed(name: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = next(setting for setting in SETTINGS if setting.name == name)
    before = config.get(name)
    with pytest.raises(commfuse.ArgumentError) as caught:
        config.set(**{name: text})
    assert all(part in str(caught.value) for part in (name, repr(text), setting.allowed))
    assert config.get(name) == before
    monkeypatch.setenv(setting.variable, text)
    config.set(**{name: None})
    with pytest.raises(commfuse.ArgumentError) as caught:
        config.get(name)
    assert all(part in str(caught.value) for part in (setting.variable, repr(text), setting.allowed))


@pytest.mark.parametrize("use", [config.get, lambda name: config.set(**{name: 1})])
def test_an_unknown_setting_lists_those_there_are(use: Any) -> None:
    with pytest.raises(commfuse.ArgumentError) as caught:
        use("backends")
    assert str(caught.value) == f"config: no setting 'backends'; there are {', '.join(sorted(s.name for s in SETTINGS))}"


def test_one_bad_value_among_several_changes_nothing() -> None:
    with pytest.raises(commfuse.ArgumentError):
        config.set(poison=True, timeout="never")
    assert config.get("poison") is False


@pytest.mark.parametrize(("value", "meaning"), [(True, True), (False, False), (1, True), ("1 ", True), (0, False)])
def test_flags_are_written_in_many_ways(value: object, meaning: bool) -> None:
    config.set(check=value)
    assert config.get("check") is meaning


def test_a_block_leaves_what_it_found_also_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    config.set(timeout=7)
    with contextlib.suppress(ZeroDivisionError), config.override(timeout=1, poison=True):
        with config.override(timeout=3):
            assert config.get("timeout") == 3
        assert (config.get("timeout"), config.get("poison")) == (1, True)
        raise ZeroDivisionError
    assert (config.get("timeout"), config.get("poison")) == (7, False)
    monkeypatch.setenv("COMMFUSE_TIMEOUT", "9")
    with config.override(timeout=None):
        assert config.get("timeout") == 9
    assert config.get("timeout") == 7


def test_product_for_good_and_within_a_block() -> None:
    commfuse.product("A3")
    assert config.get("product") == Product("A3")
    with commfuse.product("A2", warn=True) as now:
        assert now == config.get("product") == Product("A2", warn=True)
        with commfuse.product("portable"):
            assert config.get("product") == Product("portable")
        assert config.get("product") == now
    assert config.get("product") == Product("A3")


@pytest.mark.parametrize("name", ["A4", "910B", ""])
def test_an_unknown_product_lists_those_there_are(name: str) -> None:
    with pytest.raises(commfuse.ArgumentError, match=f"product.*{name}.*must be portable, A2, A3"):
        commfuse.product(name)
    assert config.get("product") == Product("portable")
