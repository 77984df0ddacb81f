"""A bot for tests of ownership: a market whose clock several processes share, and a record of what each one committed.

The environment says which market (``HOLDFAST_TEST_MARKET``, JSON of :class:`Market`) and where this process writes its
record (``HOLDFAST_TEST_RECORD``, a directory). A record outlives SIGKILL: each line is written as it happens.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from holdfast import add_exchange, add_strategy, get_candles
from holdfast.contract import Guarantees, Key
from holdfast.engine import worker
from holdfast.engine.listeners import default_listeners
from holdfast.market.pace import RunningPace
from holdfast.market.protocol import MINUTE_MS
from holdfast.market.replay import LocalMarket
from holdfast.market.synthetic import SyntheticMarket
from holdfast.rows import Event, Owner, Row
from holdfast.store import Store

EXCHANGE, STRATEGY = "shared", "swift"
HISTORY_MINUTES = 30
"""Candles before the clock begins."""


class Market(msgspec.Struct, frozen=True, kw_only=True):
    """A market: the same candles at the same moments in every process of this machine."""

    seed: int
    symbols: tuple[str, ...]
    minutes: int
    began: float
    """When its clock began, on ``time.monotonic``."""
    minute_seconds: float
    elsewhere: bool = False
    """Each process believes that it is on a machine of its own: no pid tells the others that it is gone."""

    def exchange(self) -> LocalMarket:
        """Return it as an exchange."""
        history = SyntheticMarket(self.seed, self.symbols, minutes=HISTORY_MINUTES + self.minutes)
        start_ms = history.first_ms + HISTORY_MINUTES * MINUTE_MS
        pace = RunningPace(start_ms, history.last_ms, speed=60 / self.minute_seconds)
        pace._began = self.began
        return LocalMarket(history, pace)


async def swift(symbol: str, when_ms: int) -> dict[str, Any] | None:
    """Open something at every chance, and hold it for three minutes at most: many commits, decided by candles alone."""
    candles = await get_candles(symbol, "1m", limit=1)
    if not candles:
        return None
    price = candles[-1].close
    side = 1 if candles[-1].close >= candles[-1].open else -1
    return {
        "position": "long" if side > 0 else "short",
        "priceTakeProfit": price * (1 + side * 0.02),
        "priceStopLoss": price * (1 - side * 0.02),
        "minuteEstimatedTime": 3,
    }


class Record:
    """What one process did, a JSON object a line.

    Args:
        directory: Holds the file, named after the process.
    """

    def __init__(self, directory: str) -> None:
        path = Path(directory) / f"{os.getpid()}.jsonl"
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self.line("holder", pid=os.getpid())

    def line(self, kind: str, **what: Any) -> None:
        """Write a line."""
        os.write(self._file, json.dumps({"kind": kind, "t": time.monotonic(), **what}).encode() + b"\n")

    def committed(self, scope: str, number: int, changes: Mapping[Key, Row | None]) -> None:
        """Write a line for an acknowledged commit of a context."""
        if scope != "main":
            return
        owner = next((row for row in changes.values() if isinstance(row, Owner)), None)
        names = {key.entity_name for key in changes if key.domain in ("owner", "session", "outbox", "outage")}
        slots = {f"{key.entity_name}/{key.entity_id}": row is not None for key, row in changes.items()
                 if key.domain == "risk"}  # fmt: skip
        self.line(
            "commit", n=number, context=names.pop() if names else None, slots=slots,
            owner=None if owner is None else {"epoch": owner.epoch, "released": owner.released},
            events=[row.number for row in changes.values() if isinstance(row, Event)],
        )  # fmt: skip

    def told(self, news: object) -> None:
        """Write a line for an event that somebody was told."""
        if isinstance(news, Event):
            self.line("told", event=news.id, number=news.number, candle_ms=news.candle_ms)


def watch_stores(record: Record) -> None:
    """Have every store that this process opens for writing tell the record of its commits."""
    really_open = Store.open

    async def open_watched(store: Store, *, read_only: bool = False) -> Guarantees:
        found = await really_open(store, read_only=read_only)
        store.observers.append(record.committed)
        return found

    Store.open = open_watched  # type: ignore[method-assign, assignment]


def set_up() -> Record | None:
    """Do what the environment says; return the record, if there is to be one."""
    if text := os.environ.get("HOLDFAST_TEST_MARKET"):
        market = msgspec.json.decode(text, type=Market)
        add_exchange(market.exchange(), exchange_name=EXCHANGE)
        add_strategy(swift, strategy_name=STRATEGY, interval="1m", symbols=market.symbols)
        if market.elsewhere:
            worker.machine = lambda: f"elsewhere/{os.getpid()}"
    if directory := os.environ.get("HOLDFAST_TEST_RECORD"):
        record = Record(directory)
        watch_stores(record)
        default_listeners.listen("signal_live", record.told)
        return record
    return None


RECORD = set_up()
