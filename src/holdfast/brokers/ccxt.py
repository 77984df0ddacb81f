"""Any exchange of the ``ccxt`` package as a broker. An extra: ``pip install 'holdfast[ccxt]'``.

What a venue promises is known for those in :data:`~holdfast.brokers.ccxt_words.VENUES`; of any other nothing is
assumed, unless you say so (``features=``).
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from decimal import Decimal
from typing import Any

import msgspec

from ..cancellation import no_stray_cancellation
from ..engine.broker import Features, OrderReport, OrderRequest, VenuePosition
from ..errors import HoldfastError, InvalidInputError, UnavailableError
from ..rules.contracts import amount_of, quantity_in, unit_of
from .ccxt_markets import Markets, is_too_small
from .ccxt_pause import Pause
from .ccxt_words import (
    UNKNOWN_VENUE,
    VENUES,
    Venue,
    as_ours,
    id_length,
    meaning_of,
    only_json,
    report_of,
    report_on,
    what_was_said,
)

_log = logging.getLogger("holdfast.ccxt")
_log.setLevel(logging.INFO)
_CLOCK_SECONDS = 3600.0
_PAGE = 500
_MAX_PAGES = 200
_FUTURES = frozenset(("future", "swap", "linear"))
_ABOUT = 1.05
"""Venues measure the worth of an order by a price of their own, such as the average of some minutes."""
TOO_SMALL = "it is less than the venue trades, and stays in the account"
_ENDED = frozenset(("filled", "cancelled", "rejected", "expired"))
# Bounded where an exchange cannot be asked by client order id: how far back its history is looked through.
_LOOK_BACK_MS = 7 * 86_400_000


class CcxtBroker:
    """Adapts an exchange object of ``ccxt.async_support``; see :class:`~holdfast.engine.broker.Broker`.

    ccxt keeps the rate limits (``enableRateLimit``); its own repeats of failed requests are off.

    Args:
        client: The exchange with its ``apiKey`` and ``secret``; :meth:`close` closes it.
        quote: What a spot account pays with: not a position, and what the other currencies are traded against.
        symbols: As your strategies write them; reports name them so. Others are named as the exchange does.
        features: What the venue promises, if you know better than the table.
        now: Seconds since the epoch.
        elapsed: Seconds by a clock that never goes back.

    Example::

        broker = CcxtBroker.named("binance", api_key=key, secret=secret)
    """

    def __init__(
        self,
        client: Any,
        *,
        quote: str = "USDT",
        symbols: Iterable[str] = (),
        features: Features | None = None,
        now: Callable[[], float] = time.time,
        elapsed: Callable[[], float] = time.monotonic,
    ) -> None:
        key = getattr(client, "apiKey", None)
        if not key or not isinstance(key, str):
            raise InvalidInputError("the exchange has no apiKey: a broker needs an account to trade on")
        self.client = client
        self._account = hashlib.sha256(key.encode()).hexdigest()[:16]
        self._secrets = tuple(text for name in _SECRETS if (text := str(getattr(client, name, None) or "")))
        self._venue = _venue_of(client)
        promised = features or self._venue.features
        self._reduces = promised.reduce_only or bool(client.has.get("createReduceOnlyOrder"))
        """Whether an order of contracts can be told to close only."""
        self._is_told = features is not None or self._venue is not UNKNOWN_VENUE
        """Whether somebody has said what the venue promises."""
        length = id_length(str(client.id), promised.id_length, is_spot=self._is_spot())
        reduces = self._reduces or self._is_spot()
        self._features = msgspec.structs.replace(promised, reduce_only=reduces, id_length=length)
        self._quote = quote
        self._markets = Markets(client, symbols)
        self._now = now
        self._loading: asyncio.Lock | None = None
        self._loaded = False
        self._clock_until_s = 0.0  # until when the difference of the clocks is taken to hold
        client.options["warnOnFetchOpenOrdersWithoutSymbol"] = False  # or to ask for all is an error
        # ccxt would repeat a failed request by itself where the client is set so: what comes after a lost answer is
        # not its to decide. As a parameter of each request it goes to some venues as one of the order's.
        client.options["maxRetriesOnFailure"] = 0
        client.fetch = only_json(client.fetch)
        self._pause = Pause(client, elapsed)
        client.logger = _log  # ccxt's own tells the headers, where the key is, to whoever listens at DEBUG

    @classmethod
    def named(cls, exchange_id: str, *, api_key: str, secret: str, password: str = "", **options: Any) -> CcxtBroker:
        """Make the broker for the exchange that ccxt calls ``exchange_id``.

        Args:
            password: The third part of the key, at exchanges that have one.
            options: ccxt's own, and ``quote``, ``symbols``, ``features`` as for the class.

        Raises:
            InvalidInputError: ccxt is not installed, or knows no such exchange.
        """
        try:
            module = importlib.import_module("ccxt.async_support")
        except ImportError as error:
            raise InvalidInputError("this broker needs ccxt: pip install 'holdfast[ccxt]'") from error
        kind = getattr(module, exchange_id, None)
        if not isinstance(kind, type) or exchange_id not in getattr(module, "exchanges", ()):
            raise InvalidInputError(f"ccxt knows no exchange {exchange_id!r:.60}: see ccxt.exchanges")
        ours = {
            name: options.pop(name) for name in ("quote", "symbols", "features", "now", "elapsed") if name in options
        }
        keys = {"apiKey": api_key, "secret": secret, "password": password or None}
        made = kind({"enableRateLimit": True, **options, **keys})
        made.options = {**made.options, **_venue_of(made).options, **options.get("options", {})}
        return cls(made, **ours)

    def __repr__(self) -> str:
        return f"CcxtBroker({getattr(self.client, 'id', '?')!r}, account={self._account!r})"

    @property
    def account(self) -> str:
        """The beginning of the SHA-256 of the API key, in hexadecimal digits."""
        return self._account

    @property
    def features(self) -> Features:
        """What the venue promises; nothing, for one that the table does not know."""
        return self._features

    async def submit(self, request: OrderRequest) -> OrderReport:
        """Send an order once; as :class:`~holdfast.engine.broker.Broker`.

        Where the venue looks at a request's time, it is told to refuse it from ``expires_at_ms`` on (sooner, where
        its longest window is shorter), however long ccxt's rate limit held it back.
        """
        market = await self._market(request.symbol)
        self._require_reducible(market)
        unified, unit = str(market["symbol"]), unit_of(market)
        now_ms = int(self._now() * 1000)
        left_ms = request.expires_at_ms - now_ms
        if left_ms <= 0:
            return self._refused(request, "expired", "not sent: its time had passed")
        if closes(request) and is_too_small(self.client, market, amount_of(request.quantity, unit)):
            return self._refused(request, "rejected", f"not sent: {TOO_SMALL}", too_small=True)
        quantity = await self._sellable(request, market)
        if quantity <= 0:
            return self._refused(request, "rejected", "not sent: a spot account sells what it holds, and no more")
        try:
            with no_stray_cancellation:
                kind = "market" if request.price is None else "limit"
                order = await self.client.create_order(
                    unified, kind, request.side, amount_of(quantity, unit), self._price(request),
                    self._parameters(request, now_ms, left_ms, bool(market.get("contract"))),
                )  # fmt: skip
            return report_on(order, request.symbol, request.client_order_id, unit)
        except Exception as error:
            report = self._answer_to(request, error)
        if (
            closes(request)
            and report.state == "rejected"
            and not report.repeated
            and await self._is_cheap(market, request)
        ):
            return msgspec.structs.replace(report, too_small=True, note=f"{report.note}; {TOO_SMALL}")
        return report

    async def find(self, symbol: str, client_order_id: str) -> OrderReport | None:
        """Return what the venue knows of an order; as :class:`~holdfast.engine.broker.Broker`.

        An exchange that cannot be asked by client order id is looked through: what is open, then a week of history.
        """
        if self._venue.by_client_id:
            return await self._one(symbol, "", client_order_id)
        since_ms = int(self._now() * 1000) - _LOOK_BACK_MS
        known = [*await self.open_orders(symbol), *reversed(await self.history(symbol, since_ms))]
        return next((one for one in known if one.client_order_id == client_order_id), None)

    async def find_numbered(self, symbol: str, venue_id: str, client_order_id: str) -> OrderReport | None:
        """Return what the venue knows of an order that it has given a number; as :class:`~.broker.Numbered`."""
        if self._venue.by_client_id or not self._has("fetchOrder"):
            return await self.find(symbol, client_order_id)
        return await self._one(symbol, venue_id, client_order_id)

    async def cancel(self, symbol: str, client_order_id: str) -> OrderReport | None:
        """Ask to cancel an order; as :class:`~holdfast.engine.broker.Broker`."""
        if self._venue.by_client_id:
            return await self._cancelled(symbol, "", client_order_id)
        found = await self.find(symbol, client_order_id)
        if found is None or found.state in _ENDED:
            return found
        return await self._cancelled(symbol, found.venue_id, client_order_id)

    async def cancel_numbered(self, symbol: str, venue_id: str, client_order_id: str) -> OrderReport | None:
        """Ask to cancel an order that the venue has given a number; as :class:`~.broker.Numbered`."""
        return await self._cancelled(symbol, "" if self._venue.by_client_id else venue_id, client_order_id)

    async def _one(self, symbol: str, venue_id: str, client_order_id: str) -> OrderReport | None:
        """Ask for one order: by the venue's number of it, or without one by ours."""
        market = await self._market(symbol)
        parameters = {} if venue_id else {"clientOrderId": client_order_id}
        try:
            with no_stray_cancellation:
                order = await self.client.fetch_order(venue_id, market["symbol"], parameters)
            if venue_id and str(order.get("id")) != venue_id:
                raise ValueError("the answer is not about the order that was asked for")
            return report_on(order, symbol, client_order_id, unit_of(market))
        except Exception as error:
            if meaning_of(error) == "missing":
                return None
            raise self._raised(error, changing=False) from None

    async def _cancelled(self, symbol: str, venue_id: str, client_order_id: str) -> OrderReport | None:
        market = await self._market(symbol)
        parameters = {} if venue_id else {"clientOrderId": client_order_id}
        try:
            with no_stray_cancellation:
                order = await self.client.cancel_order(venue_id, market["symbol"], parameters)
            report = report_of(order, symbol, client_order_id, unit_of(market))
        except Exception as error:
            # A cancellation that is refused has come too late, or there is no such order: only asking tells.
            if meaning_of(error) not in ("missing", "rejected"):
                raise self._raised(error, changing=True) from None
        else:
            if report.state in _ENDED:
                return report
        return (
            await self.find_numbered(symbol, venue_id, client_order_id)
            if venue_id
            else await self.find(symbol, client_order_id)
        )

    async def open_orders(self, symbol: str | None = None) -> Sequence[OrderReport]:
        """Return the orders that rest at the venue; as :class:`~holdfast.engine.broker.Broker`."""
        unified = None if symbol is None else (await self._market(symbol))["symbol"]
        await self._ready()
        return self._reports(await self._asked(self.client.fetch_open_orders, unified), symbol)

    async def history(self, symbol: str, since_ms: int) -> Sequence[OrderReport]:
        """Return the orders of a symbol from ``since_ms`` on; as :class:`~holdfast.engine.broker.Broker`."""
        unified = str((await self._market(symbol))["symbol"])
        kinds = ("fetch_orders",) if self._has("fetchOrders") else ("fetch_closed_orders", "fetch_canceled_orders")
        asks = [getattr(self.client, kind) for kind in kinds if self._has(_camel(kind))]
        if not asks:
            raise InvalidInputError(f"ccxt cannot ask {getattr(self.client, 'id', '?')!r} for the history of orders")
        found: dict[str, Mapping[str, Any]] = {}
        for ask in asks:
            async for order in self._pages(ask, unified, since_ms):
                found[str(order.get("id"))] = order
        if kinds != ("fetch_orders",):
            for order in await self._asked(self.client.fetch_open_orders, unified):
                found[str(order.get("id"))] = order
        listed = sorted(found.values(), key=lambda order: (order.get("timestamp") or 0, str(order.get("id"))))
        return self._reports([order for order in listed if (order.get("timestamp") or since_ms) >= since_ms], symbol)

    async def positions(self) -> Sequence[VenuePosition]:
        """Return what the account holds: of a spot account each currency but the one that it pays with."""
        await self._ready()
        if self._has("fetchPositions") and not self._is_spot():
            return [one for row in await self._asked(self.client.fetch_positions) if (one := self._position(row))]
        totals = await self._balance("total")
        held = {name: float(total) for name, total in totals.items() if name != self._quote and total}
        return [
            VenuePosition(symbol=self._markets.spelt(f"{name}/{self._quote}", name), side="long", quantity=total)
            for name, total in sorted(held.items())
            if total > 0
        ]

    async def holding(self, symbol: str) -> Sequence[VenuePosition] | None:
        """Return what the account holds of one market, whichever kind it is of; as :class:`~.broker.Holds`."""
        market = await self._market(symbol)
        self._require_reducible(market)
        if market.get("contract"):
            if not self._has("fetchPositions"):
                return None
            unified = market["symbol"]
            rows = await self._asked(self.client.fetch_positions, [unified])
            found = [self._position(row, symbol) for row in rows if row.get("symbol") == unified]
            return [one for one in found if one is not None]
        total = float((await self._balance("total")).get(market["base"]) or 0)
        return [VenuePosition(symbol=symbol, side="long", quantity=total)] if total > 0 else []

    async def close(self) -> None:
        """Close the client's connections. Repeatable."""
        try:
            await self.client.close()
        except Exception as error:
            raise self._raised(error, changing=False) from None

    async def _sellable(self, request: OrderRequest, market: Mapping[str, Any]) -> float:
        """Return how much of an order is sent: of a spot account's exit no more than it holds.

        That is what reduce-only means there: the fee of the entry was taken out of what was bought. There are no
        shorts, so a sale that is no exit, and an exit that buys, are not sent at all.
        """
        if market.get("contract"):
            return request.quantity
        if closes(request) != (request.side == "sell"):
            return 0.0
        if request.side == "buy":
            return request.quantity
        free = float((await self._balance("free")).get(market["base"]) or 0)
        return min(request.quantity, free)

    async def _balance(self, which: str) -> Mapping[str, Any]:
        """Return the spot account's balances, also where the client is set to another account."""
        arguments = () if self._is_spot() else ({"type": "spot"},)
        return (await self._asked(self.client.fetch_balance, *arguments)).get(which) or {}

    def _parameters(self, request: OrderRequest, now_ms: int, left_ms: int, is_contract: bool) -> dict[str, Any]:
        """Return ccxt's extra parameters of an order."""
        more: dict[str, Any] = {"clientOrderId": request.client_order_id}
        if self._venue.window_ms is not None:
            # Both are fixed here, before the rate limit makes the request wait: ccxt stamps what it sends only then.
            more["timestamp"] = now_ms - int(self.client.options.get("timeDifference") or 0)
            more["recvWindow"] = min(left_ms, self._venue.window_ms)
        if closes(request) and self._reduces and is_contract:
            more["reduceOnly"] = True
        return more

    def _require_reducible(self, market: Mapping[str, Any]) -> None:
        if market.get("contract") and not (self._reduces or self._is_told):
            raise InvalidInputError(
                f"ccxt does not know of reduce-only orders at {self.client.id!r}: an exit of {market['symbol']} that "
                "finds the position closed would open the reverse; trade its spot markets, or say what it promises "
                "with features="
            )

    def _price(self, request: OrderRequest) -> float | None:
        if request.price is not None or not self.client.options.get("createMarketBuyOrderRequiresPrice"):
            return request.price
        return request.reference_price

    def _answer_to(self, request: OrderRequest, error: Exception) -> OrderReport:
        """Return the report of an order that the venue refused; raise where that is not certain."""
        meaning = meaning_of(error)
        if meaning == "late" and self._now() * 1000 >= request.expires_at_ms:
            return self._refused(request, "expired", what_was_said(error, self._secrets))
        if meaning in ("rejected", "missing", "repeated"):
            said = what_was_said(error, self._secrets)
            return self._refused(request, "rejected", said, repeated=meaning == "repeated")
        raise self._raised(error, changing=True) from None

    async def _is_cheap(self, market: Mapping[str, Any], request: OrderRequest) -> bool:
        """Whether a refused exit is worth less than the venue trades, at the price of now."""
        least = ((market.get("limits") or {}).get("cost") or {}).get("min")
        if not least or not self._has("fetchTicker"):
            return False
        try:
            price = (await self._asked(self.client.fetch_ticker, market["symbol"])).get("last")
        except HoldfastError:
            return False
        return bool(price) and request.quantity * float(price) < float(least) * _ABOUT

    def _refused(
        self, request: OrderRequest, state: Any, note: str, *, repeated: bool = False, too_small: bool = False
    ) -> OrderReport:  # fmt: skip
        return OrderReport(
            client_order_id=request.client_order_id, symbol=request.symbol, state=state, side=request.side,
            quantity=request.quantity, reduce_only=request.reduce_only, repeated=repeated, note=note,
            too_small=too_small,
        )  # fmt: skip

    def _raised(self, error: Exception, *, changing: bool) -> HoldfastError:
        # Raised from None by whoever calls this: the driver's own text may hold the signed request.
        self._pause.note(error)
        if meaning_of(error) in ("late", "unsent"):
            self._clock_until_s = 0.0  # the clocks may have drifted apart
        return error if isinstance(error, HoldfastError) else as_ours(error, changing=changing, secrets=self._secrets)

    async def _asked(self, function: Callable[..., Awaitable[Any]], *arguments: Any) -> Any:
        """Call the client for something that changes nothing."""
        self._pause.require_over()
        try:
            with no_stray_cancellation:
                return await function(*arguments)
        except Exception as error:
            raise self._raised(error, changing=False) from None

    async def _pages(
        self, ask: Callable[..., Awaitable[Any]], unified: str, since_ms: int
    ) -> AsyncIterator[Mapping[str, Any]]:
        """Yield the orders of all pages from ``since_ms`` to now; some come twice."""
        now_ms = int(self._now() * 1000) + 1
        while since_ms <= now_ms:
            until_ms = now_ms if self._venue.history_ms is None else since_ms + self._venue.history_ms
            parameters = {} if self._venue.history_ms is None else {"until": until_ms}
            seen: set[str] = set()
            from_ms = since_ms
            for _ in range(_MAX_PAGES):
                page = await self._asked(ask, unified, from_ms, _PAGE, parameters)
                fresh = [order for order in page if str(order.get("id")) not in seen]
                for order in fresh:
                    yield order
                seen.update(str(order.get("id")) for order in fresh)
                newest_ms = max((int(order.get("timestamp") or 0) for order in fresh), default=0)
                if not fresh or (len(page) < _PAGE and self._venue.history_ms is not None):
                    break
                from_ms = max(from_ms, newest_ms)  # not past it: others may have the same time stamp
            else:
                raise UnavailableError(f"the history of {unified} does not end: ask from a later time on")
            since_ms = until_ms + 1

    def _reports(self, orders: Sequence[Mapping[str, Any]], symbol: str | None) -> list[OrderReport]:
        """Turn ccxt's orders into reports, of the symbol that was asked for or of whichever."""
        markets = self._markets
        try:
            named = [(order, str(order.get("symbol"))) for order in orders]
            return [report_of(one, symbol or markets.spelt(name), unit=markets.unit(name)) for one, name in named]
        except (TypeError, ValueError, AttributeError) as error:
            raise self._raised(error, changing=False) from None

    def _position(self, row: Mapping[str, Any], symbol: str | None = None) -> VenuePosition | None:
        unified = str(row.get("symbol"))
        size = row.get("contractSize")
        contracts = float(row.get("contracts") or 0)
        quantity = quantity_in(contracts, Decimal(repr(float(size))) if size else self._markets.unit(unified))
        if not quantity:
            return None
        entry = row.get("entryPrice")
        return VenuePosition(
            symbol=symbol or self._markets.spelt(unified), quantity=abs(quantity),
            side="short" if row.get("side") == "short" or quantity < 0 else "long",
            entry_price=float(entry) if entry else None,
        )  # fmt: skip

    async def _market(self, symbol: str) -> Mapping[str, Any]:
        """Return ccxt's market of a symbol."""
        await self._ready()
        return self._markets.named(symbol)

    async def _ready(self) -> None:
        """Load the markets once, and the difference of the clocks each hour and after a doubt."""
        self._pause.require_over()
        if self._loading is None:
            self._loading = asyncio.Lock()
        async with self._loading:
            now_s = self._now()
            if not now_s < self._clock_until_s <= now_s + _CLOCK_SECONDS and self._venue.window_ms is not None:
                await self._asked(self.client.load_time_difference)
                self._clock_until_s = now_s + _CLOCK_SECONDS
            if not self._loaded:
                await self._asked(self.client.load_markets)
                self._markets.loaded()
                self._loaded = True

    def _has(self, ability: str) -> bool:
        return bool(self.client.has.get(ability))

    def _is_spot(self) -> bool:
        return self.client.options.get("defaultType", "spot") in ("spot", "margin")


def closes(request: OrderRequest) -> bool:
    """Whether an order may only close what is open."""
    return request.closes or request.reduce_only


_SECRETS = ("apiKey", "secret", "password", "token", "privateKey")


def _camel(name: str) -> str:
    first, *rest = name.split("_")
    return first + "".join(part.title() for part in rest)


def _venue_of(client: Any) -> Venue:
    exchange = str(getattr(client, "id", ""))
    if exchange == "binance" and client.options.get("defaultType") in _FUTURES:
        exchange = "binanceusdm"
    return VENUES.get(exchange, UNKNOWN_VENUE)
