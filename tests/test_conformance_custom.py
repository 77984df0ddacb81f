"""The conformance suite over a user's four-method class, as far as such a class can promise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from holdfast.contract import Key
from holdfast.documents.custom import CustomBackend
from holdfast.domains import context_key, encode
from holdfast.names import Context
from holdfast.rows import Signal
from holdfast.testing.conformance import Bench, Check, Material, certify, conformance_cases

SYMBOLS = ("AUSDT", "BUSDT", "CUSDT", "DUSDT", "EUSDT", "FUSDT", "GUSDT")


class JsonFiles:
    """What a user may write in five minutes: one JSON file for each value."""

    def __init__(self, entity_name: str, base_dir: str) -> None:
        self.place = Path(base_dir) / entity_name

    async def wait_for_init(self, initial: bool) -> None:
        self.place.mkdir(parents=True, exist_ok=True)

    async def has_value(self, entity_id: str) -> bool:
        return (self.place / f"{entity_id}.json").exists()

    async def read_value(self, entity_id: str) -> Any:
        return json.loads((self.place / f"{entity_id}.json").read_bytes())

    async def write_value(self, entity_id: str, value: Any) -> None:
        (self.place / f"{entity_id}.json").write_bytes(json.dumps(value).encode())


def signal_payload(key: Key, number: int) -> bytes:
    symbol = key.entity_id
    return encode(
        key,
        Signal(
            id=f"id-{number}", position="long", price_open=1.5 + number, price_take_profit=2e5, price_stop_loss=0.5,
            minute_estimated_time=60, symbol=symbol, exchange_name="x", strategy_name="a", scheduled_at=1, pending_at=1,
        ),
    )  # fmt: skip


MATERIAL = Material(
    keys=tuple(context_key("signal", Context("x", symbol, "a")) for symbol in SYMBOLS),
    payload=signal_payload,
    free=False,
)
NOT_PROMISED = {
    # It takes rows of one domain only, and the store above it makes their keys and payloads.
    "a payload over the limit is refused and one at it is kept",
    "unquoted keys and bad scopes are refused",
    # It has nothing to open or close but the user's objects.
    "a closed backend refuses and closes again",
    "a backend that was never opened refuses",
}


def make(place: Path) -> CustomBackend:
    return CustomBackend(JsonFiles, str(place / "custom"), "signal")


@pytest.mark.parametrize("check", conformance_cases())
async def test_a_four_method_class_keeps_what_it_can_promise(check: Check, tmp_path: Path) -> None:
    if check.name not in NOT_PROMISED:
        await check.run_on(Bench(make, tmp_path, MATERIAL, can_list=False))


async def test_its_guarantees_say_that_it_promises_less() -> None:
    report = await certify(make, material=MATERIAL, can_list=False, only=("absent keys are absent",))
    assert report.guarantees is not None
    assert not report.guarantees.atomic
    assert not report.guarantees.fenced
