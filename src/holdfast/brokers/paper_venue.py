"""A paper venue as a process of its own: ``python -m holdfast.brokers.paper_venue``. It outlives the bots it serves.

Prints one JSON line with its address when it can be reached, and ends when its standard input closes. What it holds
is in its memory; faults are switched on by a request, see :class:`~holdfast.brokers.paper_wire.Faults`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import select
import socket
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Sequence
from typing import cast

import msgspec

from ..arguments import Parser
from ..engine.broker import Features
from ..errors import HoldfastError, InvalidInputError, UnavailableError
from ..stdin import until_stdin_closes
from .paper import ALL, PaperBroker, host_and_port
from .paper_book import PaperBook, cancelled, submitted
from .paper_wire import ON_CANCEL, Ask, Books, Fault, Faults, Heard, Tell, check_faults

_MOST_HEARD = 20_000
"""So many submissions are remembered, the newest."""


class PaperVenue:
    """Serves the books of any number of accounts.

    Args:
        features: What every account promises.
    """

    def __init__(self, features: Features) -> None:
        self.features = features
        self._books: dict[str, PaperBook] = {}
        self._faults, self._chance = Faults(), random.Random(0)
        self._down_until = 0.0
        self._late: set[asyncio.Task[None]] = set()
        self._lost: Counter[str] = Counter()
        """Of each account: requests that were lost or late, or their answers."""
        self._heard: deque[Heard] = deque(maxlen=_MOST_HEARD)

    def book(self, account: str) -> PaperBook:
        """Return the books of an account."""
        if account not in self._books:
            self._books[account] = PaperBook(self.features, lambda: time.time_ns() // 1_000_000)
        return self._books[account]

    async def greet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one request, as far as the faults let it."""
        with contextlib.suppress(OSError, ValueError, msgspec.MsgspecError):
            line = await reader.readline()
            if line and time.monotonic() >= self._down_until:
                told = await self._answer(msgspec.json.decode(line, type=Ask))
                if told is not None:
                    writer.write(msgspec.json.encode(told) + b"\n")
                    await writer.drain()
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()

    async def close(self) -> None:
        """Forget what is still on its way."""
        for task in self._late:
            task.cancel()
        await asyncio.gather(*self._late, return_exceptions=True)

    async def _answer(self, ask: Ask) -> Tell | None:
        if ask.features is not None and ask.features != self.features:
            return Tell(error=f"this venue was started with {self.features}, and the broker was told {ask.features}")
        if ask.op in ("submit", "cancel"):
            return await self._faulty(ask)
        book = self.book(ask.account)
        match ask.op:
            case "find":
                return Tell(report=book.find(ask.client_order_id))
            case "open_orders":
                return Tell(reports=book.open_orders(ask.symbol))
            case "history":
                return Tell(reports=book.history(ask.symbol or "", ask.since_ms))
            case "positions":
                return Tell(positions=book.positions())
            case "fill":
                return Tell(report=book.fill(ask.client_order_id, ask.quantity))
            case "price":
                for one in [*self._books.values(), book]:
                    one.set_price(ask.symbol or "", ask.price)
            case "faults":
                self._faults = ask.faults or Faults()
                self._chance = random.Random(self._faults.seed)
                self._down_until = time.monotonic() + self._faults.down_seconds
            case "heard":
                heard = list(self._heard)
                self._heard.clear()
                return Tell(heard=heard)
            case "witness":
                return Tell(
                    books={
                        name: Books(
                            orders=[o.report() for o in b.orders],
                            positions=b.positions(),
                            refused=b.refused,
                            lost=self._lost[name],
                        )
                        for name, b in self._books.items()
                    }
                )
        return Tell()

    def _next_fault(self, op: str) -> Fault:
        listed = self._faults.next if op == "submit" else self._faults.next_cancel
        if listed:
            return listed.pop(0)
        drawn = self._chance.random()
        for fault, chance in self._faults.chances.items():
            if (fault in ON_CANCEL) if op == "cancel" else not fault.startswith("fill_"):
                if drawn < chance:
                    return cast("Fault", fault)
                drawn -= chance
        return ""

    async def _faulty(self, ask: Ask) -> Tell | None:
        fault = self._next_fault(ask.op)
        self._lost[ask.account] += fault in ("lost_answer", "lost_request", "late")
        if fault == "lost_request":
            return None
        if fault == "late":
            task = asyncio.get_running_loop().create_task(self._later(ask))
            self._late.add(task)
            task.add_done_callback(self._late.discard)
            return None
        if fault == "slow":
            await asyncio.sleep(self._faults.delay_seconds)
        told = self._do(ask, fault)
        if fault == "twice":
            self._do(ask, "")
        return None if fault == "lost_answer" else told

    async def _later(self, ask: Ask) -> None:
        await asyncio.sleep(self._faults.delay_seconds)
        self._do(ask, "")

    def _do(self, ask: Ask, fault: Fault) -> Tell:
        book = self.book(ask.account)
        if ask.op == "cancel":
            return Tell(report=cancelled(book, ask.client_order_id, fault))
        if ask.request is None:
            return Tell(error="a submission without a request")
        report = submitted(book, ask.request, fault, self._faults.part)
        heard = Heard(
            at_seconds=time.monotonic(), at_ms=time.time_ns() // 1_000_000, sender=ask.sender, account=ask.account,
            request=ask.request, report=report,
        )  # fmt: skip
        self._heard.append(heard)
        return Tell(report=report)


