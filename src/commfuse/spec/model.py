"""What an operator's description is made of: rows, as frozen dataclasses.

Formulas and conditions are plain Python expressions, evaluated on the call's arguments and symbols (`scope.py`) and printed
as they are written. In them an argument has its public name, a tensor offers ``.shape``, ``.ndim`` and ``.dtype``, and an
absent one is ``None``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ..config import A2, A3, PORTABLE

EVERY = frozenset({PORTABLE, A2, A3})
HARDWARE = frozenset({A2, A3})
ON_A2 = frozenset({A2})
ON_A3 = frozenset({A3})

ROWS = ("bfloat16", "float16", "float32")
HALF = ("bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """A tensor argument.

    ``shapes`` are alternatives, each a tuple of expressions; a dimension that is a bare new name defines that symbol.
    ``dtype`` are the names accepted by every product together; narrower products add a rule.
    """

    name: str
    shapes: tuple[tuple[str, ...], ...]
    dtype: tuple[str, ...]
    meaning: str
    optional: bool = False
    when: str = "True"  # the shapes are binding only then; real callers pass odd tensors for options that are off
    written: bool = False
    aliases: tuple[str, ...] = ()  # other names under which callers may pass it


@dataclass(frozen=True, kw_only=True)
class Attr:
    """An argument that is not a tensor. ``schema`` is its type in a torch.library schema."""

    name: str
    schema: str
    meaning: str
    default: Any = None
    required: bool = False
    positional: bool = False


@dataclass(frozen=True, kw_only=True)
class Symbol:
    """A derived size: its letter in the legend, formula and meaning."""

    name: str
    formula: str
    meaning: str


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One limit: ``test`` must hold on the products ``on`` whenever ``when`` holds.

    ``subject`` is the expression whose value a message shows, ``must`` the allowed range in words (an expression in braces is
    shown with its value), ``source`` the published page and heading, ``says`` the fragment of the text that the real operator gives for it.
    """

    subject: str
    test: str
    must: str
    source: str
    on: frozenset[str] = EVERY
    when: str = "True"
    says: str = ""
    low: str = ""  # for a range: its ends, from which boundary cases are made
    high: str = ""


@dataclass(frozen=True, kw_only=True)
class Output:
    """An output: shape and dtype as expressions, and which part of it is specified. ``"*sizes"`` in a shape stands for several."""

    name: str
    shape: tuple[str, ...]
    dtype: str
    meaning: str
    given: str = "True"  # the output is None otherwise


@dataclass(frozen=True, kw_only=True)
class Operator:
    """An operator as data plus the functions that carry it out."""

    name: str
    summary: str
    args: tuple[Tensor | Attr, ...]  # in the published order
    first_keyword: str  # the first keyword-only argument; empty where every argument may be given by position
    symbols: tuple[Symbol, ...] = ()
    rules: tuple[Rule, ...]
    outputs: tuple[Output, ...]
    group: str  # the argument that names the communication domain
    agree: tuple[str, ...]  # expressions that must have equal values on all ranks
    world_size: str = ""  # expression for the size of the group
    rank: str = ""  # expression for this process's rank in the group; empty where no argument states it
    partner_group: str = ""  # a second domain (tensor parallel), used when `partner_when` holds
    partner_when: str = "False"
    phase: str = "whole"  # "setup" and "teardown" are the halves of a split operator: a setup waits for nobody
    values: Callable[..., list[str]] = field(default=lambda call: [], repr=False)  # call -> what only its data shows to be broken
    alive: Callable[..., tuple[int, ...] | None] = field(
        default=lambda call: None, repr=False
    )  # call -> who takes part, None: all
    steps: Callable[..., tuple[Any, ...]] = field(repr=False)  # (call, group) -> outputs, over group exchanges
    golden: Callable[..., Any] = field(repr=False)  # all ranks' arguments -> all ranks' (output, valid)
    golden_args: Callable[..., dict[str, Any]] = field(
        default=lambda call: dict(call.args), repr=False
    )  # call -> what golden takes

    @cached_property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensor arguments, in the published order."""
        return tuple(arg for arg in self.args if isinstance(arg, Tensor))

    @cached_property
    def attrs(self) -> tuple[Attr, ...]:
        """The other arguments, in the published order."""
        return tuple(arg for arg in self.args if isinstance(arg, Attr))

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The argument names, in the published order."""
        return tuple(arg.name for arg in self.args)


def between(subject: str, low: int | str, high: int | str, source: str, **more: Any) -> Rule:
    """``low <= subject <= high``, both ends inclusive; an end may be an expression."""
    test = f"{low} <= ({subject}) <= {high}"
    must = f"in {low}..{high}" + ("" if str(high).isdigit() else f" = {low}..{{{high}}}")
    return Rule(subject=subject, test=test, must=must, source=source, low=str(low), high=str(high), **more)


def at_least(subject: str, low: int | str, source: str, **more: Any) -> Rule:
    """``subject >= low``; the end may be an expression."""
    must = f"at least {low}" + ("" if str(low).isdigit() else f" = {{{low}}}")
    return Rule(subject=subject, test=f"({subject}) >= ({low})", must=must, source=source, low=str(low), **more)


def one_of(subject: str, values: tuple[Any, ...], source: str, **more: Any) -> Rule:
    """``subject`` is one of ``values``."""
    must = "one of " + ", ".join(repr(v) for v in values) if len(values) > 1 else repr(values[0])
    return Rule(subject=subject, test=f"({subject}) in {values!r}", must=must, source=source, **more)


def holds(subject: str, test: str, must: str, source: str, **more: Any) -> Rule:
    """Any other condition."""
    return Rule(subject=subject, test=test, must=must, source=source, **more)
