"""The replay server and its client: both modes, killed clients, lost servers."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from holdfast.errors import InvalidInputError, UnavailableError
from holdfast.market import serve
from holdfast.market.process import MarketProcess
from holdfast.market.protocol import MarketEnded, WaitingExchange
from holdfast.market.replay import ReplayMarket
from holdfast.market.wire import split_address

M = 60_000
T0 = 1_704_067_200_000


@asynccontextmanager
async def served(
    *, wait: int | None = 1, minutes: int = 30, listen: str = "127.0.0.1:0"
) -> AsyncIterator[tuple[ReplayMarket, serve.MarketServer]]:
    market, info = serve.build_market(synthetic=7, symbols=["A", "B"], wait=wait, minutes=minutes, speed=None)
    server = serve.MarketServer(market, info)
    client = ReplayMarket(await server.start(listen), tries=2, delay_seconds=0.001)
    try:
        yield client, server
    finally:
        await client.close()
        await server.close()


async def settle(client: ReplayMarket) -> None:
    """Let everything that is under way arrive: an answered question has overtaken nothing on its connection."""
    for _ in range(3):
        await client.info()


async def test_a_client_is_an_exchange_and_shows_the_present_only(tmp_path: Path) -> None:
    async with served(listen=f"unix:{tmp_path}/market") as (client, _):
        assert isinstance(client, WaitingExchange)
        info = await client.info()
        assert (info.symbols, info.start_ms, info.end_ms, info.synthetic) == (["A", "B"], T0, T0 + 30 * M, True)
        candles = await client.get_candles("A", "1m", T0 - 3 * M, 50)
        assert [c.open_time_ms for c in candles] == [T0 - 3 * M, T0 - 2 * M, T0 - M, T0]
        assert await client.wait_closed("x", T0) == T0 + M
        five = await client.get_candles("A", "5m", T0 - 60 * M, 50)
        assert five[-1].open_time_ms == T0 - 5 * M
        with pytest.raises(InvalidInputError, match="no symbol 'C'"):
            await client.get_candles("C", "1m", T0, 1)
        assert client.format_price("A", 1.10) == "1.1"


async def test_overlapping_requests_share_one_connection_and_answers_may_cross() -> None:
    async with served(wait=2) as (client, _):
        first = asyncio.create_task(client.wait_closed("x", T0))
        many = await asyncio.gather(*(client.get_candles("B", "1m", T0 - M, 2) for _ in range(20)))
        assert len({tuple(map(tuple, got)) for got in many}) == 1
        assert not first.done()
        assert await client.wait_closed("y", T0) == T0 + M
        assert await first == T0 + M


async def test_a_cancelled_wait_is_forgotten_by_the_server() -> None:
    async with served(wait=2) as (client, _):
        gone = asyncio.create_task(client.wait_closed("x", T0))
        await settle(client)
        gone.cancel()
        await settle(client)
        other = asyncio.create_task(client.wait_closed("y", T0))
        await settle(client)
        assert not other.done()
        await client.leave("x")
        assert await other == T0 + M


async def test_the_end_of_the_market_is_told_to_everybody() -> None:
    async with served(wait=2, minutes=1) as (client, _):
        both = await asyncio.gather(client.wait_closed("x", T0), client.wait_closed("y", T0))
        assert set(both) == {T0 + M}
        ends = await asyncio.gather(
            client.wait_closed("x", T0 + M), client.wait_closed("y", T0 + M), return_exceptions=True
        )
        assert [type(end) for end in ends] == [MarketEnded, MarketEnded]


async def test_nonsense_from_a_client_ends_that_client_only() -> None:
    async with served() as (client, _):
        where = split_address(client.address)
        assert isinstance(where, tuple)
        for nonsense in (b"\x00\xff\n", b'{"id":1}\n', b'{"id":1,"op":"fly"}\n', b"x" * 200_000, b'{"id":1,"op":'):
            reader, writer = await asyncio.open_connection(*where)
            writer.write(nonsense)
            writer.write_eof()
            try:
                assert await reader.read() == b""
            except ConnectionError:
                pass  # reset, because more was sent than was read
            writer.close()
        assert await client.wait_closed("x", T0) == T0 + M


async def test_a_lost_server_is_found_again_or_given_up_after_bounded_tries(tmp_path: Path) -> None:
    listen = f"unix:{tmp_path}/market"
    async with served(listen=listen) as (client, server):
        await client.info()
        await server.close()
        with pytest.raises(UnavailableError, match="cannot be reached"):
            await client.wait_closed("x", T0)
        async with served(listen=listen):
            assert await client.wait_closed("x", T0) == T0 + M


@pytest.mark.parametrize("address", ["", "tcp://", "localhost", "tcp://a:b", "unix:", "tcp://a:99999"])
def test_a_wrong_address_is_refused(address: str) -> None:
    with pytest.raises(InvalidInputError, match="no market address"):
        ReplayMarket(address)


CLIENT = """
import asyncio, sys
from holdfast.market.replay import ReplayMarket
async def main():
    market = ReplayMarket(sys.argv[1])
    present = await market.wait_closed("bot", None)
    print(present, flush=True)
    for _ in range(3):
        present = await market.wait_closed("bot", present)
        print(present, flush=True)
    await market.wait_closed("bot", present)
