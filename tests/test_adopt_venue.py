"""A position that nobody here opened: it is adopted with the venue's word for it, and its exit is sent there, once."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fakes import flat, memory_store, signal_row, sound
from order_kit import CONTEXT, Desk, features, orders_in
from test_recovery_venue import gap_run, left, planned, words

from holdfast.backends.file import FileBackend
from holdfast.brokers.paper import PaperBroker
from holdfast.brokers.paper_venue import VenueProcess
from holdfast.cli import main
from holdfast.contract import Survives
from holdfast.domains import context_key
from holdfast.engine import registry
from holdfast.engine.broker import OrderRequest
from holdfast.engine.hands import Hands
from holdfast.engine.holdings import Holdings
from holdfast.errors import HeldError, HoldfastError, InvalidInputError, NotFoundError, UnavailableError
from holdfast.names import Context
from holdfast.rows import Order
from holdfast.rules.params import reset_config
from holdfast.store import Store

T0 = 1_704_067_200_000
NAME = "paper/BTCUSDT/watcher"
FAR_MS = 4_000_000_000_000
BOT = """
from pathlib import Path
from holdfast import add_exchange, add_strategy
from holdfast.brokers.paper import PaperBroker
from holdfast.market.protocol import MarketEnded

T0 = 1_704_067_200_000

class Past:
    async def get_candles(self, symbol, interval, since_ms, limit):
        opens = [T0 + n * 60_000 for n in range(-40, 60)]
        return [(at, 43000, 43000, 41900 if at == T0 + 20 * 60_000 else 43000, 43000, 1) for at in opens
                if at >= since_ms][:limit]

    async def wait_closed(self, participant, after_ms):
        if after_ms is not None:
            raise MarketEnded("that was all")
        return T0 + int(Path("minute").read_text()) * 60_000

add_exchange(Past(), exchange_name="paper", broker=PaperBroker("ADDRESS", key="KEY"))

@add_strategy(strategy_name="watcher", interval="1m", symbols=("BTCUSDT",))
def watcher(symbol, when_ms):
    return None
"""
POSITION = ("--position", "long", "--open", "43000", "--take-profit", "44000", "--stop-loss", "42000",
            "--minutes", "600", "--at", str(T0 + 10 * 60_000))  # fmt: skip


@pytest.fixture(scope="module")
def venue() -> Iterator[VenueProcess]:
    with VenueProcess() as process:
        yield process


@pytest.fixture
def key(venue: VenueProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An account of its own that holds a long of 3, and a bot that was there before and holds nothing."""
    monkeypatch.chdir(tmp_path)
    name = tmp_path.name
    Path("bot.py").write_text(BOT.replace("ADDRESS", venue.address).replace("KEY", name))
    clock(5)
    assert call("run", "bot.py", "--store", "data", "--plain") == 0
    asyncio.run(venue.broker(name).submit(bought(3.0, "byhand")))
    yield name
    registry.reset()
    reset_config()


def bought(quantity: float, name: str, symbol: str = "BTCUSDT") -> OrderRequest:
    return OrderRequest(
        symbol=symbol, client_order_id=name, side="buy", quantity=quantity, expires_at_ms=FAR_MS, reference_price=43000
    )


def clock(minute: int) -> None:
    Path("minute").write_text(str(minute))


def call(*arguments: str) -> int:
    registry.reset()
    return main(list(arguments))


