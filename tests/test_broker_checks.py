"""A broker that is none is refused where it is added; a strange answer of one is an unknown outcome."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest
from fakes import Bot, FakeMarket, candle, flat, memory_store
from order_kit import BookBroker, Desk, Time, features

from holdfast.brokers.paper import PaperBroker
from holdfast.brokers.paper_venue import VenueProcess, main
from holdfast.brokers.paper_wire import Faults
from holdfast.engine.broker import OrderReport, OrderRequest
from holdfast.engine.modes import TroublePolicy
from holdfast.engine.registry import Registry
from holdfast.errors import InvalidInputError


class NotAsync(BookBroker):
    def positions(self) -> Any:
        return []


def less(**of_it: Any) -> BookBroker:
    """Return a broker with something else in place of what it should have."""
    broker = BookBroker(Time(), features())
    for name, value in of_it.items():
        setattr(broker, name, value)
    return broker


@pytest.mark.parametrize(
    ("broker", "words"),
    [
        (object(), "lacks submit, find, cancel, open_orders, history, positions, close, account, features"),
        (BookBroker, "is the class BookBroker: make one"),
        (NotAsync(Time(), features()), "positions must be `async def`"),
        (less(account=""), "its account is '': use a text"),
        (less(features=None), "its features are None: use holdfast.Features"),
    ],
)
def test_what_is_no_broker_is_refused_when_it_is_added(broker: Any, words: str) -> None:
    market = FakeMarket({"BTCUSDT": flat(43000, -10, 0)})
    registry = Registry()
    with pytest.raises(InvalidInputError, match=words):
        registry.add_exchange(market, exchange_name="paper", broker=broker)
    assert registry.list_exchanges() == []


class Forgetful(BookBroker):
    """Sends, and forgets to say what came of it."""

    async def submit(self, request: OrderRequest) -> OrderReport:
        await super().submit(request)
        return None  # type: ignore[return-value]

    async def history(self, symbol: str, since_ms: int) -> Sequence[OrderReport]:
        return None  # type: ignore[return-value]


async def test_an_answer_that_is_none_leaves_the_outcome_unknown_and_the_venue_is_asked() -> None:
    desk = Desk()
    desk.broker = Forgetful(desk.time, None)
    desk.market.broker = desk.broker  # type: ignore[attr-defined]
    store = await memory_store()
    session = await desk.session(store)
    again = session.step(candle(0, 43000))
    assert again is not None
    await again
    assert session.executor is not None and session.state.signal is not None
    await asyncio.wait_for(session.executor.entered(), 30)
    assert session.executor.book.position(session.state.signal.id) == 2 == desk.broker.held_quantity
    assert session.owner is not None, "it goes on"
    await session.close()
    await store.close()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"address": None}, "None is no address"),
        ({"address": 12}, "12 is no address"),
        ({"address": "tcp://127.0.0.1:99999"}, "is no address"),
        ({"key": None}, "key is None"),
        ({"key": ""}, "key is ''"),
        ({"features": {}}, "features are {}"),
        ({"timeout_seconds": -1}, "timeout_seconds is -1"),
        ({"timeout_seconds": float("nan")}, "timeout_seconds is nan"),
    ],
)
def test_a_paper_broker_refuses_what_cannot_be(given: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidInputError, match=words):
        PaperBroker(**{"address": "tcp://127.0.0.1:1", **given})


async def test_another_server_at_the_address_is_no_paper_venue() -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        writer.write(b"HTTP/1.1 400 Bad Request\n")
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    with pytest.raises(InvalidInputError, match=r"is no paper venue: it answered b'HTTP/1.1"):
        await PaperBroker(f"tcp://127.0.0.1:{port}").positions()
    server.close()
    await server.wait_closed()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--listen", "foo"], "'foo' is no address of a paper venue"),
        (["--features", "{}"], "--features '{}': Object missing required field"),
        (["--listen", "192.0.2.1:9"], "cannot listen at 192.0.2.1:9"),
    ],
)
def test_a_venue_says_in_one_line_what_is_wrong(
    words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and told in printed.err and len(printed.err.splitlines()) == 1


def test_a_venue_without_a_standard_input_ends_in_order_and_lingers_if_told_to() -> None:
    command = [sys.executable, "-m", "holdfast.brokers.paper_venue"]
    ended = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False, timeout=60)
    assert (ended.returncode, ended.stderr) == (0, b"")
    with subprocess.Popen(
        [*command, "--linger"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
    ) as venue:  # fmt: skip
        try:
            assert venue.stdout is not None
            assert b"tcp://127.0.0.1:" in venue.stdout.readline()
            assert venue.poll() is None
        finally:
            venue.terminate()


def test_a_fault_that_no_venue_has_is_refused() -> None:
    with VenueProcess() as venue:
        with pytest.raises(InvalidInputError, match="there is no fault 'foo': use one of lost_answer"):
            venue.set_faults(Faults(next=["foo"]))  # type: ignore[list-item]
        with pytest.raises(InvalidInputError, match="together at most 1"):
            venue.set_faults(Faults(chances={"slow": 0.7, "late": 0.7}))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"store": "sqlite:x.db"}, "store is 'sqlite:x.db': open one"),
        ({"on_trouble": {"emergency": "x"}}, "on_trouble is .*: use holdfast.TroublePolicy"),
    ],
)
def test_a_run_refuses_what_is_no_store_or_policy(given: dict[str, Any], words: str) -> None:
    bot = Bot(FakeMarket({"BTCUSDT": flat(43000, -10, 0)}), {})
    with pytest.raises(InvalidInputError, match=words):
        bot.run(given.pop("store", None), **given)


@pytest.mark.parametrize("lease", ["x", True, None])
async def test_a_lease_that_is_no_number_is_refused(lease: Any, tmp_path: Any) -> None:
    bot = Bot(FakeMarket({"BTCUSDT": flat(43000, -10, 0)}), {})
    store = await memory_store()
    with pytest.raises(InvalidInputError, match="lease_seconds is"):
        await anext(bot.run(store, lease_seconds=lease))
    await store.close()


def test_a_word_is_no_answer_to_whether_exits_outlive_the_lease() -> None:
    with pytest.raises(InvalidInputError, match="exit_without_lease is 'no': use True or False"):
        TroublePolicy(exit_without_lease="no")  # type: ignore[arg-type]
