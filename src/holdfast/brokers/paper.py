"""A broker of a paper venue: real requests to a process that is not the bot's, no money."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
from collections.abc import Sequence

import msgspec

from ..engine.broker import Features, OrderReport, OrderRequest, VenuePosition
from ..errors import HoldfastError, InvalidInputError, UnavailableError, UnknownOutcomeError
from .paper_wire import LONGEST_LINE_BYTES, Ask, Tell

LONGEST_TIMEOUT_SECONDS = 3600.0
ALL = Features(refuses_repeated_ids="always", refuses_expired=True, reduce_only=True)


class PaperBroker:
    """One account at a paper venue (``python -m holdfast.brokers.paper_venue``).

    Args:
        address: ``tcp://host:port``, as the venue printed it.
        key: Stands for an API key; each key is an account of its own.
        features: What the venue was started with; another set is refused at the first request.
        timeout_seconds: After so long an answer counts as lost.
    """

    def __init__(
        self, address: str, *, key: str = "paper", features: Features = ALL, timeout_seconds: float = 5.0
    ) -> None:
        self._where = host_and_port(address)
        if type(key) is not str or not key:
            raise InvalidInputError(f"key is {key!r:.40}: use a text of at least one character")
        if not isinstance(features, Features):
            raise InvalidInputError(f"features are {features!r:.80}: use holdfast.Features(...), or leave them out")
        if type(timeout_seconds) not in (int, float) or not 0 < timeout_seconds <= LONGEST_TIMEOUT_SECONDS:
            raise InvalidInputError(f"timeout_seconds is {timeout_seconds!r:.40}: use more than 0, up to 3600")
        self._account = hashlib.blake2b(key.encode(), digest_size=8).hexdigest()
        self._features, self._timeout_seconds = features, timeout_seconds

    @property
    def account(self) -> str:
        """A fingerprint of the key."""
        return self._account

    @property
    def features(self) -> Features:
        """What the venue promises."""
        return self._features

    async def submit(self, request: OrderRequest) -> OrderReport:
        """Send an order once; as :class:`~holdfast.engine.broker.Broker`."""
        told = await self._ask(Ask(op="submit", request=request), changes=True)
        if told.report is None:
            raise UnknownOutcomeError("the venue answered without a report")
        return told.report

    async def find(self, symbol: str, client_order_id: str) -> OrderReport | None:
        """Return what the venue knows of an order."""
        return (await self._ask(Ask(op="find", symbol=symbol, client_order_id=client_order_id))).report

    async def cancel(self, symbol: str, client_order_id: str) -> OrderReport | None:
        """Ask to cancel an order, and return what then is known of it."""
        ask = Ask(op="cancel", symbol=symbol, client_order_id=client_order_id)
        return (await self._ask(ask, changes=True)).report

    async def open_orders(self, symbol: str | None = None) -> Sequence[OrderReport]:
        """Return what rests."""
        return (await self._ask(Ask(op="open_orders", symbol=symbol))).reports

    async def history(self, symbol: str, since_ms: int) -> Sequence[OrderReport]:
        """Return what the venue took since then."""
        return (await self._ask(Ask(op="history", symbol=symbol, since_ms=since_ms))).reports

    async def positions(self) -> Sequence[VenuePosition]:
        """Return what the account holds."""
        return (await self._ask(Ask(op="positions"))).positions

    async def close(self) -> None:
        """Nothing is held between two requests."""

    async def _ask(self, ask: Ask, *, changes: bool = False) -> Tell:
        """Ask on a connection of its own; ``changes``: without an answer it is not known whether it was done."""
        ask.account, ask.features, ask.sender = self._account, self._features, os.getpid()
        try:
            async with asyncio.timeout(self._timeout_seconds):
                reader, writer = await asyncio.open_connection(*self._where, limit=LONGEST_LINE_BYTES)
        except (OSError, TimeoutError) as error:
            raise UnavailableError(f"the paper venue cannot be reached: {error!r:.120}") from error
        lost: type[HoldfastError] = UnknownOutcomeError if changes else UnavailableError
        try:
            async with asyncio.timeout(self._timeout_seconds):
                writer.write(msgspec.json.encode(ask) + b"\n")
                line = await reader.readline()
        except (OSError, TimeoutError) as error:
            raise lost(f"the paper venue gave no answer: {error!r:.120}") from error
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
        if not line.endswith(b"\n"):
            raise lost("the paper venue gave no answer: the connection was lost")
        try:
            told = msgspec.json.decode(line, type=Tell)
        except msgspec.MsgspecError as error:
            raise InvalidInputError(f"at {self._where} is no paper venue: it answered {line[:60]!r}") from error
        if told.error:
            raise InvalidInputError(told.error)
        return told


def host_and_port(address: object) -> tuple[str, int]:
    """Return where ``tcp://host:port`` is; port 0 lets the system choose one.

    Raises:
        InvalidInputError: It is no such address.
    """
    host, colon, port = str(address).removeprefix("tcp://").rpartition(":")
    if type(address) is not str or not (colon and host and port.isascii() and port.isdigit() and int(port) < 2**16):
        raise InvalidInputError(f"{address!r:.120} is no address of a paper venue: use tcp://host:port")
    return host.strip("[]"), int(port)
