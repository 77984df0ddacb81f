"""Those who wait for a flush, and how they are told."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping

import msgspec

from ..contract import Key, Record, WriterOp
from ..errors import HoldfastError


class Waiting(msgspec.Struct, frozen=True):
    """One call of ``commit`` that waits for a flush."""

    future: asyncio.Future[int]
    told: int | HoldfastError
    """What it returns or raises once this and the commits before it are durable."""
    entry: bytes = b""
    """Its bytes in the frame; none for a call that only waits for the commits before it."""
    scope: str = ""
    writer: str = ""
    last: WriterOp = WriterOp(0, 0)
    changes: Mapping[Key, Record | None] = {}


def wake(group: list[Waiting]) -> None:
    """Tell each of ``group`` what it waits for, on its own event loop."""
    while group:
        loop = group[0].future.get_loop()
        if len(group) == 1:
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(_settle, group)
            return
        theirs = [waiting for waiting in group if waiting.future.get_loop() is loop]
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(_settle, theirs)
        if len(theirs) == len(group):
            return
        group = [waiting for waiting in group if waiting.future.get_loop() is not loop]


def _settle(group: list[Waiting]) -> None:
    for waiting in group:
        future, told = waiting.future, waiting.told
        if future.done():  # cancelled meanwhile
            continue
        if isinstance(told, int):
            future.set_result(told)
        else:
            future.set_exception(told)


def copy_of(error: HoldfastError) -> HoldfastError:
    """Return the same error for another caller, since each gets a traceback of its own."""
    twin = type(error)(str(error), backend=error.backend)
    twin.__cause__ = error.__cause__
    return twin


def merged(group: list[Waiting]) -> list[tuple[str, int, Mapping[Key, Record | None]]]:
    """Return each scope that a flushed group wrote, with its last commit number and all its changes as one."""
    numbers: dict[str, int] = {}
    changes: dict[str, dict[Key, Record | None]] = {}
    for waiting in group:
        if waiting.entry:
            scope = waiting.scope
            numbers[scope] = waiting.last[1]
            if scope in changes:
                changes[scope].update(waiting.changes)
            else:
                changes[scope] = {**waiting.changes}
    return [(scope, number, changes[scope]) for scope, number in numbers.items()]


def again(error: HoldfastError) -> HoldfastError:
    """Return a copy, so that each waiting task raises an error of its own."""
    copy = type(error)(str(error), backend=error.backend)
    copy.__cause__ = error.__cause__
    return copy
