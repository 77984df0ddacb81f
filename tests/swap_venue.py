"""A venue of contracts that speaks OKX's REST, inside the test: it stands where ccxt's client would ask the network.

One account, netted: the market trades at one price, every market order fills at once. It counts contracts, holds
reduce-only orders to what is open, and can take a position away as a liquidation does.
"""

from __future__ import annotations

import asyncio
import json
import time
from decimal import Decimal
from typing import Any
from urllib.parse import parse_qs, urlsplit

import ccxt.async_support as ccxt

from holdfast.brokers.ccxt import CcxtBroker

DOGE = "DOGE/USDT:USDT"


def market(client: Any, unified: str, size: float | None, **more: Any) -> dict[str, Any]:
    """Return a swap market as ccxt lists it, traded in whole contracts unless ``step`` says otherwise."""
    base, step = unified.split("/")[0], more.pop("step", 1.0)
    return {
        **client.safe_market_structure(), "id": f"{base}-USDT-SWAP", "symbol": unified, "base": base, "baseId": base,
        "quote": "USDT", "quoteId": "USDT", "settle": "USDT", "settleId": "USDT", "type": "swap", "swap": True,
        "spot": False, "margin": False, "future": False, "option": False, "contract": True, "linear": True,
        "inverse": False, "contractSize": size, "active": True, "precision": {"amount": step, "price": 1e-9},
        "limits": {"amount": {"min": step}, "price": {}, "cost": {}, "leverage": {}}, "info": {}, **more,
    }  # fmt: skip


class SwapVenue:
    """The account, in contracts; ``client`` is ccxt's OKX, which asks it."""

    def __init__(self, *markets: tuple[str, float], step: float = 1.0, price: str = "0.2") -> None:
        keys = {"apiKey": "k" * 20, "secret": "s" * 20, "password": "p"}
        self.client = ccxt.okx({**keys, "enableRateLimit": False, "options": {"defaultType": "swap"}})
        listed = [market(self.client, unified, size, step=step) for unified, size in markets or ((DOGE, 1000.0),)]
        self.client.set_markets(listed)
        self.client.fetch = self._fetch
        self.price, self.held = Decimal(price), Decimal(0)
        self.orders: list[dict[str, Any]] = []
        self.traded = asyncio.Event()
        self.sent: list[dict[str, Any]] = []
        self.names_orders = True
        """Whether the client order id is repeated in answers but the first."""
        self.refuses: list[str] = []
        """Why the next orders are refused, first one first."""

    def broker(self, **more: Any) -> CcxtBroker:
        """Return a broker for it."""
        return CcxtBroker(self.client, symbols=[DOGE], **more)

    def liquidate(self) -> None:
        """Take the position away."""
        self.held = Decimal(0)

    async def _fetch(self, url: str, method: str = "GET", headers: Any = None, body: Any = None) -> Any:
        parts = urlsplit(url)
        what, asked = parts.path.rpartition("/api/v5/")[2], {k: v[0] for k, v in parse_qs(parts.query).items()}
        if what == "trade/cancel-order":
            data = [{"sCode": "51402", "sMsg": "Cancellation failed as the order is completed"}]
        elif method == "POST":
            [given] = json.loads(body)
            self.sent.append(given)
            data = [self._place(given)]
        else:
            data = self._told(what, asked)
        failed = data and str(data[0].get("sCode", "0")) != "0"
        said = {"code": "1" if failed else "0", "msg": "", "data": data}
        self.client.handle_errors(200, "OK", url, method, {}, json.dumps(said), said, headers, body)
        return said

    def _told(self, what: str, asked: dict[str, str]) -> list[dict[str, Any]]:
        if what == "account/positions":
            row = {"instId": "DOGE-USDT-SWAP", "instType": "SWAP", "mgnMode": "cross", "posSide": "net", "lever": "3"}
            return [{**row, "pos": str(self.held), "avgPx": str(self.price)}] if self.held else []
        if what == "trade/order":
            by = "ordId" if "ordId" in asked else "clOrdId"
            found = [one for one in self.orders if one[by] == asked[by]]
            return [self._listed(found[0])] if found else [{"sCode": "51603", "sMsg": "Order does not exist"}]
        if what == "trade/orders-history":
            return [self._listed(one) for one in self.orders if one["instId"] == asked["instId"]]
        assert what == "trade/orders-pending", what
        return []

    def _listed(self, order: dict[str, Any]) -> dict[str, Any]:
        return order if self.names_orders else {**order, "clOrdId": ""}

    def _place(self, given: dict[str, Any]) -> dict[str, Any]:
        size, sign = Decimal(given["sz"]), 1 if given["side"] == "buy" else -1
        if self.refuses:
            return {"sCode": "51000", "sMsg": self.refuses.pop(0), "ordId": "", "clOrdId": given["clOrdId"]}
        if given.get("reduceOnly"):
            reducible = max(Decimal(0), -sign * self.held)
            if not reducible:
                told = "Your position doesn't exist."
                return {"sCode": "51023", "sMsg": told, "ordId": "", "clOrdId": given["clOrdId"]}
            size = min(size, reducible)
        self.held += sign * size
        self.traded.set()
        now = str(int(time.time() * 1000))
        order = {
            "instId": given["instId"], "instType": "SWAP", "ordId": str(100 + len(self.orders)), "sz": str(size),
            "clOrdId": given["clOrdId"], "side": given["side"], "ordType": "market", "state": "filled", "tag": "",
            "accFillSz": str(size), "avgPx": str(self.price), "fillPx": str(self.price), "fillSz": str(size),
            "reduceOnly": str(bool(given.get("reduceOnly"))).lower(), "px": "", "cTime": now, "uTime": now,
        }  # fmt: skip
        self.orders.append(order)
        return {"sCode": "0", "sMsg": "Order placed", "ordId": order["ordId"], "clOrdId": order["clOrdId"]}
