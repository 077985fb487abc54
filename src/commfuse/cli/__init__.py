"""The command line: ``commfuse COMMAND``. Each command is a module with ``add_arguments(parser)`` and ``main(args) -> exit code``.

Exit codes: 0 done and right; 1 failed, or a comparison did not hold; 2 the command line itself is wrong; 130 ended by Ctrl-C.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

from ..errors import CommfuseError
from .arguments import UsageError

INTERRUPTED = 130


@dataclass(frozen=True, kw_only=True)
class Command:
    """One row of the table: a command, the module that carries it out, and how it is used."""

    name: str
    module: str
    help: str
    examples: tuple[tuple[str, str], ...]  # command line, what it does


COMMANDS = (
    Command(
        name="run",
        module="commfuse.cli.run",
        help="run a script for torch_npu, unmodified, without an NPU",
        examples=(
            ("commfuse run train.py --steps 10", "torch_npu and torchair are look-alikes there, in child processes too"),
            ("commfuse run -m pytest tests/", "the same for a module, as python -m does"),
            ("COMMFUSE_PRODUCT=A3 commfuse run train.py", "refuse what an Atlas A3 would refuse"),
        ),
    ),
    Command(
        name="demo",
        module="commfuse.cli.demo",
        help="an expert-parallel MoE layer over real processes, every token compared",
        examples=(
            ("commfuse demo", "4 processes, 64 tokens each, bfloat16 rows"),
            ("commfuse demo --ranks 16 --quant", "16 processes, rows travel as int8"),
            ("commfuse demo --json > demo.json", "the same as one JSON object"),
        ),
    ),
    Command(
        name="check",
        module="commfuse.cli.check",
        help="compare a backend with the published formulas, over named and random cases",
        examples=(
            ("commfuse check", "the backend that a group takes by itself, all named cases, some random"),
            (
                "commfuse check --random 500 --seed 7 --ranks 2 4 --backend portable",
                "more random cases, only on 2 or 4 processes",
            ),
            ("commfuse check --soak 600", "ten minutes of random cases on the same four processes, memory flat"),
        ),
    ),
    Command(
        name="bench",
        module="commfuse.cli.bench",
        help="the operators and what people use today, side by side in one launch",
        examples=(
            ("commfuse bench --case A,D", "two named cases, every method; results are compared first"),
            ("commfuse bench --ranks 4 --tokens 256 --routing zipf --plot bench.png", "sizes of your own, as a picture too"),
            ("commfuse bench --goals --json goals.json", "five launches of everything; which goals are missed"),
        ),
    ),
    Command(
        name="info",
        module="commfuse.cli.info",
        help="versions, cores, backends with their reasons, every setting and its value",
        examples=(
            ("commfuse info", "the first thing to look at, and to put into a report of a fault"),
            ("COMMFUSE_PRODUCT=A2,warn commfuse info", "what a variable changes"),
            ("commfuse info --json", "for programs"),
        ),
    ),
)


class Parser(argparse.ArgumentParser):
    """A parser that says what is wrong in one line and where to read on."""

    def error(self, message: str) -> NoReturn:
        """End with exit code 2."""
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that ``argv`` (default: the process's arguments) names and return its exit code."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    parser = _parser(next((word for word in arguments if not word.startswith("-")), None))
    args = parser.parse_args(arguments)
    if args.command is None:
        parser.print_help()
        return 2
    try:
        code: int = args.main(args)
        return code
    except (UsageError, CommfuseError) as error:
        print(f"commfuse {args.command}: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        return INTERRUPTED


def _parser(wanted: str | None) -> Parser:
    """Return the parser; only the ``wanted`` command's module is imported, for its arguments."""
    parser = Parser(
        prog="commfuse",
        description="The fused communication-and-compute operators of torch_npu on any machine that runs PyTorch.",
        epilog=_epilog([command.examples[0] for command in COMMANDS], "`commfuse COMMAND --help` has more."),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    parser.set_defaults(command=None)
    commands = parser.add_subparsers(metavar="COMMAND", dest="command", title="commands")
    for command in COMMANDS:
        sub = commands.add_parser(
            command.name,
            help=command.help,
            description=f"{command.help[0].upper()}{command.help[1:]}.",
            epilog=_epilog(command.examples),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if command.name == wanted:
            module = importlib.import_module(command.module)
            module.add_arguments(sub)
            sub.set_defaults(main=module.main)
    return parser


def _epilog(examples: Sequence[tuple[str, str]], closing: str = "") -> str:
    lines = ["examples:", *(f"  {line}\n      {meaning}" for line, meaning in examples)]
    return "\n".join([*lines, *(["", closing] if closing else [])])


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from .. import __version__

        print(f"commfuse {__version__}")
        parser.exit()
