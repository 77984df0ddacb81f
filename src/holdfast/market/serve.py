"""The replay server: ``python -m holdfast.market.serve``. Prints one JSON line when it can be reached.

It ends when its standard input is closed, so that it never outlives the program
that started it; ``--linger`` keeps it until it is stopped.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from ..arguments import Parser
from ..errors import HoldfastError, InvalidInputError
from ..stdin import until_stdin_closes
from .candles_file import read_history
from .history import History
from .pace import Pace, RunningPace, WaitingPace
from .protocol import MINUTE_MS, MarketEnded
from .replay import LocalMarket
from .synthetic import DEFAULT_START_MS, SyntheticMarket
from .wire import Answer, Info, Ready, Request

HISTORY_MINUTES = 60
"""Minutes of candles before the first present one, so that a strategy has something to look at."""

_LONGEST_REQUEST_BYTES = 64 * 1024


class MarketServer:
    """Serves a market to any number of clients.

    Args:
        market: What is served.
        info: What ``info`` answers.
    """

    def __init__(self, market: LocalMarket, info: Info) -> None:
        self._market, self.info = market, info
        self._server: asyncio.Server | None = None
        self._clients: dict[asyncio.StreamWriter, asyncio.Task[None]] = {}
        self._socket: Path | None = None

    async def start(self, listen: str) -> str:
        """Begin to listen, and return the address for clients.

        Args:
            listen: ``host:port`` (port 0 chooses a free one) or ``unix:/path``.

        Raises:
            InvalidInputError: The address cannot be used.
        """
        try:
            if listen.startswith("unix:"):
                self._socket = Path(listen[5:])
                self._server = await asyncio.start_unix_server(self._greet, self._socket, limit=_LONGEST_REQUEST_BYTES)
                return listen
            host, _, port = listen.removeprefix("tcp://").rpartition(":")
            self._server = await asyncio.start_server(
                self._greet, host.strip("[]"), int(port), limit=_LONGEST_REQUEST_BYTES
            )
        except (OSError, ValueError, OverflowError) as error:
            raise InvalidInputError(f"cannot listen on {listen!r:.120}: {error}") from error
        name = self._server.sockets[0].getsockname()
        return f"tcp://{f'[{name[0]}]' if ':' in name[0] else name[0]}:{name[1]}"

    async def close(self) -> None:
        """Stop listening and let every client go."""
        if self._server is not None:
            self._server.close()
        for writer in list(self._clients):
            writer.close()
        if self._clients:
            await asyncio.wait(list(self._clients.values()))
        if self._server is not None:
            await self._server.wait_closed()
        if self._socket is not None:
            self._socket.unlink(missing_ok=True)

    async def _greet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._clients[writer] = task
        waits: dict[int, asyncio.Task[None]] = {}
        decoder = msgspec.json.Decoder(Request)
        try:
            while line := await reader.readline():
                await self._answer(decoder.decode(line), writer, waits)
        except (OSError, ValueError, msgspec.MsgspecError):
            pass  # killed in the middle of a line, or no client of ours: it is let go below
        finally:
            for wait in waits.values():
                wait.cancel()
            if waits:
                await asyncio.wait(list(waits.values()))
            del self._clients[writer]
            writer.close()
            try:
                await writer.wait_closed()
            except OSError:
                pass  # the client is gone

    async def _answer(
        self, request: Request, writer: asyncio.StreamWriter, waits: dict[int, asyncio.Task[None]]
    ) -> None:
        answer = Answer(request.id)
        if request.op == "wait":
            task = asyncio.get_running_loop().create_task(self._wait(request, writer))
            waits[request.id] = task
            task.add_done_callback(lambda _: waits.pop(request.id, None))
            return
        if request.op == "cancel":
            if (wait := waits.get(request.cancel)) is not None:
                wait.cancel()
            return
        if request.op == "info":
            answer.info = self.info
        elif request.op == "leave":
            self._market.pace.leave(request.participant)
        else:
            try:
                found = await self._market.get_candles(request.symbol, request.interval, request.since, request.limit)
                answer.candles = list(found)
            except InvalidInputError as error:
                answer.error, answer.message = "input", str(error)
        writer.write(msgspec.json.encode(answer) + b"\n")
        await writer.drain()

    async def _wait(self, request: Request, writer: asyncio.StreamWriter) -> None:
        answer = Answer(request.id)
        try:
            answer.present = await self._market.wait_closed(request.participant, request.after)
        except MarketEnded as error:
            answer.error, answer.message = "ended", str(error)
        writer.write(msgspec.json.encode(answer) + b"\n")


def _parser() -> Parser:
    parser = Parser(prog="python -m holdfast.market.serve", description=__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--synthetic", type=int, metavar="SEED", help="serve a generated market")
    source.add_argument("--candles", metavar="FILE[,FILE…]", help="serve candle files (SYMBOL=FILE names one)")
    parser.add_argument("--symbols", default="", metavar="A,B", help="symbols to generate, or one for each file")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--speed", type=float, metavar="N", help="a clock nobody can stop, N times real time")
    mode.add_argument("--wait", type=int, metavar="N", help="advance when N participants wait for the next candle")
    parser.add_argument("--listen", default="127.0.0.1:0", metavar="ADDRESS", help="host:port or unix:/path")
    parser.add_argument("--start", default="", metavar="TIME", help="first present minute: epoch ms or ISO, UTC")
    parser.add_argument(
        "--resume", type=int, default=0, metavar="MS", help="go on at this minute, where it is later than the first"
    )
    parser.add_argument("--minutes", type=int, metavar="N", help="how long the market goes on")
    parser.add_argument("--linger", action="store_true", help="go on after standard input is closed")
    return parser


def moment_ms(text: str) -> int:
    """Return epoch milliseconds of a whole minute: ``1640995200000`` or ``2022-01-01T00:00`` (UTC unless it says).

    Raises:
        InvalidInputError: It is neither, or not a whole minute.
    """
    try:
        if text.isascii() and text.isdigit():
            ms = int(text)
        else:
            moment = datetime.fromisoformat(text)
            ms = round((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() * 1000)
    except (ValueError, OverflowError) as error:
        raise InvalidInputError(f"{text!r:.60} is no time: write epoch milliseconds or 2022-01-01T00:00") from error
    if ms % MINUTE_MS:
        raise InvalidInputError(f"{text!r:.60} is not a whole minute")
    return ms


def _iso(ms: int) -> str:
    return datetime.fromtimestamp(ms / 1000, UTC).strftime("%Y-%m-%d %H:%M")


def build_market(
    *,
    synthetic: int | None = None,
    candles: Sequence[str] = (),
    symbols: Sequence[str] = (),
    speed: float | None = None,
    wait: int | None = None,
    start: str = "",
    resume_ms: int = 0,
    minutes: int | None = None,
) -> tuple[LocalMarket, Info]:
    """Make the market that the server's options describe.

    Args:
        resume_ms: The first present minute, where it is later than ``start``. The candles are those of the market
            that began at ``start``, so that one which was left goes on, and is not another.

    Raises:
        InvalidInputError: An option or a file is bad.
    """
    if minutes is not None and minutes < 1:
        raise InvalidInputError(f"--minutes is {minutes}: at least 1 is needed")
    history: History
    if synthetic is not None:
        first_ms = moment_ms(start) if start else DEFAULT_START_MS
        begin_ms = max(first_ms, resume_ms - resume_ms % MINUTE_MS)
        length = (begin_ms - first_ms) // MINUTE_MS + (7 * 1440 if minutes is None else minutes)
        names = {"symbols": symbols} if symbols else {}
        history = SyntheticMarket(
            synthetic, start_ms=first_ms - HISTORY_MINUTES * MINUTE_MS, minutes=HISTORY_MINUTES + length + 1, **names
        )
        end_ms = history.last_ms
    else:
        history = read_history(candles, symbols)
        spare = (history.last_ms - history.first_ms) // MINUTE_MS // 2
        begin_ms = moment_ms(start) if start else history.first_ms + min(HISTORY_MINUTES, spare) * MINUTE_MS
        if not history.first_ms <= begin_ms <= history.last_ms:
            raise InvalidInputError(
                f"--start {start} is outside the candles, which go from {history.first_ms} to {history.last_ms}"
            )
        if resume_ms > history.last_ms:
            raise InvalidInputError(
                f"the store has decided up to {_iso(resume_ms)}, and these candles end at {_iso(history.last_ms)}: "
                "give later candles, or another --store"
            )
        begin_ms = max(begin_ms, resume_ms - resume_ms % MINUTE_MS)
        end_ms = history.last_ms if minutes is None else min(history.last_ms, begin_ms + minutes * MINUTE_MS)
    pace: Pace
    if wait is not None:
        pace, mode = WaitingPace(begin_ms, end_ms, participants=wait), f"wait {wait}"
    else:
        pace, mode = RunningPace(begin_ms, end_ms, speed=60.0 if speed is None else speed), f"speed {speed or 60:g}"
    info = Info(
        symbols=list(history.symbols), start_ms=begin_ms, end_ms=end_ms, synthetic=synthetic is not None, mode=mode
    )
    return LocalMarket(history, pace), info


async def _serve(server: MarketServer, listen: str, linger: bool) -> None:
    address = await server.start(listen)
    try:
        sys.stdout.write(msgspec.json.encode(Ready(address, server.info)).decode() + "\n")
        sys.stdout.flush()
        if linger:
            await asyncio.Event().wait()
        await until_stdin_closes()
    finally:
        await server.close()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the server until its standard input closes, or it is interrupted."""
    options = _parser().parse_args(argv)
    try:
        market, info = build_market(
            synthetic=options.synthetic,
            candles=options.candles.split(",") if options.candles else (),
            symbols=[name for name in options.symbols.split(",") if name],
            speed=options.speed,
            wait=options.wait,
            start=options.start,
            resume_ms=options.resume,
            minutes=options.minutes,
        )
        asyncio.run(_serve(MarketServer(market, info), options.listen, options.linger))
    except HoldfastError as error:
        print(f"holdfast market: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 0
    except BrokenPipeError:
        return 0  # whoever started it is gone
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
