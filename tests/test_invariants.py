"""One function judges the rows of a store: each broken rule is found, and sound rows are let be."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest
from fakes import memory_store, minute_ms, put, signal_row

from holdfast.contract import Key
from holdfast.domains import context_key, event_key, ledger_key, order_key, quarantine_key, risk_key
from holdfast.engine.outbox import trade_of
from holdfast.engine.reconcile import session_row, slot_of
from holdfast.invariants import check, check_store
from holdfast.names import Context
from holdfast.rows import Event, Levels, Order, Outage, PartialLevels, Quarantined, Row, ScheduledSignal, Signal
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


def order(action: str = "open", signal_id: str = SIGNAL.id, **more: object) -> Order:
    """Return an order of the open signal, or of another, filled unless told otherwise."""
    plain: dict[str, object] = {
        "client_order_id": f"{action}-{signal_id}", "context": tuple(CONTEXT), "signal_id": signal_id,
        "action": action, "side": "buy" if action == "open" else "sell", "quantity": 2.0, "filled_quantity": 2.0,
        "state": "filled", "epoch": 1, "intended_at_ms": 0, "expires_at_ms": 1,
    }  # fmt: skip
    return Order(**(plain | more))  # type: ignore[arg-type]


def ordered(*orders: Order) -> Callable[[Rows], None]:
    return lambda rows: rows.update({order_key(CONTEXT, one.client_order_id): one for one in orders})


def traded(*orders: Order, reason: str = "take_profit") -> Callable[[Rows], None]:
    trade = msgspec.structs.replace(trade_of(event(1, "closed", signal_row(signal_id="y"))), reason=reason)
    return lambda rows: (ordered(*orders)(rows), rows.update({ledger_key(CONTEXT, "y"): trade}))[1]


SOUND_ORDERS: dict[str, Callable[[Rows], None]] = {
    "an entry under way": ordered(order(state="intended", filled_quantity=0.0)),
    "an entry that ended without a fill, whose signal goes with the next commit": ordered(
        order(state="expired", filled_quantity=0.0)
    ),
    "a closed signal's": ordered(order(signal_id="before"), order("close", "before")),
    "a closed signal's, filled in part by each": ordered(
        order(signal_id="before"), order("close", "before", filled_quantity=0.5, state="cancelled"),
        order("close", "before", client_order_id="second", n=2, quantity=1.5, filled_quantity=0.0, state="intended"),
    ),
    "those of a signal that is long forgotten, settled": ordered(order(signal_id="x"), order("close", "x")),
    "of a trade": traded(order(signal_id="y"), order("close", "y")),
    "of a trade that an operator decided": traded(
        order(signal_id="y", filled_quantity=0.0, state="expired"), reason="operator"
    ),
}  # fmt: skip

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
    "an order under another's key": ("wrong-key", adding(order_key(CONTEXT, "x"), order())),
    "an order of another context": ("wrong-key", adding(order_key(OTHER, order().client_order_id), order())),
    "two orders open one signal": ("two-entries", ordered(order(), order(client_order_id="second", n=2))),
    "an order under way, whose signal nobody knows": (
        "order-without-signal", ordered(order(signal_id="x", state="unknown", filled_quantity=0.0)),
    ),
    "a position whose signal nobody knows": ("order-without-signal", ordered(order(signal_id="x"))),
    "what closes has nothing that opened": ("exit-without-entry", ordered(order("close", "before"))),
    "an open signal is being closed": ("exit-of-open-signal", ordered(order(), order("close", state="sent"))),
    "more is to be closed than was filled": (
        "exit-too-large", ordered(order(signal_id="before", filled_quantity=1.0), order("close", "before")),
    ),
    "what is to close adds": ("exit-adds", ordered(order(signal_id="before"), order("close", "before", side="buy"))),
    "two are to close the same": (
        "two-exits",
        ordered(order(signal_id="before"), *(
            order("close", "before", client_order_id=str(n), n=n, state="intended", filled_quantity=0.0) for n in (1, 2)
        )),
    ),
    "a trade whose entry was never filled": (
        "trade-without-fill", traded(order(signal_id="y", filled_quantity=0.0, state="expired")),
    ),
}  # fmt: skip


def test_sound_rows_break_no_rule() -> None:
    assert check(sound_rows()) == []
    assert check({}) == []


@pytest.mark.parametrize("name", SOUND_ORDERS)
def test_orders_on_their_way_break_no_rule(name: str) -> None:
    rows = sound_rows()
    SOUND_ORDERS[name](rows)
    assert check(rows) == []


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