def answer(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    capsys.readouterr()
    assert call(*arguments, "--json") == 0
    return json.loads(capsys.readouterr().out)


def held(venue: VenueProcess, key: str) -> dict[str, float]:
    return {one.side: one.quantity for one in venue.witness(key).positions}


def verdicts(capsys: pytest.CaptureFixture[str]) -> list[tuple[str, str]]:
    (told,) = answer(capsys, "recover", "bot.py", "--store", "data", "--plan")["contexts"]
    return [(one["what"], one["word"]) for one in told["venue"]]


def sold(venue: VenueProcess, key: str) -> list[tuple[float, bool]]:
    return [(one.filled_quantity, one.reduce_only) for one in venue.witness(key).orders if one.side == "sell"]


def test_a_foreign_position_is_planned_adopted_watched_and_closed_once(
    venue: VenueProcess, key: str, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    assert verdicts(capsys) == [("position", "foreign_at_venue")]
    done = answer(capsys, "adopt", NAME, *POSITION, "--bot", "bot.py", "--store", "data", "--why", "bought by hand")
    assert done["event"]["kind"] == "opened"
    (order,) = answer(capsys, "show", "data")["contexts"][0]["orders"]
    assert (order["state"], order["filledQuantity"], order["adopted"]) == ("filled", 3.0, True)
    assert verdicts(capsys) == [], "it is nobody else's any more"
    assert call("adopt", NAME, *POSITION, "--bot", "bot.py", "--store", "data") == 2
    assert "is there already" in capsys.readouterr().err
    clock(15)
    assert call("run", "bot.py", "--store", "data", "--plain") == 0
    assert (held(venue, key), sold(venue, key)) == ({"long": 3.0}, [])
    clock(30)
    assert call("run", "bot.py", "--store", "data", "--plain") == 0
    assert (held(venue, key), sold(venue, key)) == ({}, [(3.0, True)])
    (trade,) = answer(capsys, "show", "data")["trades"]
    assert (trade["reason"], trade["closedAt"]) == ("stop_loss", T0 + 21 * 60_000)
    clock(40)
    assert call("run", "bot.py", "--store", "data", "--plain") == 0
    assert call("check", "data") == 0
    assert sold(venue, key) == [(3.0, True)]
    assert verdicts(capsys) == []
    (audit,) = answer(capsys, "show", "data", "--audit")["audit"]
    assert (audit["action"], audit["why"]) == ("adopt", "bought by hand")
    assert any(name.startswith("order/") for name in audit["after"]), "the order is on the record"


def test_a_signal_without_an_order_is_told_of_and_gets_one(
    venue: VenueProcess, key: str, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    assert call("adopt", NAME, *POSITION, "--store", "data") == 0, "as it was before there was a broker"
    assert verdicts(capsys) == [("position", "without_order"), ("position", "foreign_at_venue")]
    clock(15)
    assert call("run", "bot.py", "--store", "data", "--plain") == 0
    assert "has no order" in "".join(capsys.readouterr())
    done = answer(capsys, "adopt", NAME, "--at-venue", "--bot", "bot.py", "--quantity", "2", "--store", "data")
    assert done["event"] is None
    assert verdicts(capsys) == [("position", "foreign_at_venue")], "one of the three is still nobody's"
    assert call("adopt", NAME, "--at-venue", "--bot", "bot.py", "--store", "data") == 2
    assert "has its order" in capsys.readouterr().err
    clock(30)
    assert call("recover", "bot.py", "--store", "data") == 0
    assert (held(venue, key), sold(venue, key)) == ({"long": 1.0}, [(2.0, True)])
    assert call("check", "data") == 0


WRONG: list[tuple[tuple[str, ...], str]] = [
    ((*POSITION[:1], "short", *POSITION[2:4], "--take-profit", "42000", "--stop-loss", "44000", *POSITION[8:]),
     "holds no short BTCUSDT that no order tells of: it shows long 3"),
    ((*POSITION, "--quantity", "4"), "holds long 3 that no order tells of"),
    ((*POSITION, "--quantity", "0"), "give a quantity above 0"),
    ((*POSITION, "--quantity", "nan"), "give a quantity above 0"),
    (("--at-venue",), "nothing is open"),
    (("--at-venue", *POSITION), "open here already"),
    ((*POSITION, "--without-order", "--quantity", "1"), "asks no venue"),
    (("--without-order",), "of which position?"),
    (("--quantity", "1"), "of which position?"),
]  # fmt: skip


def test_what_cannot_be_adopted_is_one_line_and_changes_nothing(
    venue: VenueProcess, key: str, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    before = answer(capsys, "show", "data")
    for arguments, expected in WRONG:
        assert call("adopt", NAME, *arguments, "--bot", "bot.py", "--store", "data") == 2, arguments
        lines = [line for line in capsys.readouterr().err.splitlines() if " lies on " not in line]
        assert len(lines) == 1 and expected in lines[0], (arguments, lines)
    for arguments, expected in (
        (("--at-venue",), "give --bot"), ((*POSITION, "--quantity", "1"), "give --bot"),
    ):  # fmt: skip
        assert call("adopt", NAME, *arguments, "--store", "data") == 2
        assert expected in capsys.readouterr().err
    assert answer(capsys, "show", "data") == before
    assert answer(capsys, "show", "data", "--audit")["audit"] == []


def test_where_orders_are_stored_a_position_without_one_is_asked_for(
    venue: VenueProcess, key: str, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    assert call("adopt", NAME, *POSITION, "--bot", "bot.py", "--store", "data") == 0
    other = ("adopt", "paper/ETHUSDT/watcher", *POSITION, "--store", "data")
    assert call(*other) == 2
    assert "is traded with a broker: give --bot" in capsys.readouterr().err
    assert call(*other, "--without-order") == 0


def test_nobody_adopts_while_an_order_of_the_symbol_is_under_way(
    venue: VenueProcess, key: str, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    """Its fill could be what the venue shows."""

    async def under_way() -> None:
        store = Store(FileBackend(Path("data")), require=Survives.NOTHING)
        await store.open()
        context = Context("paper", "BTCUSDT", "another")
        order = Order(
            client_order_id="a", context=("paper", "BTCUSDT", "another"), account=venue.broker(key).account,
            signal_id="s", action="open", side="buy", quantity=3.0, state="intended", epoch=1, intended_at_ms=1,
            expires_at_ms=2,
        )  # fmt: skip
        order_key = context_key("session", context)._replace(domain="order", entity_id="a")
        await store.writer("test").commit({order_key: order})
        await store.close()

    asyncio.run(under_way())
    assert call("adopt", NAME, *POSITION, "--bot", "bot.py", "--store", "data") == 3
    assert "paper/BTCUSDT/another: an order of BTCUSDT is under way" in capsys.readouterr().err


# ---------------------------------------------------------------------- in one process


def hands(desk: Desk, store: Store) -> tuple[Hands, Holdings]:
    exchange = desk.bot.registry.exchange(desk.bot.exchange)
    holdings = Holdings(
        store, desk.broker, desk.bot.exchange, format_quantity=exchange.format_quantity, operator="me@here",
        clock=desk.time, sleep=desk.time.sleep,
    )  # fmt: skip
    return Hands(store, operator="me@here", clock=desk.time, sleep=desk.time.sleep), holdings


@pytest.mark.parametrize("side", ["long", "short"])
async def test_what_the_bot_itself_holds_there_is_not_adopted(side: str) -> None:
    desk, store = Desk(candles=flat(43000, -10, 9)), await memory_store()
    await left(desk, store)
    hand, holdings = hands(desk, store)
    other = Context(CONTEXT.exchange_name, CONTEXT.symbol, "other")
    row = signal_row(position=side)
    with pytest.raises(InvalidInputError, match=f"holds no {side} BTCUSDT that no order tells of: it shows long 2"):
        await holdings.foreign(other, row.position)
    desk.broker.book.submit(bought(1.5, "byhand"))
    if side == "long":
        assert (await holdings.foreign(other, "long")).quantity == 1.5
    with pytest.raises(InvalidInputError, match="is there already"):
        await hand.take_over(CONTEXT, signal_row(), holdings=holdings)


async def test_what_is_held_under_another_exchange_name_of_the_same_account_is_not_adopted() -> None:
    desk, store = Desk(candles=flat(43000, -10, 9)), await memory_store()
    await left(desk, store)
    _, holdings = hands(desk, store)
    with pytest.raises(InvalidInputError, match="the orders come to long 2"):
        await holdings.foreign(Context("alias", CONTEXT.symbol, "other"), "long")


async def test_a_fill_that_comes_while_the_venue_is_asked_is_not_taken_for_a_foreign_position() -> None:
    desk, store = Desk(candles=flat(43000, -10, 9)), await memory_store()
    _, holdings = hands(desk, store)
    asked = desk.broker.positions

    async def meanwhile() -> Any:
        desk.broker.positions = asked  # type: ignore[method-assign]
        await left(desk, store)
        return await asked()

    desk.broker.positions = meanwhile  # type: ignore[method-assign]
    with pytest.raises(UnavailableError, match="is under way"):
        await holdings.foreign(CONTEXT, "long")


async def test_of_two_operators_at_one_account_the_first_gives_way() -> None:
    desk, store = Desk(candles=flat(43000, -10, 9)), await memory_store()
    desk.broker.book.submit(bought(3.0, "byhand"))
    (_, first), (_, second) = hands(desk, store), hands(desk, store)
    asked = desk.broker.positions

    async def meanwhile() -> Any:
        desk.broker.positions = asked  # type: ignore[method-assign]
        await second.foreign(CONTEXT, "long")
        return await asked()

    desk.broker.positions = meanwhile  # type: ignore[method-assign]
    with pytest.raises(HoldfastError, match="acts on the whole of it now"):
        await first.foreign(CONTEXT, "long")


async def test_another_scope_of_the_store_cannot_adopt_from_the_account() -> None:
    desk, store = Desk(candles=flat(43000, -10, 9)), await memory_store()
    await left(desk, store)
    other = Store(store.home.backend, scope="other", require=Survives.NOTHING)
    await store.close()
    await other.open()
    _, holdings = hands(desk, other)
    with pytest.raises(HeldError, match="'main'"):
        await holdings.foreign(CONTEXT, "long")
    await other.close()


@pytest.mark.parametrize("repeated", ["always", "while_open", "never"])
async def test_an_adopted_order_is_asked_about_at_no_venue(repeated: Any) -> None:
    desk, store = Desk({}, candles=flat(43000, -10, 9), promised=features(repeated)), await memory_store()
    desk.broker.book.submit(bought(3.0, "byhand"))
    hand, holdings = hands(desk, store)
    await hand.take_over(CONTEXT, signal_row(minutes=5), holdings=holdings)
    assert words((await planned(desk, store)).venue) == []
    desk.broker.calls.clear()
    done = await gap_run(desk, store).recover(CONTEXT)
    assert [(event.kind, event.reason) for event in done.events] == [("closed", "time_expired")]
    assert desk.broker.held_quantity == 0
    adopted = (await orders_in(store)).entry("stored-1")
    assert adopted is not None and adopted.adopted
    assert adopted.client_order_id not in [request.client_order_id for request in desk.broker.sent]
    await sound(store)
    with pytest.raises(NotFoundError, match="nothing is open"):
        await hand.adopt_at_venue(CONTEXT, holdings)


async def test_what_was_adopted_and_closed_by_hand_is_closed_at_the_venue_by_the_next_run() -> None:
    desk, store = Desk({}, candles=flat(43000, -10, 9)), await memory_store()
    desk.broker.book.submit(bought(3.0, "byhand"))
    hand, holdings = hands(desk, store)
    await hand.take_over(CONTEXT, signal_row(), holdings=holdings)
    await hand.close(CONTEXT, 43100)
    assert desk.broker.held_quantity == 3.0
    await desk.live(store)
    assert [(one.side, one.quantity, one.reduce_only) for one in desk.broker.sent] == [("sell", 3.0, True)]
    assert desk.broker.held_quantity == 0
    with pytest.raises(InvalidInputError, match="used before"):
        await hand.take_over(CONTEXT, signal_row(), holdings=holdings)
    await sound(store)


def test_killed_at_each_step_of_adopting_and_of_the_run_that_follows_it_is_closed_once(record_property: Any) -> None:
    """Odd steps lie before a call, even ones after it: what is durable differs only there."""
    words = [sys.executable, str(Path(__file__).parent / "adopt_kills.py"), "--part", "1/2"]
    ended = subprocess.run(words, capture_output=True, timeout=240, check=False)
    found = json.loads(ended.stdout)
    record_property("proof:adopted positions", {"SIGKILLs of operator and bot": found["kills"]})
    assert found["wrong"] == [], ended.stderr
    assert found["kills"] >= 30


def test_the_paper_broker_of_a_key_is_an_account_of_its_own(venue: VenueProcess) -> None:
    assert PaperBroker(venue.address, key="a").account != PaperBroker(venue.address, key="b").account