class VenueProcess:
    """Starts a venue and waits until it can be reached. A context manager; blocking, so start it outside the loop.

    Args:
        features: What it promises.

    Attributes:
        address: ``tcp://host:port``.
    """

    def __init__(self, features: Features | None = None) -> None:
        self.features = features or ALL
        command = [sys.executable, "-m", "holdfast.brokers.paper_venue"]
        command += ["--features", msgspec.json.encode(self.features).decode()]
        # A session of its own: Ctrl-C in the terminal is for the bot, whose venue must be there when it ends.
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )  # fmt: skip
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], 30.0)[0]:
            self.close()
            raise UnavailableError("the paper venue was not ready within 30 s")
        line = self._process.stdout.readline()
        if not line:
            self.close()
            raise UnavailableError("the paper venue ended at once: see its standard error")
        self.address: str = json.loads(line)["address"]

    def broker(self, key: str = "paper") -> PaperBroker:
        """Return a broker for the account of an API key."""
        return PaperBroker(self.address, key=key, features=self.features)

    def ask(self, ask: Ask) -> Tell:
        """Ask it something, without an event loop: to set faults and prices, or to hear the witness."""
        where = host_and_port(self.address)
        with socket.create_connection(where, timeout=30) as connection, connection.makefile("rwb") as file:
            file.write(msgspec.json.encode(ask) + b"\n")
            file.flush()
            return msgspec.json.decode(file.readline(), type=Tell)

    def set_faults(self, faults: Faults) -> None:
        """Replace the faults.

        Raises:
            InvalidInputError: One of them is not known; nothing was changed.
        """
        check_faults(faults)
        self.ask(Ask(op="faults", faults=faults))

    def witness(self, key: str = "paper") -> Books:
        """Return what the venue knows of an account."""
        none = Books(orders=[], positions=[], refused={})
        return self.ask(Ask(op="witness")).books.get(PaperBroker(self.address, key=key).account, none)

    def heard(self) -> list[Heard]:
        """Return every submission that reached it since the last time, oldest first."""
        return self.ask(Ask(op="heard")).heard

    def close(self) -> None:
        """End it and wait for its end. Repeatable."""
        process = self._process
        if process.stdin is not None and not process.stdin.closed:
            process.stdin.close()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()

    def __enter__(self) -> VenueProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


async def _serve(venue: PaperVenue, host: str, port: int, linger: bool) -> None:
    server = await asyncio.start_server(venue.greet, host, port)
    try:
        found = server.sockets[0].getsockname()
        sys.stdout.write(json.dumps({"address": f"tcp://{found[0]}:{found[1]}"}) + "\n")
        sys.stdout.flush()
        if linger:
            await asyncio.Event().wait()
        await until_stdin_closes()
    finally:
        server.close()
        await venue.close()


def _features(text: str) -> Features:
    try:
        return msgspec.json.decode(text, type=Features)
    except msgspec.MsgspecError as error:
        raise InvalidInputError(f"--features {text!r:.200}: {error}") from error


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until standard input closes, or it is interrupted; 2 for a mistake in the arguments."""
    parser = Parser(prog="python -m holdfast.brokers.paper_venue", description=__doc__)
    parser.add_argument("--listen", default="tcp://127.0.0.1:0", metavar="HOST:PORT")
    parser.add_argument("--features", default="", metavar="JSON", help="what it promises; see holdfast.Features")
    parser.add_argument("--linger", action="store_true", help="go on after standard input is closed")
    options = parser.parse_args(argv)
    try:
        features = _features(options.features) if options.features else ALL
        host, port = host_and_port(options.listen)
        asyncio.run(_serve(PaperVenue(features), host, port, options.linger))
    except HoldfastError as error:
        print(f"holdfast paper venue: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"holdfast paper venue: cannot listen at {options.listen}: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 0
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
