"""The documents' names: ``PersistBase`` and the four domain adapters, thin over the store.

Each adapter is one object for the process. What it writes is what the engine recovers from, and the other way round.
An exchange may be left out, as in the documents: a row's own is taken; where there is no row, the entry without an
exchange, else the only one stored for that symbol and strategy.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Generic, TypeVar, cast

from ..contract import Key, KeyPrefix
from ..errors import InvalidInputError
from ..names import entity_name, quote, unquote
from ..rows import Levels, PartialLevels, RiskPosition, Row, ScheduledSignal, Signal
from . import default
from .custom import Dummy, require_four_methods
from .default import close_stores, current_routes, default_store, lent_store, use_store
from .entities import PersistBase
from .shapes import in_list_order, pair_name, positions_of, row_of
from .shared import Closing, Desk

R = TypeVar("R", bound=Signal)

_MAX_EXCHANGES = 10_000
"""How many (symbol, strategy) pairs an adapter remembers the exchanges of, for classes that cannot list."""


class _Adapter:
    """What the four have in common: where the domain lies."""

    domain: str

    def use_json(self) -> None:
        """Keep the domain in the default store again (JSON files in ``./dump/data``)."""
        default.register(self.domain, None)

    def use_dummy(self) -> None:
        """Discard writes and have nothing: for tests and dry runs."""
        default.register(self.domain, Dummy)

    def clear(self) -> Closing:
        """Forget memoised instances, as a restart would; they are closed before the next call does anything.

        Await the result to have them closed now. While a live run holds the default store, that one stays open.
        """
        default.forget(self.domain)
        return Closing(default.ready)

    def _use(self, cls: type) -> None:
        require_four_methods(cls)
        default.register(self.domain, cls)


class _ContextAdapter(_Adapter):
    """For the domains that are kept for a symbol and a strategy."""

    entity_id = ""

    def __init__(self) -> None:
        self._exchanges: dict[tuple[str, str], set[str]] = {}

    def _key(self, symbol: str, strategy_name: str, exchange_name: str | None) -> Key:
        _require_text(symbol=symbol, strategy_name=strategy_name, exchange_name=exchange_name or "")
        name = entity_name(symbol, strategy_name, exchange_name or None)
        return Key(self.domain, name, self.entity_id or quote(symbol))

    async def _stored_key(self, desk: Desk, symbol: str, strategy_name: str) -> Key:
        """Return the key of the one entry of a symbol and strategy whose exchange was not named."""
        plain = self._key(symbol, strategy_name, None)
        if plain in await desk.store.keys(KeyPrefix(self.domain, plain.entity_name)) or desk.store.is_stopped(plain):
            return plain
        found = await self._stored_exchanges(desk, symbol, strategy_name)
        if len(found) > 1:
            raise InvalidInputError(
                f"{self.domain} of {symbol}/{strategy_name} is stored for several exchanges "
                f"({', '.join(sorted(found))}): pass exchange_name="
            )
        return self._key(symbol, strategy_name, found.pop()) if found else plain

    async def _stored_exchanges(self, desk: Desk, symbol: str, strategy_name: str) -> set[str]:
        found = set()
        if default.registered(self.domain) is not None:  # such a class cannot list what it holds
            for exchange in self._exchanges.get((symbol, strategy_name), ()):
                key = self._key(symbol, strategy_name, exchange)
                if key in await desk.store.keys(KeyPrefix(self.domain, key.entity_name)):
                    found.add(exchange)
            return found
        wanted = [quote(symbol), quote(strategy_name)]
        keys = await desk.store.keys(KeyPrefix(self.domain))
        keys += [key for key in desk.store.damaged if key.domain == self.domain]
        for key in keys:
            parts = key.entity_name.split("_")
            if "~" not in key.entity_name and len(parts) == 3 and parts[:2] == wanted:
                found.add(cast("str", unquote(parts[2])))
            elif "~" in key.entity_name and key.entity_id == quote(symbol):  # cut: only the row knows
                row = (await desk.store.salvage(key))[0].get(key)
                if row is not None and isinstance(row.row, Signal) and row.row.strategy_name == strategy_name:
                    found.add(row.row.exchange_name)
        return found

    def _remember(self, symbol: str, strategy_name: str, exchange_name: str | None) -> None:
        if exchange_name and len(self._exchanges) < _MAX_EXCHANGES:
            self._exchanges.setdefault((symbol, strategy_name), set()).add(exchange_name)

    async def _read(self, symbol: str, strategy_name: str, exchange_name: str | None) -> Row | None:
        key = self._key(symbol, strategy_name, exchange_name)
        desk = await (await default.ready()).desk()
        if not exchange_name:
            key = await self._stored_key(desk, symbol, strategy_name)
        return await desk.read(key)

    async def _write(self, value: Any, symbol: str, strategy_name: str, exchange_name: str | None) -> None:
        key = self._key(symbol, strategy_name, exchange_name)
        row = row_of(key, value)
        desk = await (await default.ready()).desk()
        if not exchange_name:
            key = await self._stored_key(desk, symbol, strategy_name)
        self._remember(symbol, strategy_name, exchange_name)
        await desk.put(key, row)


class _SignalAdapter(_ContextAdapter, Generic[R]):
    """Signal and schedule: rows that name their own exchange."""

    async def _write(self, value: Any, symbol: str, strategy_name: str, exchange_name: str | None) -> None:
        own = value.get("exchangeName") if isinstance(value, Mapping) else getattr(value, "exchange_name", None)
        if exchange_name and own and own != exchange_name:
            raise InvalidInputError(f"the row's exchange is {own!r:.80}, not {exchange_name!r:.80}: mend one of them")
        exchange_name = exchange_name or own or None
        key = self._key(symbol, strategy_name, exchange_name)
        row = row_of(key, value)
        if row is None:
            await super()._write(None, symbol, strategy_name, exchange_name)
            return
        signal = cast("Signal", row)
        for name, given, stored in (
            ("symbol", symbol, signal.symbol),
            ("strategy", strategy_name, signal.strategy_name),
        ):
            if given != stored:
                raise InvalidInputError(f"the row's {name} is {stored!r:.80}, not {given!r:.80}: mend one of them")
        desk = await (await default.ready()).desk()
        self._remember(symbol, strategy_name, exchange_name)
        await desk.put(key, row)


class PersistSignalUtils(_SignalAdapter[Signal]):
    """Open positions: one signal row for each symbol and strategy."""

    domain = "signal"

    def use_persist_signal_adapter(self, cls: type) -> None:
        """Keep signals in ``cls``, built with ``(entity_name, base_dir)``, from the next call on.

        Args:
            cls: A class with ``wait_for_init``, ``read_value``, ``has_value`` and ``write_value``.

        Raises:
            InvalidInputError: It is no class, or lacks one of them.
        """
        self._use(cls)

    async def read_signal_data(
        self, symbol: str, strategy_name: str, exchange_name: str | None = None
    ) -> Signal | None:
        """Return the signal row, or None.

        Raises:
            CorruptedError: It is damaged; its bytes are kept, other keys work.
            InvalidInputError: It is stored for several exchanges and none was named.
        """
        return cast("Signal | None", await self._read(symbol, strategy_name, exchange_name))

    async def write_signal_data(
        self,
        row: Signal | Mapping[str, Any] | None,
        symbol: str,
        strategy_name: str,
        exchange_name: str | None = None,
    ) -> None:
        """Write the signal row; None clears it.

        Args:
            row: A row, or the documents' plain mapping with camelCase names.
            symbol: As in the row.
            strategy_name: As in the row.
            exchange_name: As in the row; needed only where the row has none.

        Crash: The old row or the new one.
        """
        await self._write(row, symbol, strategy_name, exchange_name)


class PersistScheduleUtils(_SignalAdapter[ScheduledSignal]):
    """Signals that wait for their entry price."""

    domain = "schedule"

    def use_persist_schedule_adapter(self, cls: type) -> None:
        """Keep scheduled signals in ``cls``; see :meth:`PersistSignalUtils.use_persist_signal_adapter`."""
        self._use(cls)

    async def read_schedule_data(
        self, symbol: str, strategy_name: str, exchange_name: str | None = None
    ) -> ScheduledSignal | None:
        """Return the scheduled row, or None; raises as :meth:`PersistSignalUtils.read_signal_data` does."""
        return cast("ScheduledSignal | None", await self._read(symbol, strategy_name, exchange_name))

    async def write_schedule_data(
        self,
        row: ScheduledSignal | Signal | Mapping[str, Any] | None,
        symbol: str,
        strategy_name: str,
        exchange_name: str | None = None,
    ) -> None:
        """Write the scheduled row; None clears it. Arguments as :meth:`PersistSignalUtils.write_signal_data`.

        Crash: The old row or the new one.
        """
        await self._write(row, symbol, strategy_name, exchange_name)


class PersistPartialUtils(_ContextAdapter):
    """Reached profit and loss levels, by signal id."""

    domain = "partial"
    entity_id = "levels"

    def use_persist_partial_adapter(self, cls: type) -> None:
        """Keep partial levels in ``cls``; see :meth:`PersistSignalUtils.use_persist_signal_adapter`."""
        self._use(cls)

    async def read_partial_data(
        self, symbol: str, strategy_name: str, exchange_name: str | None = None
    ) -> dict[str, Levels]:
        """Return the levels of each signal id; empty if there are none."""
        row = await self._read(symbol, strategy_name, exchange_name)
        return {} if row is None else dict(cast("PartialLevels", row).levels)

    async def write_partial_data(
        self,
        levels: Mapping[str, Levels | Mapping[str, Any]] | PartialLevels | None,
        symbol: str,
        strategy_name: str,
        exchange_name: str | None = None,
    ) -> None:
        """Write the levels of all signal ids; an empty mapping or None clears them.

        Args:
            levels: Signal id to levels: rows, or mappings with ``profitLevels`` and ``lossLevels``.
            symbol: Whose they are.
            strategy_name: Whose they are.
            exchange_name: Pass it where the engine shall find them: it always knows its exchange.

        Crash: The old levels or the new ones.
        """
        await self._write(levels, symbol, strategy_name, exchange_name)


class PersistRiskUtils(_Adapter):
    """The positions that a risk profile counts."""

    domain = "risk"

    def use_persist_risk_adapter(self, cls: type) -> None:
        """Keep risk positions in ``cls``; see :meth:`PersistSignalUtils.use_persist_signal_adapter`."""
        self._use(cls)

    async def read_position_data(self, risk_name: str) -> list[tuple[str, RiskPosition]]:
        """Return pairs of ``strategyName:symbol`` and position, in the order written; empty if there are none.

        Two positions may have the same text there (``a:b`` on ``c``, ``a`` on ``b:c``): tell them apart by the row.
        """
        entity = _risk_entity(risk_name)
        desk = await (await default.ready()).desk()
        rows = await desk.scan("risk", entity)
        return [(pair_name(row), row) for row in in_list_order(cast("Iterable[RiskPosition]", rows.values()))]

    async def write_position_data(self, positions: Iterable[Sequence[Any]] | None, risk_name: str) -> None:
        """Replace all positions of the profile by the documents' list of pairs; empty or None clears them.

        Args:
            positions: Pairs (tuples or lists) of ``strategyName:symbol`` and position; that a row or a mapping.
            risk_name: The profile.

        Crash: All the old positions or all the new ones.
        """
        entity = _risk_entity(risk_name)
        rows: dict[Key, Row] = dict(positions_of(entity, positions))
        desk = await (await default.ready()).desk()
        await desk.replace("risk", entity, rows)


def _risk_entity(risk_name: str) -> str:
    _require_text(risk_name=risk_name)
    return quote(risk_name, keep_underscore=True)


def _require_text(**names: object) -> None:
    for what, name in names.items():
        if not isinstance(name, str):
            raise InvalidInputError(f"{what} must be text, not {name!r:.80}")


PersistSignalAdapter = PersistSignalUtils()
PersistScheduleAdapter = PersistScheduleUtils()
PersistPartialAdapter = PersistPartialUtils()
PersistRiskAdapter = PersistRiskUtils()

__all__ = [
    "PersistBase",
    "PersistPartialAdapter",
    "PersistRiskAdapter",
    "PersistScheduleAdapter",
    "PersistSignalAdapter",
    "close_stores",
    "current_routes",
    "default_store",
    "lent_store",
    "use_store",
]
