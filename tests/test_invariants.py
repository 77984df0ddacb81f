"""One function judges the rows of a store: each broken rule is found, and sound rows are let be."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest
from fakes import memory_store, minute_ms, put, signal_row

from holdfast.contract import Key
from holdfast.domains import context_key, event_key, ledger_key, quarantine_key, risk_key
from holdfast.engine.outbox import trade_of
from holdfast.engine.reconcile import session_row, slot_of
from holdfast.invariants import check, check_store
from holdfast.names import Context
from holdfast.rows import Event, Levels, Outage, PartialLevels, Quarantined, Row, ScheduledSignal, Signal
from holdfast.rules.signals import State

CONTEXT = Context("binance", "BTCUSDT", "my-strategy")
SIGNAL = signal_row(at_minute=0)
Rows = dict[Key, Row]


def event(number: int, kind: str = "opened", signal: Signal = SIGNAL) -> Event:
    closing = {"reason": "take_profit", "price_close": 44000.0, "pnl_percent": 1.0} if kind == "closed" else {}
    return Event(
        id=f"{CONTEXT}#{number}", number=number, kind=kind, at_ms=minute_ms(0), candle_ms=minute_ms(-1),  # type: ignore[arg-type]
        signal=signal, price=43000.0, **closing,  # type: ignore[arg-type]
    )  # fmt: skip


def sound_rows() -> Rows:
    """An open signal with a slot, levels, and its two newest events on their way."""
    state = State(signal=SIGNAL, last_candle_ms=minute_ms(0), last_event=3, closed_ids=("before",))
    return {
        context_key("signal", CONTEXT): SIGNAL,
        context_key("session", CONTEXT): session_row(CONTEXT, state, ("limit",)),
        context_key("partial", CONTEXT): PartialLevels(levels={SIGNAL.id: Levels(profit_levels=(10,))}),
        risk_key("limit", CONTEXT): slot_of(SIGNAL),
        event_key(CONTEXT, 2): event(2),
        event_key(CONTEXT, 3): event(3, "partial_profit"),
    }


def without(*domains: str) -> Callable[[Rows], None]:
    def change(rows: Rows) -> None:
        for key in [key for key in rows if key.domain in domains]:
            del rows[key]

    return change


def adding(key: Key, row: Row) -> Callable[[Rows], None]:
    return lambda rows: rows.update({key: row})


def held(**changes: object) -> Callable[[Rows], None]:
    key = context_key("session", CONTEXT)
    return lambda rows: rows.update({key: msgspec.structs.replace(rows[key], **changes)})


def two_instead_of_three(rows: Rows) -> None:
    rows[event_key(CONTEXT, 1)] = event(1)
    del rows[event_key(CONTEXT, 2)]


OTHER = Context("binance", "ETHUSDT", "my-strategy")
SAME_ID = signal_row(scheduled=True)
assert isinstance(SAME_ID, ScheduledSignal)

DEFECTS: dict[str, tuple[str, Callable[[Rows], None]]] = {
    "a slot is missing": ("signal-without-slot", without("risk")),
    "a slot has no signal": ("slot-without-signal", without("signal")),
    "a slot is held by nobody": ("slot-not-held", held(risk_names=())),
    "a slot names another signal": (
        "slot-of-other-signal", adding(risk_key("limit", CONTEXT), slot_of(signal_row(signal_id="x"))),
    ),
    "profiles are held without a signal": ("held-without-signal", without("signal", "risk", "partial")),
    "levels of a signal that is not open": (
        "levels-without-signal", adding(context_key("partial", CONTEXT), PartialLevels(levels={"x": Levels()})),
    ),
    "one id is open and waits": ("open-and-scheduled", adding(context_key("schedule", CONTEXT), SAME_ID)),
    "a waiting row lies as open": (
        "scheduled-as-open",
        adding(context_key("signal", CONTEXT), msgspec.structs.replace(SIGNAL, is_scheduled=True)),
    ),
    "two rows of one context": (
        "two-open",
        adding(context_key("signal", CONTEXT)._replace(entity_name="BTCUSDT_my-strategy"), SIGNAL),
    ),
    "a row under another's key": ("wrong-key", adding(context_key("signal", OTHER), SIGNAL)),
    "a closed id is open": ("closed-id-open", held(closed_ids=(SIGNAL.id,))),
    "an id of the ledger is open": (
        "closed-id-open", adding(ledger_key(CONTEXT, SIGNAL.id), trade_of(event(1, "closed"))),
    ),
    "one id is closed by two events": (
        "closed-twice",
        lambda rows: rows.update({
            event_key(CONTEXT, 3): event(3, "closed", signal_row(signal_id="y")),
            ledger_key(CONTEXT, "y"): trade_of(event(1, "closed", signal_row(signal_id="y"))),
        }),
    ),
    "one event makes two trades": (
        "closed-twice",
        lambda rows: rows.update({
            ledger_key(CONTEXT, name): trade_of(event(1, "closed", signal_row(signal_id=name))) for name in ("y", "z")
        }),
    ),
    "an event is missing in between": ("event-missing", two_instead_of_three),
    "the newest event is missing": ("event-missing", held(last_event=4)),
    "the session is behind its events": ("session-behind", held(last_candle_ms=0)),
    "an event under another number": ("wrong-key", adding(event_key(CONTEXT, 3), event(2))),
    "an outage that ends before it begins": (
        "outage-reversed", adding(Key("outage", "x", "1"), Outage(from_ms=2, to_ms=1)),
    ),
}  # fmt: skip


def test_sound_rows_break_no_rule() -> None:
    assert check(sound_rows()) == []
    assert check({}) == []


@pytest.mark.parametrize("name", DEFECTS)
def test_each_defect_is_found_by_its_rule(name: str) -> None:
    rule, change = DEFECTS[name]
    rows = sound_rows()
    change(rows)
    found = check(rows)
    assert rule in {violation.rule for violation in found}
    assert all(str(violation).startswith(violation.rule) for violation in found)


def test_what_belongs_to_a_quarantined_signal_is_kept_without_complaint() -> None:
    """The slot and the levels stay until the user has decided about the bytes."""
    rows = sound_rows()
    del rows[context_key("signal", CONTEXT)]
    assert check(rows) != []
    kept = quarantine_key(context_key("signal", CONTEXT), 7)
    rows[kept] = Quarantined(reason="damaged", version=7, at_ms=0)
    assert check(rows) == []
    rows[kept._replace(entity_id=kept.entity_id + ".released")] = rows.pop(kept)
    assert check(rows) != []


async def test_a_stored_row_that_cannot_be_read_is_a_violation() -> None:
    store = await memory_store()
    await put(store, sound_rows())
    assert await check_store(store) == []
    key = context_key("partial", CONTEXT)
    backend = store.home.backend
    from holdfast.contract import Op

    await backend.commit(store.scope, {key: b'{"levels":{}}'}, {}, op=Op("vandal", 1))
    found = await check_store(store)
    assert [violation.rule for violation in found] == ["unreadable"]
    await store.close()