asyncio.run(main())
"""


async def test_a_killed_client_finds_the_candle_at_which_it_was_killed() -> None:
    """Killed in the middle of its wait, while another participant does not let the market go on."""
    with MarketProcess(["--synthetic", "7", "--wait", "2", "--minutes", "500"]) as market:
        watcher = ReplayMarket(market.address)
        at_ms = market.info.start_ms
        for _ in range(2):
            bot = await asyncio.create_subprocess_exec(
                sys.executable, "-c", CLIENT, market.address, stdout=asyncio.subprocess.PIPE
            )
            assert bot.stdout is not None
            assert int(await bot.stdout.readline()) == at_ms
            for _ in range(3):
                assert await watcher.wait_closed("watcher", at_ms) == at_ms + M
                at_ms += M
                assert int(await bot.stdout.readline()) == at_ms
            bot.kill()
            await bot.wait()
            # Its wait is forgotten: the market stands still for a watcher that would go on.
            waiting = asyncio.create_task(watcher.wait_closed("watcher", at_ms))
            for _ in range(20):
                await watcher.info()
            assert not waiting.done()
            waiting.cancel()
            await asyncio.wait([waiting])
        await watcher.close()


async def test_a_clock_at_speed_goes_on_without_its_clients() -> None:
    with MarketProcess(["--synthetic", "7", "--symbols", "A", "--speed", "30000", "--minutes", "100"]) as market:
        assert market.info.mode == "speed 30000"
        client = ReplayMarket(market.address)
        first_ms = await client.wait_closed("x", None)
        assert first_ms == market.info.start_ms
        await client.close()
        seen_ms = first_ms
        while seen_ms < first_ms + 5 * M:  # nobody is connected in between
            seen_ms = await client.wait_closed("x", None)
            await client.close()
        with pytest.raises(MarketEnded):
            while True:
                seen_ms = await client.wait_closed("x", seen_ms)
        assert seen_ms == market.info.end_ms
        await client.close()


async def test_the_server_serves_candle_files_from_a_given_minute(tmp_path: Path) -> None:
    for name in "AB":
        rows = "".join(f"{T0 + at * M},1,2,0.5,1,{at}\n" for at in range(300) if at != 101)
        (tmp_path / f"{name}.csv").write_text(rows)
    files = f"{tmp_path}/A.csv,ETH={tmp_path}/B.csv"
    with MarketProcess(["--candles", files, "--wait", "1", "--start", "2024-01-01T01:40", "--minutes", "9"]) as market:
        assert (market.info.symbols, market.info.synthetic) == (["A", "ETH"], False)
        assert (market.info.start_ms, market.info.end_ms) == (T0 + 100 * M, T0 + 109 * M)
        client = ReplayMarket(market.address)
        assert await client.wait_closed("x", T0 + 100 * M) == T0 + 101 * M  # the minute passes, without a candle
        assert [c.volume for c in await client.get_candles("ETH", "1m", T0 + 99 * M, 9)] == [99, 100]
        await client.close()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--candles", "/nowhere/x.csv"], "cannot be read"),
        (["--synthetic", "1", "--minutes", "0"], "--minutes is 0"),
        (["--synthetic", "1", "--start", "soon"], "is no time"),
        (["--synthetic", "1", "--wait", "0"], "at least 1 participant"),
        (["--synthetic", "1", "--listen", "nowhere"], "cannot listen on"),
    ],
)
def test_a_refused_market_is_one_line_and_exit_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert serve.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_refused_market_reaches_whoever_started_it() -> None:
    with pytest.raises(InvalidInputError, match=r"^/nowhere/x\.csv: cannot be read"):
        MarketProcess(["--candles", "/nowhere/x.csv"])


def test_the_server_ends_with_the_program_that_started_it() -> None:
    """Its parent is killed outright; the closed standard input ends the server."""
    code = (
        "import os, sys\n"
        "from holdfast.market.process import MarketProcess\n"
        "market = MarketProcess(['--synthetic', '1', '--minutes', '9'])\n"
        "print(market.pid, flush=True)\n"
        "sys.stdin.read()\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert parent.stdin is not None and parent.stdout is not None
    server = int(parent.stdout.readline())
    watch = os.pidfd_open(server)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    import select

    assert select.select([watch], [], [], 20)[0], "the server is still there"
    os.close(watch)
    parent.stdin.close()
    parent.stdout.close()


def test_without_an_open_standard_input_the_server_lingers_only_when_told() -> None:
    command = [sys.executable, "-m", "holdfast.market.serve", "--synthetic", "1", "--minutes", "9"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=30, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert json.loads(done.stdout)["address"].startswith("tcp://127.0.0.1:")
    with subprocess.Popen([*command, "--linger"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as lingering:
        assert lingering.stdout is not None
        address = json.loads(lingering.stdout.readline())["address"]

        async def ask() -> int:
            client = ReplayMarket(address)
            present = await client.wait_closed("x", None)
            await client.close()
            return present

        assert asyncio.run(ask()) == T0
        lingering.terminate()
