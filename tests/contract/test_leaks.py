"""No tracked file names the machine it was written on, or the host of a package registry."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).relative_to(ROOT)

# Folders that are a person's or a machine's own. `/tmp`, `/proc`, `/dev` and `/usr` are on every machine.
PATHS = re.compile(r"(?<![\w.:/-])/(?:home|Users|root|work|workspace|mnt|scratch)(?:/[\w.-]+|(?=[\"'\s)]))")
REGISTRIES = re.compile(
    r"(?:p[y]pi|python[h]osted|download\.py[t]orch|registry\.np[m]js|cr[a]tes|proxy\.go[l]ang|conda\.ana[c]onda|arti[f]actory|jf[r]og)"
    r"\.(?:org|io|com|cloud|net)|--(?:extra-)?index-url[ =]https?:",
)


def tracked() -> list[Path]:
    """Files that git has or would take; where there is no git, this test has nothing to judge."""
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs git and a checkout: the list of tracked files")
    return [Path(line) for line in listed.splitlines() if (ROOT / line).is_file()]


def lines() -> list[tuple[str, str]]:
    found = []
    for path in tracked():
        if path != HERE:
            text = (ROOT / path).read_bytes().decode("utf-8", "replace")
            found += [(f"{path}:{number}", line) for number, line in enumerate(text.splitlines(), 1)]
    return found


def matching(pattern: re.Pattern[str]) -> list[str]:
    return [f"{place}: {found[0]}" for place, line in lines() if (found := pattern.search(line))]


def test_there_is_something_to_look_at() -> None:
    assert Path("pyproject.toml") in tracked()


def test_no_path_of_a_machine() -> None:
    assert matching(PATHS) == []


@pytest.mark.skipif(len(ROOT.parts) < 3, reason="needs a checkout whose path could not be in a text by chance")
def test_no_path_of_this_checkout() -> None:
    assert matching(re.compile(r"(?<![\w.:/-])" + re.escape(str(ROOT)) + r"\b")) == []


def test_no_host_of_a_registry() -> None:
    assert matching(REGISTRIES) == []


@pytest.mark.parametrize(
    ("line", "pattern"),
    [
        ("see /home/someone/notes", PATHS),
        ('open("/ro' + 'ot/x")', PATHS),
        ("cd /wo" + "rk/main", PATHS),
        ("pip install --index-url https://mirror.example/simple torch", REGISTRIES),
        ("https://files.python" + "hosted.org/packages", REGISTRIES),
    ],
)
def test_the_patterns_find_what_they_should(line: str, pattern: re.Pattern[str]) -> None:
    assert pattern.search(line)


@pytest.mark.parametrize("line", ["/tmp/x", "/proc/self/task", "https://host.example/home/page", "src/work/x", "a/root"])
def test_the_patterns_leave_alone_what_is_on_every_machine(line: str) -> None:
    assert not PATHS.search(line)
