"""Any exchange of the ``ccxt`` package as a broker. An extra: ``pip install 'holdfast[ccxt]'``.

What a venue promises is known for those in :data:`~holdfast.brokers.ccxt_words.VENUES`; of any other nothing is
assumed, unless you say so (``features=``).
"""

from __future__ import annotations

import hashlib
import importlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from decimal import Decimal
from typing import Any

import msgspec

from ..cancellation import no_stray_cancellation
from ..engine.broker import Features, OrderReport, OrderRequest, VenuePosition
from ..errors import HoldfastError, InvalidInputError
from ..rules.contracts import amount_of, quantity_in, unit_of
from .ccxt_access import Access, is_spot, venue_of
from .ccxt_history import orders_since
from .ccxt_markets import is_too_small
from .ccxt_words import UNKNOWN_VENUE, id_length, meaning_of, report_of, report_on

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
        self._venue = venue_of(client)
        promised = features or self._venue.features
        self._reduces = promised.reduce_only or bool(client.has.get("createReduceOnlyOrder"))
        """Whether an order of contracts can be told to close only."""
        self._is_told = features is not None or self._venue is not UNKNOWN_VENUE
        """Whether somebody has said what the venue promises."""
        length = id_length(str(client.id), promised.id_length, is_spot=is_spot(client))
        reduces = self._reduces or is_spot(client)
        self._features = msgspec.structs.replace(promised, reduce_only=reduces, id_length=length)
        self._quote = quote
        self._access = Access(client, symbols, now=now, elapsed=elapsed)

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
        made.options = {**made.options, **venue_of(made).options, **options.get("options", {})}
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
        market = await self._access.market(request.symbol)
        self._require_reducible(market)
        unified, unit = str(market["symbol"]), unit_of(market)
        now_ms = int(self._access.now() * 1000)
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
        since_ms = int(self._access.now() * 1000) - _LOOK_BACK_MS
        known = [*await self.open_orders(symbol), *reversed(await self.history(symbol, since_ms))]
        return next((one for one in known if one.client_order_id == client_order_id), None)

    async def find_numbered(self, symbol: str, venue_id: str, client_order_id: str) -> OrderReport | None:
        """Return what the venue knows of an order that it has given a number; as :class:`~.broker.Numbered`."""
        if self._venue.by_client_id or not self._access.has("fetchOrder"):
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
        market = await self._access.market(symbol)
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
            raise self._access.raised(error, changing=False) from None

    async def _cancelled(self, symbol: str, venue_id: str, client_order_id: str) -> OrderReport | None:
        market = await self._access.market(symbol)
        parameters = {} if venue_id else {"clientOrderId": client_order_id}
        try:
            with no_stray_cancellation:
                order = await self.client.cancel_order(venue_id, market["symbol"], parameters)
            report = report_of(order, symbol, client_order_id, unit_of(market))
        except Exception as error:
            # A cancellation that is refused has come too late, or there is no such order: only asking tells.
            if meaning_of(error) not in ("missing", "rejected"):
                raise self._access.raised(error, changing=True) from None
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
        unified = None if symbol is None else (await self._access.market(symbol))["symbol"]
        await self._access.ready()
        return self._reports(await self._access.asked(self.client.fetch_open_orders, unified), symbol)

    async def history(self, symbol: str, since_ms: int) -> Sequence[OrderReport]:
        """Return the orders of a symbol from ``since_ms`` on; as :class:`~holdfast.engine.broker.Broker`."""
        unified = str((await self._access.market(symbol))["symbol"])
        return self._reports(await orders_since(self._access, unified, since_ms), symbol)

    async def positions(self) -> Sequence[VenuePosition]:
        """Return what the account holds: of a spot account each currency but the one that it pays with."""
        await self._access.ready()
        if self._access.has("fetchPositions") and not is_spot(self.client):
            rows = await self._access.asked(self.client.fetch_positions)
            return [one for row in rows if (one := self._position(row))]
        totals = await self._balance("total")
        held = {name: float(total) for name, total in totals.items() if name != self._quote and total}
        return [
            VenuePosition(symbol=self._access.markets.spelt(f"{name}/{self._quote}", name), side="long", quantity=total)
            for name, total in sorted(held.items())
            if total > 0
        ]

    async def holding(self, symbol: str) -> Sequence[VenuePosition] | None:
        """Return what the account holds of one market, whichever kind it is of; as :class:`~.broker.Holds`."""
        market = await self._access.market(symbol)
        self._require_reducible(market)
        if market.get("contract"):
            if not self._access.has("fetchPositions"):
                return None
            unified = market["symbol"]
            rows = await self._access.asked(self.client.fetch_positions, [unified])
            found = [self._position(row, symbol) for row in rows if row.get("symbol") == unified]
            return [one for one in found if one is not None]
        total = float((await self._balance("total")).get(market["base"]) or 0)
        return [VenuePosition(symbol=symbol, side="long", quantity=total)] if total > 0 else []

    async def close(self) -> None:
        """Close the client's connections. Repeatable."""
        try:
            await self.client.close()
        except Exception as error:
            raise self._access.raised(error, changing=False) from None

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
        arguments = () if is_spot(self.client) else ({"type": "spot"},)
        return (await self._access.asked(self.client.fetch_balance, *arguments)).get(which) or {}

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
        if meaning == "late" and self._access.now() * 1000 >= request.expires_at_ms:
            return self._refused(request, "expired", self._access.said(error))
        if meaning in ("rejected", "missing", "repeated"):
            said = self._access.said(error)
            return self._refused(request, "rejected", said, repeated=meaning == "repeated")
        raise self._access.raised(error, changing=True) from None

    async def _is_cheap(self, market: Mapping[str, Any], request: OrderRequest) -> bool:
        """Whether a refused exit is worth less than the venue trades, at the price of now."""
        least = ((market.get("limits") or {}).get("cost") or {}).get("min")
        if not least or not self._access.has("fetchTicker"):
            return False
        try:
            price = (await self._access.asked(self.client.fetch_ticker, market["symbol"])).get("last")
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

    def _reports(self, orders: Sequence[Mapping[str, Any]], symbol: str | None) -> list[OrderReport]:
        """Turn ccxt's orders into reports, of the symbol that was asked for or of whichever."""
        markets = self._access.markets
        try:
            named = [(order, str(order.get("symbol"))) for order in orders]
            return [report_of(one, symbol or markets.spelt(name), unit=markets.unit(name)) for one, name in named]
        except (TypeError, ValueError, AttributeError) as error:
            raise self._access.raised(error, changing=False) from None

    def _position(self, row: Mapping[str, Any], symbol: str | None = None) -> VenuePosition | None:
        unified = str(row.get("symbol"))
        size = row.get("contractSize")
        contracts = float(row.get("contracts") or 0)
        quantity = quantity_in(contracts, Decimal(repr(float(size))) if size else self._access.markets.unit(unified))
        if not quantity:
            return None
        entry = row.get("entryPrice")
        return VenuePosition(
            symbol=symbol or self._access.markets.spelt(unified), quantity=abs(quantity),
            side="short" if row.get("side") == "short" or quantity < 0 else "long",
            entry_price=float(entry) if entry else None,
        )  # fmt: skip


def closes(request: OrderRequest) -> bool:
    """Whether an order may only close what is open."""
    return request.closes or request.reduce_only
