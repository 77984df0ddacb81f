"""The command line: ``holdfast run``, ``show``, ``check``, ``doctor``, ``promote`` and ``torture``."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence

from ..arguments import Parser, parsed
from ..errors import HoldfastError
from .exits import OK, complain, exit_code, warnings_once
from .loading import UserFileError

_COMMANDS = {
    "run": "run the strategies of a Python file, live",
    "fleet": "run contexts spread over any number of processes, each taken over when its process dies",
    "owners": "who owns each context of a shared store, and whether that process lives",
    "recover": "what was missed while the bot was down, and what comes of it: shown first, or done",
    "adopt": "take a row in quarantine, or a position from elsewhere, as it is",
    "close": "close what is stored as open, at a price, with its event and its trade",
    "clear": "remove a row that means nothing; its bytes stay in quarantine",
    "show": "what is stored: contexts, positions, risk slots, events, trades",
    "check": "verify every stored row and every rule; exit code 1 when one is broken",
    "copy": "move a store to another backend, verified",
    "doctor": "what a store really promises, and which setting to change",
    "rekey": "bring every row of an encrypted store under the current key",
    "promote": "another copy becomes the first; copies are added, replaced, dropped",
    "torture": "kill a run again and again, and compare with one that was never killed",
}
_EPILOG = (
    "Exit codes: 0 all is well; 1 a loss or a broken rule was found; 2 the command, your file or a setting has to be "
    "mended; 3 the store or the market cannot be used now, or another process holds the store; 4 another owner has "
    "taken over, or what is stored cannot be trusted."
)


def _parsed(given: Sequence[str]) -> argparse.Namespace:
    wanted = next((word for word in given if word in _COMMANDS), "")
    parser = Parser(prog="holdfast", description="Keeps a live trading bot's state through anything.", epilog=_EPILOG)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, text in _COMMANDS.items():
        if name == wanted:  # only what was asked for is imported: ``show`` starts at once
            importlib.import_module(f".{name}", __name__).add_parser(commands)
        else:
            commands.add_parser(name, help=text)
    return parsed(parser, commands.choices.get(wanted), given)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Args:
        argv: The arguments; None takes those of the process.
    """
    given = sys.argv[1:] if argv is None else list(argv)
    try:
        options = _parsed(given)
    except SystemExit as end:  # argparse has said why
        return end.code if isinstance(end.code, int) else OK
    command: Callable[[argparse.Namespace], int] = options.command
    try:
        with warnings_once():
            code = command(options)
        sys.stdout.flush()
        return code
    except UserFileError as error:
        print(error, file=sys.stderr)
        return exit_code(error)
    except HoldfastError as error:
        complain(error)
        return exit_code(error)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever read our output is gone (``| head``): nothing is left to say, and nobody to say it to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
