"""Arguments that make no sense: told in one line, which names the value and where it says what may be given."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

USAGE = 2
"""What a command exits with when its arguments have to be mended."""


class Parser(argparse.ArgumentParser):
    """argparse's own parser, as its subcommands' are, without the lines of usage before each error."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.register("type", int, _whole)
        self.register("type", float, _number)

    def error(self, message: str) -> NoReturn:
        """Say what is wrong, in one line, and end."""
        shown = "".join(one if one.isprintable() else ascii(one)[1:-1] for one in message)
        self.exit(USAGE, f"{self.prog}: {shown}; see {self.prog} --help\n")


def parsed(parser: Parser, command: Parser | None, given: Sequence[str]) -> argparse.Namespace:
    """Parse a command line; what is left over is an error of the command, which knows what could have been given."""
    options, left = parser.parse_known_args(given)
    if left:
        (command or parser).error(f"unrecognized arguments: {' '.join(left)}")
    return options


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r:.40} is no whole number") from None


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r:.40} is no number") from None
