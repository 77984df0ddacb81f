"""The documents' own directories of plain JSON files, as the system that they describe leaves them, as rows.

``signal/SYMBOL_STRATEGY/SYMBOL.json``, ``schedule/…``, ``partial/SYMBOL_STRATEGY/levels.json`` and
``risk/NAME/positions.json``, without schema or checksum. Directory names there are ambiguous, so a row is known by what
it says of itself. Nothing is changed or deleted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import msgspec

from ..contract import Key
from ..domains import context_key
from ..errors import InvalidInputError
from ..names import Context, quote
from ..rows import PartialLevels, Row, Signal
from .shapes import DOCUMENT_DOMAINS, positions_of, row_of

_MOST_BYTES = 8 * 1024 * 1024


class Raw(NamedTuple):
    """What a directory holds."""

    directory: Path
    """Where, from the root."""
    rows: dict[Key, Row]
    damaged: dict[str, str]
    """For each file that cannot be trusted, by its path under the directory, why."""
    left_out: dict[str, str]
    """What means nothing any more, and why."""


def is_raw(directory: Path) -> bool:
    """Whether a directory holds the documents' files and is no store of ours."""
    return not (directory / ".holdfast").exists() and any((directory / name).is_dir() for name in DOCUMENT_DOMAINS)


def read_raw(
    directory: Path, *, failures: Callable[[Signal], list[str]], exchange_name: str | None = None
) -> Raw:  # fmt: skip
    """Read every file of the documents' layout.

    Args:
        failures: Tells what makes a signal impossible to watch.
        exchange_name: The exchange of rows that name none.
    """
    reader = _Reader(directory, failures, exchange_name)
    for domain in ("signal", "schedule"):
        for path, value in reader.values(domain):
            reader.signal(domain, path, value)
    for path, value in reader.values("partial"):
        reader.levels(path, value)
    for path, value in reader.values("risk"):
        reader.positions(path, value)
    known = {*DOCUMENT_DOMAINS}
    for other in sorted(directory.iterdir()):
        if other.name not in known:
            reader.left_out[other.name] = "no domain that is kept here"
    return Raw(directory.resolve(), reader.rows, reader.damaged, reader.left_out)


class _Reader:
    def __init__(self, directory: Path, failures: Callable[[Signal], list[str]], exchange_name: str | None) -> None:
        self._directory, self._failures, self._exchange_name = directory, failures, exchange_name
        self.rows: dict[Key, Row] = {}
        self.damaged: dict[str, str] = {}
        self.left_out: dict[str, str] = {}

    def values(self, domain: str) -> Iterator[tuple[Path, Any]]:
        """Yield each file of a domain with its value; what is no JSON is noted as damaged."""
        root = self._directory / domain
        for path in sorted(root.rglob("*")) if root.is_dir() else ():
            if path.is_dir():
                continue
            if path.name.startswith(".") or path.suffix != ".json" or len(path.relative_to(root).parts) != 2:
                self.left_out[self._named(path)] = "no row: a leftover or somebody else's file"
                continue
            try:
                if path.stat().st_size > _MOST_BYTES:
                    raise InvalidInputError(f"it is over {_MOST_BYTES // 1024 // 1024} MiB")
                yield path, msgspec.json.decode(path.read_bytes())
            except (OSError, msgspec.DecodeError, InvalidInputError, RecursionError) as error:
                self.damaged[self._named(path)] = str(error)

    def signal(self, domain: str, path: Path, value: Any) -> None:
        """Take one signal, open or waiting; null is none."""
        if value is None:
            return
        name = self._named(path)
        if not isinstance(value, dict):
            self.damaged[name] = f"a row is an object, not {type(value).__name__}"
            return
        if not value.get("exchangeName"):
            if self._exchange_name is None:
                self.damaged[name] = "it names no exchange: say which one with --exchange"
                return
            value = {**value, "exchangeName": self._exchange_name}
        symbol, strategy = value.get("symbol"), value.get("strategyName")
        if not (isinstance(symbol, str) and symbol and isinstance(strategy, str) and strategy):
            self.damaged[name] = "it does not say its symbol and strategy"
            return
        try:
            context = Context(value["exchangeName"], symbol, strategy)
            key = context_key(domain, context)
            row = cast("Signal", row_of(key, value))
        except InvalidInputError as error:
            self.damaged[name] = str(error)
            return
        if failures := self._failures(row):
            self.damaged[name] = "it cannot be watched: " + "; ".join(failures)
        elif key in self.rows:
            self.damaged[name] = f"another file says that it is {context} too"
        else:
            self.rows[key] = row

    def levels(self, path: Path, value: Any) -> None:
        """Take the milestones of the signals that were found; those of others mean nothing any more."""
        name = self._named(path)
        if not isinstance(value, dict):
            if value is not None:
                self.damaged[name] = f"levels are an object, not {type(value).__name__}"
            return
        for signal_id, reached in value.items():
            owner = next((row for row in self.rows.values() if isinstance(row, Signal) and row.id == signal_id
                          and path.parent.name == f"{row.symbol}_{row.strategy_name}"), None)  # fmt: skip
            if owner is None or owner.is_scheduled:
                self.left_out[f"{name}: {signal_id}"] = "levels of a signal that is not open"
                continue
            key = context_key("partial", owner.context)
            try:
                row = row_of(key, {signal_id: reached})
            except InvalidInputError as error:
                self.damaged[name] = str(error)
                continue
            if isinstance(row, PartialLevels):
                self.rows[key] = row

    def positions(self, path: Path, value: Any) -> None:
        """Take the slots of one risk profile."""
        try:
            self.rows |= positions_of(quote(path.parent.name, keep_underscore=True), self._with_exchanges(value))
        except InvalidInputError as error:
            self.damaged[self._named(path)] = str(error)

    def _with_exchanges(self, value: Any) -> Any:
        """Return a list of pairs in which each position names its open signal's exchange, where there is one."""
        if not isinstance(value, list):
            return value
        open_ones = {
            (row.strategy_name, row.symbol): row.exchange_name
            for row in self.rows.values()
            if isinstance(row, Signal) and not row.is_scheduled
        }
        pairs = []
        for pair in value:
            if isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str) and isinstance(pair[1], dict):
                strategy = pair[1].get("strategyName")
                symbol = pair[0][len(strategy) + 1 :] if isinstance(strategy, str) else ""
                exchange = pair[1].get("exchangeName") or open_ones.get((str(strategy), symbol), "")
                pair = [pair[0], {**pair[1], "exchangeName": exchange}]
            pairs.append(pair)
        return pairs

    def _named(self, path: Path) -> str:
        return str(path.relative_to(self._directory))
