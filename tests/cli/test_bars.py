"""The pictures: right numbers, right heights, and something readable on every terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from commfuse.cli import bars


class Encoded(io.StringIO):
    def __init__(self, encoding: str) -> None:
        super().__init__()
        self._encoding = encoding

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._encoding


def console(width: int = 80, encoding: str = "utf-8", terminal: bool = False, **options: bool) -> Console:
    system = "truecolor" if terminal else None
    return Console(file=Encoded(encoding), width=width, force_terminal=terminal, color_system=system, **options)  # type: ignore[arg-type]


def lines(text: object) -> list[str]:
    return str(text).splitlines()


def test_heat_map_has_numbers_and_sums() -> None:
    drawn = lines(bars.heat_map([[5, 10], [0, 7]], console()))
    assert [line.split() for line in drawn] == [
        ["0", "1", "all"],
        ["0", "5", "10", "15"],
        ["1", "0", "7", "7"],
        ["all", "5", "17", "22"],
    ]
    assert len({len(line) for line in drawn}) == 1


@pytest.mark.parametrize("ranks", [1, 4, 8, 16, 32])
@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("terminal", [False, True])
def test_pictures_fit(ranks: int, width: int, terminal: bool) -> None:
    out = console(width, terminal=terminal)
    counts = [[(7 * i + 3 * j) % 40 for j in range(ranks)] for i in range(ranks)]
    groups = [[(5 * i + j) % 30 for j in range(max(1, 256 // ranks))] for i in range(ranks)]
    for text in (bars.heat_map(counts, out), bars.columns(groups, "rank", out)):
        assert all(len(line) <= width - 2 for line in lines(text))


def test_shades_where_numbers_do_not_fit() -> None:
    counts = [[0] * 32 for _ in range(32)]
    counts[3][4] = 100
    assert lines(bars.heat_map(counts, console()))[4][7 + 8 : 7 + 10] == "██"
    assert lines(bars.heat_map(counts, console(encoding="ascii")))[4][7 + 8 : 7 + 10] == "##"
    assert lines(bars.heat_map(counts, console(terminal=True, no_color=True)))[4][7 + 8 : 7 + 10] == "██"
    coloured = bars.heat_map(counts, console(terminal=True))
    assert any("on rgb(52,120,176)" in str(span.style) for span in coloured.spans)


def test_heat_grows_with_the_count() -> None:
    coloured = bars.heat_map([[0, 5], [10, 10]], console(terminal=True))
    shades = [str(span.style) for span in coloured.spans if "on rgb" in str(span.style)]
    assert shades == [f"rgb(255,255,255) on rgb({rgb})" for rgb in ("28,38,58", "40,79,117", "52,120,176", "52,120,176")]


def test_columns_are_as_high_as_their_counts() -> None:
    drawn = lines(bars.columns([[40, 20], [0, 1]], "rank", console()))
    bodies = [line[7:] for line in drawn]
    heights = [[row[column] for row in bodies[:5]] for column in (0, 3, 7, 10)]
    assert ["".join(height) for height in heights] == ["█████", "  ▄██", "     ", "    ▁"]
    assert drawn[0].split()[0] == "40"
    assert drawn[5].split() == ["rank", "0", "rank", "1"]


def test_short_names_where_groups_are_narrow() -> None:
    assert lines(bars.columns([[3], [4], [5]], "rank", console()))[5].split() == ["rank", "0", "1", "2"]


def test_a_group_wider_than_the_terminal_goes_on_below() -> None:
    drawn = lines(bars.columns([[1] * 80, [9]], "rank", console(width=60)))
    assert sum(line.count("█") for line in drawn) == 5
    assert [line.split() for line in drawn[5::6]] == [["rank", "0"], [], ["rank", "1"]]


def test_columns_of_plain_characters() -> None:
    drawn = lines(bars.columns([[40, 20, 0, 1]], "rank", console(encoding="ascii")))
    assert ["".join(line[7 + 3 * i] for line in drawn[:5]) for i in range(4)] == ["#####", "  ###", "     ", "    #"]
    assert drawn[5].split() == ["rank", "0"]


def test_nothing_at_all() -> None:
    assert lines(bars.heat_map([[0]], console()))[1].split() == ["0", "0", "0"]
    assert len(lines(bars.columns([[0]], "rank", console()))) == 6
