"""Small pictures made of characters: a table of counts as a heat map, and groups of columns."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.style import Style
from rich.text import Text

from .terminal import INDENT, knows_blocks

_EIGHTHS = " ▁▂▃▄▅▆▇█"
_SHADES, _PLAIN_SHADES = " ░▒▓█", " .:*#"
_COLD, _HOT = (28, 38, 58), (52, 120, 176)
_BAR = Style.parse("rgb(52,120,176)")
_HEIGHT = 5  # lines
_GUTTER = 7


def heat_map(counts: Sequence[Sequence[int]], out: Console) -> Text:
    """Return ``counts[source][destination]`` as a square with sums: numbers on shades where they fit, otherwise shades alone."""
    arriving = [sum(column) for column in zip(*counts, strict=True)]
    digits = max(len(str(number)) for number in (*arriving, len(counts)))
    room = (out.width - INDENT - 2 * _GUTTER) // len(counts)
    width = min(digits + 2, room) if room > digits else 2
    numbered = room > digits
    most = max(map(max, counts))
    lines = [_head(len(counts), width, numbered)]
    for source, row in enumerate(counts):
        cells = [_cell(count, most, width, numbered, out) for count in row]
        lines.append(Text.assemble((f"{source:>4}   ", "dim"), *cells, f"{sum(row):>{_GUTTER}}"))
    below = "".join(f"{number:>{width}}" for number in arriving) if numbered else " " * (width * len(counts))
    lines.append(Text.assemble(f"{'all':>4}   ", below, f"{sum(arriving):>{_GUTTER}}", style="dim"))
    return Text("\n").join(lines)


def columns(groups: Sequence[Sequence[int]], group_name: str, out: Console) -> Text:
    """Return a column for every count: named groups side by side, in as many rows of groups as the width asks for."""
    room = out.width - INDENT - _GUTTER
    most = max(map(max, groups))
    longest = max(map(len, groups))
    width = next((width for width in (3, 2) if len(groups) * (longest * width + 1) <= room), 1)
    pieces = [
        (str(i) if first == 0 else "", group[first : first + room - 1])
        for i, group in enumerate(groups)
        for first in range(0, len(group), room - 1)
    ]
    per_row = max(1, room // (longest * width + 1))
    panels = [pieces[first : first + per_row] for first in range(0, len(pieces), per_row)]
    return Text("\n").join(_panel(panel, width, most, group_name, out) for panel in panels)


def _head(count: int, width: int, numbered: bool) -> Text:
    names = "".join(f"{i:>{width}}" for i in range(count)) if numbered else f"{f'0 .. {count - 1}':<{width * count}}"
    return Text(f"{'':{_GUTTER}}{names}{'all':>{_GUTTER}}", style="dim")


def _cell(count: int, most: int, width: int, numbered: bool, out: Console) -> Text:
    part = count / most if most else 0.0
    coloured = out.is_terminal and out.color_system is not None and not out.no_color
    if not numbered and not coloured:
        shades = _SHADES if knows_blocks(out) else _PLAIN_SHADES
        return Text(shades[round(part * (len(shades) - 1))] * width)
    return Text(f"{count:>{width}}" if numbered else " " * width, style=_heat(part) if coloured else "")


def _heat(part: float) -> Style:
    red, green, blue = (round(cold + part * (hot - cold)) for cold, hot in zip(_COLD, _HOT, strict=True))
    return Style.parse(f"rgb(255,255,255) on rgb({red},{green},{blue})")


def _panel(pieces: Sequence[tuple[str, Sequence[int]]], width: int, most: int, group_name: str, out: Console) -> Text:
    lines = []
    for level in range(_HEIGHT - 1, -1, -1):
        mark = most if level == _HEIGHT - 1 else ""
        drawn = ("".join(_part(count, most, level, width, out) for count in counts) for _, counts in pieces)
        lines.append(Text.assemble((f"{mark:>{_GUTTER - 2}}  ", "dim"), (" ".join(drawn), _BAR)))
    return Text("\n").join([*lines, _feet(pieces, width, group_name)])


def _part(count: int, most: int, level: int, width: int, out: Console) -> str:
    """The part of a column at one height; a count above 0 shows at least its lowest eighth."""
    eighths = max(round(count / most * 8 * _HEIGHT), 1) if count else 0
    here = min(max(eighths - 8 * level, 0), 8)
    shows = here >= 4 or (level == 0 and here > 0)
    part = _EIGHTHS[here] if knows_blocks(out) else " #"[shows]
    return part * max(1, width - 1) + " " * (width > 1)


def _feet(pieces: Sequence[tuple[str, Sequence[int]]], width: int, group_name: str) -> Text:
    rooms = [len(counts) * width for _, counts in pieces]
    whole = [f"{group_name} {name}" if name else "" for name, _ in pieces]
    fit = all(len(name) <= room for name, room in zip(whole, rooms, strict=True))
    shown = whole if fit else [name for name, _ in pieces]
    feet = " ".join(f"{name[:room]:<{room}}" for name, room in zip(shown, rooms, strict=True))
    return Text(f"{'' if fit else group_name:>{_GUTTER - 2}}  {feet}", style="dim")
