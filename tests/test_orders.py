"""The rules of orders, without any I/O: what is wanted, what an answer makes of it, what is to be done now."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from fakes import minute_ms, signal_row
from hypothesis import given, settings
from hypothesis import strategies as st
from order_kit import CONTEXT, features

from holdfast.contract import Key
from holdfast.domains import order_key
from holdfast.engine.answers import answered, elsewhere, missing, together
from holdfast.engine.broker import OrderReport, VenuePosition
from holdfast.engine.emergency import beside_others
from holdfast.engine.orders import (
    Ask,
    Book,
    Cancel,
    Put,
    Send,
    Step,
    Terms,
    Wait,
    client_order_id,
    entry_order,
    exit_order,
    may_turn_up,
    next_step,
    request_of,
    superseded,
    unfound,
    wanted,
    withdrawal,
)
from holdfast.engine.venue import quantity_of
from holdfast.errors import InvalidInputError
from holdfast.names import Context
from holdfast.rows import Order, OrderState

NOW = minute_ms(0)
SIGNAL = signal_row()
TERMS = Terms(
    account="acc", features=features(), entry_validity_ms=30_000, exit_validity_ms=10_000, grace_ms=5_000, poll_ms=1000
)
ENTRY = entry_order(SIGNAL, 2.0, TERMS, now_ms=NOW, epoch=3)


def terms(**more: Any) -> Terms:
    return msgspec.structs.replace(TERMS, **more)


def changed(order: Order, **more: Any) -> Order:
    return msgspec.structs.replace(order, **more)


def report(state: str, filled: float = 0.0, venue_id: str = "v1", **more: Any) -> OrderReport:
    return OrderReport(
        client_order_id=ENTRY.client_order_id, symbol="BTCUSDT", state=state,  # type: ignore[arg-type]
        filled_quantity=filled, venue_id=venue_id, **more,
    )  # fmt: skip


def entered(quantity: float = 2.0) -> Order:
    return changed(ENTRY, state="filled", filled_quantity=quantity)


def an_exit(book: Book, **more: Any) -> Order:
    order = exit_order(book, SIGNAL.id, TERMS, now_ms=NOW + 60_000, epoch=3)
    assert order is not None
    return changed(order, **more)


def step(*orders: Order, open_id: str | None = SIGNAL.id, now_ms: int = NOW, **more: Any) -> Step:
    return next_step(Book(orders), open_id, more.pop("terms", TERMS), now_ms=now_ms, epoch=4, **more)


# ---------------------------------------------------------------------- ids and intents


def test_a_client_order_id_is_the_same_whoever_asks_and_another_for_every_other_order() -> None:
    name = client_order_id(CONTEXT, "a", "open", 1)
    assert name == client_order_id(Context(*CONTEXT), "a", "open", 1)
    assert len(name) == 32
    others = {
        client_order_id(CONTEXT, "b", "open", 1), client_order_id(CONTEXT, "a", "close", 1),
        client_order_id(CONTEXT, "a", "open", 2), client_order_id(Context("b", *CONTEXT[1:]), "a", "open", 1),
    }  # fmt: skip
    assert len(others | {name}) == 5


@given(st.text(max_size=50), st.text(min_size=1, max_size=20), st.integers(1, 10**6))
def test_a_client_order_id_has_at_most_32_characters_of_a_to_z_and_digits(signal_id: str, name: str, n: int) -> None:
    made = client_order_id(Context(name, name, name), signal_id, "close", n)
    assert len(made) <= 32
    assert made[0].isalpha()
    assert set(made) <= set("abcdefghijklmnopqrstuvwxyz0123456789")


@pytest.mark.parametrize(("position", "side", "back"), [("long", "buy", "sell"), ("short", "sell", "buy")])
def test_a_signal_that_opens_wants_an_entry_and_one_that_closes_an_exit_of_what_was_filled(
    position: str, side: str, back: str
) -> None:
    prices = {} if position == "long" else {"target": 42000.0, "stop": 44000.0}
    signal = signal_row(position=position, **prices)  # type: ignore[arg-type]
    (entry,) = wanted(Book(), None, signal, TERMS, quantity=2.0, now_ms=NOW, epoch=3)
    assert (entry.action, entry.side, entry.quantity, entry.state) == ("open", side, 2.0, "intended")
    assert (entry.reduce_only, entry.epoch, entry.expires_at_ms) == (False, 3, NOW + 30_000)
    book = Book([changed(entry, state="cancelled", filled_quantity=1.5)])
    (leaving,) = wanted(book, signal, None, TERMS, quantity=None, now_ms=NOW + 5, epoch=3, price=44000.0)
    assert (leaving.action, leaving.side, leaving.quantity, leaving.n) == ("close", back, 1.5, 1)
    assert (leaving.reduce_only, leaving.reference_price, leaving.expires_at_ms) == (True, 44000.0, NOW + 10_005)
    assert request_of(leaving).client_order_id == client_order_id(CONTEXT, signal.id, "close", 1)


@pytest.mark.parametrize(
    ("named", "write", "quantity"),
    [
        (0.126, "{:.2f}".format, 0.12),
        (0.129, "{:.2f}".format, 0.12),
        (0.124, "{:.2f}".format, 0.12),
        (0.12, "{:.2f}".format, 0.12),
        (1.9999, "{:.0f}".format, 1.0),
        (0.1 + 0.2, "{:.1f}".format, 0.3),
        (3.0, lambda quantity: str(max(quantity, 2.0)), 3.0),
    ],
)
def test_what_is_traded_is_never_more_than_the_signal_names(
    named: float, write: Callable[[float], str], quantity: float
) -> None:
    signal = msgspec.structs.replace(SIGNAL, extra={"quantity": named})
    assert quantity_of(signal, lambda _, one: write(one)) == quantity


def test_a_quantity_that_the_exchange_can_only_raise_is_refused() -> None:
    for named, least in ((0.6, 1.0), (0.006, 0.01)):
        signal = msgspec.structs.replace(SIGNAL, extra={"quantity": named})
        with pytest.raises(InvalidInputError, match=f"becomes {least:g} at the exchange"):
            quantity_of(signal, lambda _, one, least=least: str(max(one, least)))  # type: ignore[misc]


def test_a_venue_that_takes_short_ids_gets_the_beginning_of_the_long_ones() -> None:
    short = terms(features=msgspec.structs.replace(features(), id_length=18))
    entry = entry_order(SIGNAL, 2.0, short, now_ms=NOW, epoch=3)
    assert entry.client_order_id == ENTRY.client_order_id[:18]
    book = Book([changed(entry, state="filled", filled_quantity=2.0)])
    leaving = exit_order(book, SIGNAL.id, short, now_ms=NOW, epoch=3)
    assert leaving is not None
    assert leaving.client_order_id == client_order_id(CONTEXT, SIGNAL.id, "close", 1)[:18]


def test_a_venue_without_reduce_only_is_not_asked_for_it() -> None:
    order = exit_order(Book([entered()]), SIGNAL.id, terms(features=features(reduce_only=False)), now_ms=NOW, epoch=1)
    assert order is not None
    assert not order.reduce_only


@pytest.mark.parametrize("state", ["intended", "unknown", "sent", "open", "partial"])
def test_nothing_is_closed_before_it_is_known_what_became_of_the_entry(state: OrderState) -> None:
    book = Book([changed(ENTRY, state=state, filled_quantity=1.0)])
    assert wanted(book, SIGNAL, None, TERMS, quantity=None, now_ms=NOW, epoch=3) == []


def test_a_signal_that_only_moved_wants_nothing() -> None:
    assert wanted(Book(), SIGNAL, SIGNAL, TERMS, quantity=None, now_ms=NOW, epoch=3) == []


# ---------------------------------------------------------------------- answers


@pytest.mark.parametrize(
    ("was", "told", "state", "filled"),
    [
        ("intended", report("filled", 2.0), "filled", 2.0),
        ("intended", report("sent"), "sent", 0.0),
        ("intended", report("open"), "open", 0.0),
        ("intended", report("open", 0.5), "partial", 0.5),
        ("open", report("sent"), "open", 0.0),
        ("open", report("open", 2.0), "filled", 2.0),
        ("intended", report("rejected"), "rejected", 0.0),
        ("intended", report("expired"), "expired", 0.0),
        ("unknown", report("cancelled", 0.7), "cancelled", 0.7),
        ("intended", report("rejected", repeated=True), "unknown", 0.0),
        ("cancelled", report("filled", 2.0), "filled", 2.0),
        ("expired", report("open"), "open", 0.0),
    ],
)
def test_an_answer_makes_of_an_order(was: OrderState, told: OrderReport, state: str, filled: float) -> None:
    now = answered(changed(ENTRY, state=was), told)
    assert (now.state, now.filled_quantity) == (state, filled)


@pytest.mark.parametrize("state", ["rejected", "expired"])
def test_a_refusal_of_the_second_request_says_nothing_of_the_first(state: str) -> None:
    assert answered(changed(ENTRY, state="unknown"), report(state), resent=True).state == "unknown"


def test_what_was_filled_is_never_less_again() -> None:
    assert answered(changed(ENTRY, state="partial", filled_quantity=1.0), report("cancelled", 0.0)).filled_quantity == 1


def test_several_reports_of_one_order_are_one_and_an_order_that_is_there_twice_adds_up() -> None:
    assert together([]) == (None, 0)
    one, count = together([report("open"), report("filled", 2.0), report("open")])
    assert one is not None
    assert (one.state, one.filled_quantity, count) == ("filled", 2.0, 1)
    both, count = together([report("filled", 2.0), report("partial", 0.5, "v2")])
    assert both is not None
    assert (both.state, both.filled_quantity, count) == ("partial", 2.5, 2)


# ---------------------------------------------------------------------- what to do now


def test_what_this_process_committed_and_did_not_send_is_sent() -> None:
    assert step(ENTRY, unsent={ENTRY.client_order_id}) == Send(ENTRY)


def test_what_another_process_committed_is_asked_about_before_anything_is_sent() -> None:
    assert step(ENTRY) == Ask(ENTRY)


def test_an_entry_whose_time_is_over_is_not_sent_but_recorded() -> None:
    late = step(ENTRY, unsent={ENTRY.client_order_id}, now_ms=ENTRY.expires_at_ms)
    assert isinstance(late, Put)
    assert late.order.state == "expired"
    assert withdrawal(Book([late.order]), SIGNAL.id) == "order_expired"


def test_an_entry_of_a_signal_that_is_no_longer_open_is_not_sent() -> None:
    never = step(ENTRY, open_id=None, unsent={ENTRY.client_order_id})
    assert isinstance(never, Put)
    assert never.order.state == "expired"


def test_an_exit_that_was_never_sent_is_sent_however_late() -> None:
    book = Book([entered()])
    leaving = an_exit(book)
    later = leaving.expires_at_ms + 60_000
    renewed = step(entered(), leaving, open_id=None, unsent={leaving.client_order_id}, now_ms=later)
    assert isinstance(renewed, Put)
    assert (renewed.order.client_order_id, renewed.order.state) == (leaving.client_order_id, "intended")
    assert step(entered(), renewed.order, open_id=None, unsent={leaving.client_order_id}, now_ms=later) == Send(
        renewed.order
    )


def test_an_order_is_asked_about_no_more_often_than_the_pace_says() -> None:
    waiting = changed(ENTRY, state="unknown")
    assert step(waiting, asked={ENTRY.client_order_id: NOW}) == Wait(NOW + 1000)
    assert step(waiting, asked={ENTRY.client_order_id: NOW}, now_ms=NOW + 1000) == Ask(waiting)


def unasked(order: Order, there: Terms, *, now_ms: int, is_open: bool, **more: Any) -> Step:
    """Return what is done about an order that the venue was asked about just now."""
    return unfound(order, there, now_ms=now_ms, is_open=is_open, **{"asked_ms": now_ms, "left": order.quantity, **more})


@pytest.mark.parametrize(
    ("mode", "refuses_expired", "after_ms", "is_exit", "decided"),
    [
        # in time: sent again only where the id is refused for good
        ("always", True, 0, False, "send"), ("while_open", True, 0, False, "wait"), ("never", True, 0, False, "wait"),
        ("always", True, 0, True, "send"), ("while_open", True, 0, True, "wait"), ("never", False, 0, True, "wait"),
        # the expiry is over, but not the grace: it may still have come
        ("always", True, 30_000, False, "wait"), ("never", True, 30_000, False, "wait"),
        ("always", True, 10_000, True, "wait"), ("always", False, 10_000, True, "send"),
        # both are over
        ("always", True, 35_000, False, "expired"), ("never", True, 35_000, False, "expired"),
        ("while_open", False, 35_000, False, "expired"), ("never", False, 15_000, True, "expired"),
        ("always", True, 15_000, True, "expired"), ("always", False, 100_000, True, "send"),
        ("always", False, 35_000, False, "expired"),
    ],
)  # fmt: skip
def test_what_is_done_about_an_order_that_the_venue_knows_nothing_of(
    mode: Any, refuses_expired: bool, after_ms: int, is_exit: bool, decided: str
) -> None:
    there = terms(features=features(mode, refuses_expired=refuses_expired))
    order = an_exit(Book([entered()]), intended_at_ms=NOW, expires_at_ms=NOW + 10_000) if is_exit else ENTRY
    found = unasked(changed(order, state="unknown"), there, now_ms=NOW + after_ms, is_open=not is_exit)
    match found:
        case Send(sent, again=True):
            assert decided == "send"
            assert request_of(sent) == request_of(order), "the same request"
        case Wait(until_ms):
            assert decided == "wait"
            assert until_ms is not None
            assert NOW + after_ms < until_ms <= order.expires_at_ms + 5_000
        case Put(put):
            assert (decided, put.state) == ("expired", "expired")
            assert may_turn_up(put, there) == (not refuses_expired)
        case _:
            pytest.fail(str(found))


def test_an_entry_of_a_signal_that_has_ended_is_never_sent_again() -> None:
    assert isinstance(unasked(changed(ENTRY, state="unknown"), TERMS, now_ms=NOW, is_open=False), Wait)


def test_an_answer_that_took_long_says_nothing_of_what_came_meanwhile() -> None:
    over_ms = ENTRY.expires_at_ms + TERMS.grace_ms
    late = changed(ENTRY, state="unknown")
    assert unasked(late, TERMS, now_ms=over_ms + 90_000, is_open=True, asked_ms=over_ms - 1) == Wait(over_ms + 90_000)
    assert isinstance(unasked(late, TERMS, now_ms=over_ms + 90_000, is_open=True, asked_ms=over_ms), Put)


@pytest.mark.parametrize("left", [0.0, 1.0])
def test_an_exit_is_not_sent_again_where_another_owner_has_closed_by_an_order_of_its_own(left: float) -> None:
    there = terms(features=features("always", refuses_expired=False))
    order = changed(an_exit(Book([entered()])), state="unknown")
    late_ms = order.expires_at_ms + 100_000
    assert unasked(order, there, now_ms=late_ms, is_open=False) == Send(order, again=True)
    found = unasked(order, there, now_ms=late_ms, is_open=False, left=left)
    assert isinstance(found, Put)
    assert found.order.state == "expired"


def test_what_rests_is_cancelled_when_its_time_is_over_or_its_signal_is() -> None:
    resting = changed(ENTRY, state="partial", filled_quantity=0.5)
    assert step(resting) == Ask(resting)
    assert step(resting, now_ms=ENTRY.expires_at_ms) == Cancel(resting)
    assert step(resting, open_id=None) == Cancel(resting)


def test_a_fill_that_comes_after_a_cancellation_is_closed() -> None:
    late = answered(changed(ENTRY, state="cancelled"), report("filled", 2.0))
    closing = step(late, open_id=None, now_ms=NOW + 5)
    assert isinstance(closing, Put)
    assert (closing.order.action, closing.order.quantity, closing.order.side) == ("close", 2.0, "sell")


def test_what_ended_in_doubt_is_looked_at_once_more_when_it_can_no_longer_change() -> None:
    ended = changed(ENTRY, state="cancelled")
    doubtful = {ENTRY.client_order_id: ENTRY.expires_at_ms + 5_000}
    assert step(ended, open_id=None, doubtful=doubtful) == Wait(ENTRY.expires_at_ms + 5_000)
    assert step(ended, open_id=None, doubtful=doubtful, now_ms=ENTRY.expires_at_ms + 5_000) == Ask(ended)
    assert step(ended, open_id=None) == Wait(None)


def test_exits_follow_until_nothing_is_left_each_for_what_is_left() -> None:
    orders = [entered()]
    for filled, left in ((0.5, 2.0), (1.5, 1.5)):
        follow = step(*orders, open_id=None, now_ms=NOW + 60_000)
        assert isinstance(follow, Put)
        assert (follow.order.n, follow.order.quantity) == (len(orders), left)
        orders.append(changed(follow.order, state="cancelled", filled_quantity=filled))
    assert step(*orders, open_id=None, now_ms=NOW + 60_000) == Wait(None)
    assert Book(orders).is_settled(SIGNAL.id)


def test_an_exit_after_a_partial_one_is_for_what_is_left_to_the_last_step() -> None:
    for filled, closed, left in ((0.3, 0.112, 0.188), (0.3, 0.1, 0.2), (1.1, 0.4, 0.7)):
        entry = entered(filled)
        first = an_exit(Book([entry]), state="cancelled", filled_quantity=closed)
        assert an_exit(Book([entry, first])).quantity == left


def test_what_is_left_below_what_the_venue_trades_ends_the_exits() -> None:
    entry = entered()
    leaving = an_exit(Book([entry]))
    ended = answered(leaving, report("rejected", too_small=True))
    assert (ended.state, ended.missing_quantity) == ("rejected", leaving.quantity)
    assert Book([entry, ended]).is_settled(SIGNAL.id)
    assert answered(entry, report("rejected", too_small=True)).missing_quantity == 0, "an entry misses nothing"


def test_a_refused_exit_is_followed_after_a_pause_that_grows() -> None:
    book = Book([entered()])
    pauses = []
    for _ in range(10):
        refused = an_exit(book, state="rejected", intended_at_ms=NOW)
        book.put(refused)
        waiting = next_step(book, None, TERMS, now_ms=NOW, epoch=1)
        assert isinstance(waiting, Wait)
        assert waiting.until_ms is not None
        pauses.append(waiting.until_ms - NOW)
        assert isinstance(next_step(book, None, TERMS, now_ms=waiting.until_ms, epoch=1), Put)
    assert pauses[:4] == [1000, 2000, 4000, 8000]
    assert pauses[-1] == 60_000


def test_an_exit_goes_before_everything_else() -> None:
    other = changed(ENTRY, signal_id="other", client_order_id="hother", intended_at_ms=NOW - 100_000)
    leaving = an_exit(Book([entered()]))
    assert step(other, entered(), leaving, open_id="other", now_ms=NOW + 60_000) == Ask(leaving)


def test_an_account_that_holds_nothing_ends_an_exit_that_was_refused_twice() -> None:
    book = Book([entered()])
    first = an_exit(book, state="rejected")
    book.put(first)
    assert missing(first, book, []) == 0, "once may be the venue's haste"
    second = an_exit(book, state="rejected")
    book.put(second)
    assert missing(second, book, []) == 2.0
    assert missing(second, book, [VenuePosition(symbol="BTCUSDT", side="long", quantity=5.0)]) == 0
    assert missing(second, book, [VenuePosition(symbol="BTCUSDT", side="long", quantity=0.5)]) == 1.5
    assert missing(second, book, [VenuePosition(symbol="BTCUSDT", side="short", quantity=2.0)]) == 2.0
    book.put(changed(second, missing_quantity=2.0))
    assert book.is_settled(SIGNAL.id)


def test_what_others_hold_of_the_symbol_is_taken_off_the_position_that_their_account_nets() -> None:
    book = Book([entered()])
    for _ in range(2):
        order = an_exit(book, state="rejected")
        book.put(order)

    def shown(quantity: float) -> list[VenuePosition]:
        if not quantity:
            return []
        return [VenuePosition(symbol="BTCUSDT", side="long" if quantity > 0 else "short", quantity=abs(quantity))]

    assert missing(order, book, shown(0.0), -2.0) == 0.0, "their short hides it"
    assert missing(order, book, shown(-2.0), -2.0) == 2.0, "all that is there is theirs"
    assert missing(order, book, shown(-1.5), -2.0) == 1.5
    assert missing(order, book, shown(3.0), 3.0) == 2.0, "all that is there is theirs, on the same side"
    assert missing(order, book, shown(5.0), 3.0) == 0.0


def test_what_others_hold_is_what_their_open_signals_do_and_nobody_knows_while_an_order_is_under_way() -> None:
    mine = entered()
    other = changed(mine, context=(*CONTEXT[:2], "other"), client_order_id="hother", signal_id="theirs", side="sell")
    elsewhere_held = changed(other, context=(*CONTEXT[:2], "third"), client_order_id="hthird", signal_id="third")
    far = changed(other, context=(CONTEXT[0], "ETHUSDT", "other"), client_order_id="hfar")
    foreign = changed(other, account="another", client_order_id="hforeign")
    assert elsewhere(mine, [mine, far, foreign], {"theirs", mine.signal_id}) == 0.0
    assert elsewhere(mine, [mine, other, elsewhere_held], {"theirs"}) == -other.filled_quantity
    assert elsewhere(mine, [mine, other], {mine.signal_id}) == 0.0, "what they are closing is theirs no more"
    assert elsewhere(mine, [mine, changed(other, state="partial")], {"theirs"}) is None


@pytest.mark.parametrize(
    ("state", "filled", "reason"),
    [
        ("rejected", 0.0, "order_rejected"), ("expired", 0.0, "order_expired"), ("cancelled", 0.0, "order_cancelled"),
        ("cancelled", 0.5, None), ("filled", 2.0, None), ("open", 0.0, None), ("unknown", 0.0, None),
    ],
)  # fmt: skip
def test_a_signal_goes_when_its_entry_ended_with_nothing(state: OrderState, filled: float, reason: str | None) -> None:
    book = Book([changed(ENTRY, state=state, filled_quantity=filled)])
    assert withdrawal(book, SIGNAL.id) == reason
    assert withdrawal(book, None) is None


def test_old_rows_go_but_none_that_the_venue_took_and_never_the_newest_number() -> None:
    book = Book([entered()])
    states: list[OrderState] = ["rejected", "cancelled", "rejected", "rejected"]
    for n, state in enumerate(states, 1):
        book.put(an_exit(book, state=state, venue_id="v" if n == 3 else "", intended_at_ms=NOW + n))
    new = an_exit(book, intended_at_ms=NOW + 9)
    assert new.n == 5
    first = client_order_id(CONTEXT, SIGNAL.id, "close", 1)
    assert superseded(book, new) == [first]
    assert superseded(book, new, {first}) == [], "the venue is yet to be asked about it once more"


def test_the_orders_of_the_newest_signals_stay() -> None:
    made = [
        changed(ENTRY, signal_id=f"s{n}", client_order_id=f"h{n}", state="rejected", intended_at_ms=NOW + n)
        for n in range(8)
    ]
    assert superseded(Book(made), ENTRY) == ["h0", "h1", "h2"]


# ---------------------------------------------------------------------- all of it together


@settings(deadline=None)
@given(st.data())
def test_whatever_the_venue_answers_what_is_closed_is_what_was_filled(data: st.DataObject) -> None:
    """The rules against a venue that answers anything it may: in the end all that was filled is closed, once."""
    book, unsent = Book([ENTRY]), {ENTRY.client_order_id}
    open_id: str | None = SIGNAL.id
    at_venue: defaultdict[str, float] = defaultdict(float)
    now, asked = NOW, dict[str, int]()
    for turn in range(200):
        known = open_id is not None and book.is_entered(open_id)
        if known and (withdrawal(book, open_id) or turn > 50 or data.draw(st.booleans())):
            open_id = None
        doing = next_step(book, open_id, TERMS, now_ms=now, epoch=1, unsent=unsent, asked=asked)
        if isinstance(doing, Wait):
            if doing.until_ms is None and open_id is None:
                break
            now = doing.until_ms or now + 1000
            continue
        order = doing.order
        if isinstance(doing, Put):
            if order.client_order_id not in book.orders:
                unsent.add(order.client_order_id)
            book.put(order)
            continue
        unsent.discard(order.client_order_id)
        asked[order.client_order_id] = now
        if turn > 100:
            kind = "filled"  # a venue that never fills anything would go on for ever
        else:
            kind = data.draw(st.sampled_from(["filled", "part", "rejected", "open", "lost", "cancelled"]))
        if kind == "lost":
            book.put(changed(order, state="unknown"))
            continue
        more = order.quantity - at_venue[order.client_order_id]
        if kind in ("filled", "part"):
            at_venue[order.client_order_id] += more if kind == "filled" else more / 2
        state = {"part": "partial"}.get(kind, kind)
        if state == "rejected" and at_venue[order.client_order_id]:
            state = "cancelled"
        book.put(answered(order, report(state, at_venue[order.client_order_id])))
    entered_quantity = at_venue[ENTRY.client_order_id]
    closed = sum(filled for name, filled in at_venue.items() if name != ENTRY.client_order_id)
    assert open_id is None
    assert closed == pytest.approx(entered_quantity)
    assert book.unsettled() == []


# ---------------------------------------------------------------------- beside another owner's


def of_epoch(epoch: int, n: int, state: OrderState, **more: Any) -> tuple[Key, Order]:
    """Return an exit of an owner, under its key."""
    name = client_order_id(CONTEXT, SIGNAL.id, "close", n)
    order = changed(an_exit(Book([entered()])), n=n, client_order_id=name, epoch=epoch, state=state, **more)
    return order_key(CONTEXT, name), order


@pytest.mark.parametrize("state", ["intended", "unknown", "sent"])
def test_a_journals_exit_is_over_where_another_owner_has_made_one_of_its_own(state: OrderState) -> None:
    key, kept = of_epoch(1, 2, state)
    theirs, mine = of_epoch(2, 1, "intended"), of_epoch(1, 1, "rejected")
    assert beside_others({key: kept}, dict([mine])) == {key: kept}
    (merged,) = beside_others({key: kept}, dict([theirs])).values()
    assert isinstance(merged, Order)
    assert (merged.state, merged.expires_at_ms) == ("expired", kept.expires_at_ms), "the venue is asked once more"
    filled = of_epoch(1, 2, "filled", filled_quantity=2.0)
    assert beside_others(dict([filled]), dict([theirs])) == dict([filled])


def test_a_journal_deletes_no_exit_that_another_owner_has_made_under_the_same_number() -> None:
    newest = of_epoch(1, 3, "expired")
    for stored, stays in (
        (of_epoch(1, 1, "intended"), False), (of_epoch(1, 1, "expired"), False),
        (of_epoch(2, 1, "rejected"), True), (of_epoch(1, 1, "filled", filled_quantity=2.0), True),
    ):  # fmt: skip
        merged = beside_others({stored[0]: None, newest[0]: newest[1]}, dict([stored]))
        assert (stored[0] not in merged) is stays, stored
        assert newest[0] in merged


def test_an_exit_that_came_to_nothing_and_that_another_owner_has_deleted_stays_deleted() -> None:
    failed, newest = of_epoch(1, 1, "expired"), of_epoch(2, 3, "rejected")
    assert beside_others(dict([failed]), dict([newest])) == {}
    filled = of_epoch(1, 1, "filled", filled_quantity=2.0)
    assert beside_others(dict([filled]), dict([newest])) == dict([filled])
