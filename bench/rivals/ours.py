"""Holdfast, through its typed store: a version expected at each commit, as the engine does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from holdfast.contract import Key
from holdfast.rows import Signal
from holdfast.store import Store
from holdfast.urls import open_backend

from .floors import LANES, _Plain


def _key(number: int) -> Key:
    return Key("signal", f"SYM{number:05d}_trend_binance", f"SYM{number:05d}")


class Ours(_Plain):
    """A store on the backend that the URL names."""

    def __init__(self, place: Path, row: dict[str, Any], url: str = "") -> None:
        super().__init__(place, row, url)
        self._signal = msgspec.convert(row, Signal)
        self._versions: dict[int, int] = {}
        self._lanes: dict[int, Any] = {}

    async def open(self) -> None:
        """Open the store, which attests what it promises."""
        self._store = Store(open_backend(self.url))
        await self._store.open()

    async def write(self, number: int, turn: int) -> None:
        """Commit a row, its version expected."""
        lane = self._lanes.get(number % LANES)
        if lane is None:
            lane = self._lanes[number % LANES] = self._store.writer(f"lane-{number % LANES}")
        key, signal = _key(number), msgspec.structs.replace(self._signal, price_open=self._signal.price_open + turn)
        self._versions[number] = await lane.commit({key: signal}, {key: self._versions.get(number, 0)})

    async def read_all(self, count: int) -> int:
        """Load every signal, typed and verified."""
        return len(await self._store.scan("signal"))

    async def close(self) -> None:
        """Close the store."""
        await self._store.close()
