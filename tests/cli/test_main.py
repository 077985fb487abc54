"""What all commands share: help, exit codes, messages."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys

import pytest

import commfuse
from commfuse.cli import COMMANDS, info

from .commands import here


def test_no_command_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    outcome = here(capsys)
    assert outcome.code == 2
    assert all(f"    {command.name} " in outcome.out for command in COMMANDS)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    outcome = here(capsys, "--version")
    assert (outcome.code, outcome.out) == (0, f"commfuse {commfuse.__version__}\n")


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_help_of_a_command_has_its_examples(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: commfuse.cli.Command
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    outcome = here(capsys, command.name, "--help")
    assert outcome.code == 0
    assert 2 <= len(command.examples) <= 3
    assert all(f"  {line}\n      {meaning}\n" in outcome.out for line, meaning in command.examples)
    assert all(len(line) <= 80 for line in outcome.out.splitlines())


@pytest.mark.parametrize(
    "line", [line for command in COMMANDS for line, _ in command.examples if command.name != "run"], ids=lambda line: line
)
def test_examples_are_valid_command_lines(line: str) -> None:
    from commfuse.cli import _parser

    words = re.sub(r"^[A-Z_]+=\S+ | > .*$", "", line).split()
    args = _parser(words[1]).parse_args(words[1:])
    assert args.command == words[1]
    assert callable(args.main)


def test_help_imports_no_command() -> None:
    program = (
        "import sys, contextlib; from commfuse.cli import main\n"
        "with contextlib.suppress(SystemExit): main(['--help'])\n"
        "print([name for name in sys.modules if name.startswith('commfuse.cli.') or name == 'rich'])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "['commfuse.cli.arguments']"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["dmeo"], "invalid choice: 'dmeo'"),
        (["info", "--jsn"], "unrecognized arguments: --jsn"),
        (["demo", "--ranks", "many"], "argument --ranks: must be a whole number in 1..32, not 'many'"),
    ],
)
def test_wrong_command_lines(capsys: pytest.CaptureFixture[str], arguments: list[str], words: str) -> None:
    outcome = here(capsys, *arguments)
    assert outcome.code == 2
    assert words in outcome.err
    assert outcome.err.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (commfuse.GroupError("no such group"), 1, "commfuse info: no such group\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_errors(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, words: str
) -> None:
    def fail(args: argparse.Namespace) -> int:
        raise error

    monkeypatch.setattr(info, "main", fail)
    outcome = here(capsys, "info")
    assert (outcome.code, outcome.err) == (code, words)
