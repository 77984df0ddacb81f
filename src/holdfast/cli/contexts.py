"""The file that says which contexts a fleet runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..engine.registry import Registry
from ..errors import HoldfastError, InvalidInputError
from ..names import Context

_MEMBERS = ("exchange", "symbol", "strategy")


def read_contexts(path: str, registry: Registry) -> tuple[Context, ...]:
    """Read a list of contexts: one ``exchange symbol strategy`` a line, or JSON.

    In lines, ``#`` begins a comment. JSON is a list of ``["exchange", "symbol", "strategy"]``, or of objects with
    these members; names with blanks in them need it.

    Args:
        path: The file.
        registry: Must know every exchange and strategy.

    Raises:
        InvalidInputError: It cannot be read, is empty, or an entry is wrong; the message names the line, or the
            entry of a JSON list, and the remedy.
    """
    try:
        text = Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInputError(f"--contexts {path}: cannot be read: {error}") from error
    entries = _of_json(path, text) if text.lstrip().startswith(("[", "{")) else _of_lines(path, text)
    if not entries:
        raise InvalidInputError(f"{path} names no context: write one 'exchange symbol strategy' a line")
    found: dict[Context, str] = {}
    for where, context in entries:
        if context in found:
            raise InvalidInputError(f"{where}: {context} stands in {found[context]} already: leave one of them out")
        try:
            registry.exchange(context.exchange_name)
            registry.strategy(context.strategy_name)
        except HoldfastError as error:
            raise InvalidInputError(f"{where}: {error}") from error
        found[context] = where
    return tuple(found)


def _of_lines(path: str, text: str) -> list[tuple[str, Context]]:
    entries = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        if words:
            entries.append((f"{path}, line {number}", _context(f"{path}, line {number}", words, line.strip())))
    return entries


def _of_json(path: str, text: str) -> list[tuple[str, Context]]:
    try:
        plain = json.loads(text)
    except ValueError as error:
        line = getattr(error, "lineno", 1)
        raise InvalidInputError(f"{path}, line {line}: neither JSON nor lines of three names: {error}") from error
    if not isinstance(plain, list):
        raise InvalidInputError(f"{path}: the JSON must be a list of contexts, not an object")
    entries = []
    for number, entry in enumerate(plain, 1):
        where = f"{path}, entry {number}"
        words = [entry.get(name) for name in _MEMBERS] if isinstance(entry, dict) else entry
        if isinstance(entry, dict) and (odd := sorted(entry.keys() - set(_MEMBERS))):
            raise InvalidInputError(f"{where}: {odd[0]!r:.60} is no member: give {', '.join(_MEMBERS)}")
        entries.append((where, _context(where, words, json.dumps(entry))))
    return entries


def _context(where: str, words: Any, told: str) -> Context:
    if not isinstance(words, list) or len(words) != len(_MEMBERS) or not all(w and isinstance(w, str) for w in words):
        raise InvalidInputError(f"{where}: {told!r:.80} is no context: give three names, exchange symbol strategy")
    return Context(*words)
