"""A replayed market: in this process, or served by a process of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import msgspec

from ..errors import InvalidInputError, UnavailableError
from ..rules.candles import Candle
from .history import History
from .pace import Pace
from .protocol import MarketEnded
from .wire import LONGEST_LINE_BYTES, Answer, Info, Request, split_address


def _plain(number: float) -> str:
    """Return ``number`` with at most eight decimals and no exponent."""
    text = f"{number:.8f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text


class LocalMarket:
    """A replayed market in this process: a history seen at the present of a pace. An exchange.

    Args:
        history: The candles.
        pace: The clock: :class:`~holdfast.market.pace.RunningPace` or ``WaitingPace``.
    """

    def __init__(self, history: History, pace: Pace) -> None:
        self.history = history
        self.pace = pace

    async def get_candles(self, symbol: str, interval: str, since_ms: int, limit: int) -> Sequence[Candle]:
        """As :class:`~holdfast.market.protocol.Exchange`; nothing that has not closed yet is returned."""
        return self.history.candles(symbol, interval, since_ms, limit, closed_ms=self.pace.present_ms)

    async def wait_closed(self, participant: str, after_ms: int | None) -> int:
        """As :class:`~holdfast.market.protocol.WaitingExchange`."""
        return await self.pace.wait_closed(participant, after_ms)

    def format_price(self, symbol: str, price: float) -> str:
        """Return the price with at most eight decimals."""
        return _plain(price)

    def format_quantity(self, symbol: str, quantity: float) -> str:
        """Return the quantity with at most eight decimals."""
        return _plain(quantity)


class _Connection:
    """One connection to a server; requests overlap on it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._pending: dict[int, asyncio.Future[Answer]] = {}
        self._number = 0
        self.loop = asyncio.get_running_loop()
        self.lost = False
        self._task = self.loop.create_task(self._read(), name="market connection")

    async def ask(self, request: Request) -> Answer:
        """Send and await the answer; ConnectionError when the connection is lost first."""
        if self.lost:
            raise ConnectionError("the connection is lost")
        self._number += 1
        request.id = number = self._number
        future: asyncio.Future[Answer] = self.loop.create_future()
        self._pending[number] = future
        try:
            self._writer.write(msgspec.json.encode(request) + b"\n")
            return await future
        except asyncio.CancelledError:
            # The server must not count this wait any more.
            if not self.lost:
                self._writer.write(msgspec.json.encode(Request(id=0, op="cancel", cancel=number)) + b"\n")
            raise
        finally:
            self._pending.pop(number, None)

    async def _read(self) -> None:
        decoder = msgspec.json.Decoder(Answer)
        try:
            while line := await self._reader.readline():
                answer = decoder.decode(line)
                future = self._pending.get(answer.id)
                if future is not None and not future.done():
                    future.set_result(answer)
        except (OSError, ValueError, msgspec.MsgspecError):
            pass  # told to every waiting request below
        finally:
            self.lost = True
            for future in self._pending.values():
                if not future.done():
                    future.set_exception(ConnectionError("the connection was lost"))
            self._writer.close()

    async def close(self) -> None:
        """End the connection and its task."""
        self._task.cancel()
        await asyncio.wait([self._task])
        try:
            await self._writer.wait_closed()
        except OSError:
            pass  # it was broken already: closed all the same


class ReplayMarket:
    """Client of a replay server; an exchange. A lost connection is made again, with bounded tries.

    Args:
        address: ``tcp://host:port`` or ``unix:/path``, as the server printed it.
        tries: How often a request is tried before it fails.
        delay_seconds: Pause after the first failure; it doubles with each further one.
        sleep: Waits so many seconds.
    """

    def __init__(
        self,
        address: str,
        *,
        tries: int = 6,
        delay_seconds: float = 0.05,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
    ) -> None:
        self._where = split_address(address)
        if tries < 1:
            raise InvalidInputError(f"tries is {tries}: at least 1 is needed")
        self.address = address
        self._tries, self._delay_seconds, self._sleep = tries, delay_seconds, sleep
        self._connection: _Connection | None = None
        self._connecting: asyncio.Task[_Connection] | None = None

    async def info(self) -> Info:
        """Ask what the server serves."""
        answer = await self._ask(Request(id=0, op="info"))
        assert answer.info is not None
        return answer.info

    async def get_candles(self, symbol: str, interval: str, since_ms: int, limit: int) -> Sequence[Candle]:
        """As :class:`~holdfast.market.protocol.Exchange`; nothing that has not closed yet is returned.

        Raises:
            InvalidInputError: The server knows no such symbol or interval, or the limit is over 10,000.
            UnavailableError: The server cannot be reached.
        """
        answer = await self._ask(
            Request(id=0, op="candles", symbol=symbol, interval=interval, since=int(since_ms), limit=limit)
        )
        return answer.candles or []

    async def wait_closed(self, participant: str, after_ms: int | None) -> int:
        """As :class:`~holdfast.market.protocol.WaitingExchange`.

        Raises:
            MarketEnded: There will be no newer minute.
            UnavailableError: The server cannot be reached.
        """
        answer = await self._ask(Request(id=0, op="wait", participant=participant, after=after_ms))
        assert answer.present is not None
        return answer.present

    async def leave(self, participant: str) -> None:
        """Tell a waiting market not to wait for ``participant`` any more."""
        await self._ask(Request(id=0, op="leave", participant=participant))

    def format_price(self, symbol: str, price: float) -> str:
        """Return the price with at most eight decimals."""
        return _plain(price)

    def format_quantity(self, symbol: str, quantity: float) -> str:
        """Return the quantity with at most eight decimals."""
        return _plain(quantity)

    async def close(self) -> None:
        """End the connection. A later request makes a new one."""
        connection, self._connection = self._connection, None
        if connection is not None and connection.loop is asyncio.get_running_loop():
            await connection.close()

    async def _ask(self, request: Request) -> Answer:
        delay_seconds = self._delay_seconds
        for left in range(self._tries - 1, -1, -1):
            try:
                connection = await self._connected()
                # Every request may be repeated: it changes nothing that a repetition would change again.
                answer = await connection.ask(request)
                break
            except OSError as error:
                if not left:
                    raise UnavailableError(
                        f"the market at {self.address} cannot be reached ({error}): is its server running?"
                    ) from error
            await self._sleep(delay_seconds)
            delay_seconds *= 2
        if answer.error == "ended":
            raise MarketEnded(answer.message)
        if answer.error:
            raise InvalidInputError(answer.message)
        return answer

    async def _connected(self) -> _Connection:
        loop = asyncio.get_running_loop()
        if self._connection is not None and not self._connection.lost and self._connection.loop is loop:
            return self._connection
        # Requests that come together share one attempt; a cancelled one must not cancel it for the others.
        if self._connecting is None or self._connecting.done() or self._connecting.get_loop() is not loop:
            self._connecting = loop.create_task(self._connect())
            # Where everybody who asked was cancelled meanwhile, nobody else looks at its failure.
            self._connecting.add_done_callback(lambda task: task.cancelled() or task.exception())
        return await asyncio.shield(self._connecting)

    async def _connect(self) -> _Connection:
        if isinstance(self._where, str):
            reader, writer = await asyncio.open_unix_connection(self._where, limit=LONGEST_LINE_BYTES)
        else:
            reader, writer = await asyncio.open_connection(*self._where, limit=LONGEST_LINE_BYTES)
        self._connection = _Connection(reader, writer)
        return self._connection
