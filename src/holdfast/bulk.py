"""Handling thousands of rows at once."""

from __future__ import annotations

import gc
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType

_MANY = 256
"""So many rows are worth the sparing; the collector looks at what is new after 700 of anything."""


class _Spared:
    __slots__ = ("_was_on",)

    def __enter__(self) -> None:
        self._was_on = gc.isenabled()
        gc.disable()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._was_on:
            gc.enable()


_AS_IT_IS = nullcontext()


def without_collections(rows: int = _MANY) -> AbstractContextManager[None]:
    """Spare the garbage collector while thousands of rows are decoded: they stay, so it would look and find nothing.

    Args:
        rows: How many, where that is known; a few are not worth it.
    """
    return _Spared() if rows >= _MANY else _AS_IT_IS
