"""Loading a user's file: an ordinary Python file that adds strategies."""

from __future__ import annotations

import importlib.util
import sys
import sysconfig
import traceback
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType

from ..errors import HoldfastError, InvalidInputError

_OURS = str(Path(__file__).parents[1])
_FOREIGN = tuple(
    {_OURS, *(sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib", "purelib", "platlib"))}
)  # fmt: skip


class _Source(SourceFileLoader):
    """Reads the file as it is now, and leaves no compiled copy beside it."""

    def get_code(self, fullname: str) -> CodeType:
        """Compile the file."""
        code: CodeType = self.source_to_code(self.get_data(self.path), self.path)
        return code


class UserFileError(InvalidInputError):
    """The user's file cannot be run; the message is its own traceback."""


def load_bot(path: str) -> ModuleType:
    """Run a user's file as a module, its own folder first on the import path.

    Raises:
        InvalidInputError: There is no such file.
        UserFileError: It has a syntax error, or raised something; the message holds the lines of the
            user's files only.
    """
    file = Path(path).resolve()
    if not file.is_file():
        raise InvalidInputError(f"there is no file {path}: give the Python file that adds your strategies")
    name = file.stem if file.stem.isidentifier() and file.stem not in sys.modules else "holdfast_bot"
    loader = _Source(name, str(file))
    spec = importlib.util.spec_from_file_location(name, file, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    # Known by its name while it runs, as any imported module is: dataclasses and pickling look it up.
    sys.modules[name] = module
    folder = str(file.parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        loader.exec_module(module)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise UserFileError(_own_lines(error)) from None
    return module


def _own_lines(error: BaseException) -> str:
    """Return the traceback of ``error`` with the lines of the user's files only."""
    if isinstance(error, HoldfastError):
        error.__cause__ = None
        error.__suppress_context__ = True  # how we found out is our business
    told = traceback.TracebackException.from_exception(error)
    at: traceback.TracebackException | None = told
    while at is not None:
        at.stack = traceback.StackSummary.from_list([frame for frame in at.stack if _is_users(frame.filename)])
        at = at.__cause__ or at.__context__
    return "".join(told.format()).rstrip()


def own_place(error: BaseException) -> str:
    """Return the file and line of the user's that raised ``error``, or "" where none did."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_users(frame.filename)]
    return f"{frames[-1].filename.rpartition('/')[2]}, line {frames[-1].lineno}" if frames else ""


def _is_users(filename: str) -> bool:
    return not filename.startswith(("<frozen", *_FOREIGN))
