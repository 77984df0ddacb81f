"""A process as it is after its start: in a directory of its own, nothing registered, nothing open."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from holdfast.documents.adapters import (
    PersistPartialAdapter,
    PersistRiskAdapter,
    PersistScheduleAdapter,
    PersistSignalAdapter,
    close_stores,
    use_store,
)

ADAPTERS = (PersistSignalAdapter, PersistScheduleAdapter, PersistPartialAdapter, PersistRiskAdapter)


async def forget_all() -> None:
    """Do what the end of a process does."""
    for adapter in ADAPTERS:
        adapter.use_json()
        await adapter.clear()
    await close_stores()
    use_store(None)


@pytest.fixture
async def fresh_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Path]:
    """Run the test in its own directory; the default store is ``<directory>/dump/data``."""
    monkeypatch.chdir(tmp_path)
    use_store(None)
    yield tmp_path
    await forget_all()


def signal(**changes: Any) -> dict[str, Any]:
    """Return the documents' plain signal row."""
    return {
        "id": "s-1",
        "position": "long",
        "note": "breakout",
        "priceOpen": 43000.0,
        "priceTakeProfit": 44000.0,
        "priceStopLoss": 42000.0,
        "minuteEstimatedTime": 60,
        "symbol": "BTCUSDT",
        "exchangeName": "binance",
        "strategyName": "my-strategy",
        "scheduledAt": 1_704_067_200_000,
        "pendingAt": 1_704_067_200_000,
        "_isScheduled": False,
        **changes,
    }


def slot(strategy: str, symbol: str, opened_at_ms: int = 1_704_067_200_000) -> list[Any]:
    """Return one of the documents' pairs of a risk list."""
    position = {"signal": None, "strategyName": strategy, "exchangeName": "", "openTimestamp": opened_at_ms}
    return [f"{strategy}:{symbol}", position]
