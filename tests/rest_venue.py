"""A venue of our own that speaks Binance's spot REST, as a process of its own: ``python rest_venue.py DIRECTORY``.

It checks what the real one checks: key, signature, time stamp and recvWindow, lot size, balance, and that a client
order id is not among the open orders. Faults are ordered through ``/control``. Its port goes to ``DIRECTORY/port``.

What it does not have: an order book of others. The market trades at one price, in the quantity that the test gives.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import socket
import sys
import threading
import time
from collections.abc import Callable
from decimal import Decimal
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

KEY, SECRET = "k" * 40 + "PublicPartOfTheKey123456", "s" * 40 + "SecretPartOfTheKey123456"
SYMBOLS = {"BTCUSDT": ("BTC", "USDT"), "ETHUSDT": ("ETH", "USDT")}
STEP, TICK, LEAST_COST = Decimal("0.00001"), Decimal("0.01"), Decimal(5)
HISTORY_MS = 86_400_000
ENDED = ("FILLED", "CANCELED", "EXPIRED", "REJECTED")
Params = dict[str, str]


class Refused(Exception):
    """An answer of Binance's kind: an HTTP status and a code."""

    def __init__(self, code: int, message: str, status: int = 400) -> None:
        super().__init__(code, message, status)
        self.code, self.message, self.status = code, message, status


class Venue:
    """The account, its orders and the faults that were ordered. Guarded by ``lock``."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.gate = threading.Event()
        self.reset({})

    def reset(self, _: Any) -> None:
        self.orders: list[dict[str, Any]] = []
        self.balances = {"USDT": Decimal(1_000_000), "BTC": Decimal(0), "ETH": Decimal(0)}
        self.price = {"BTCUSDT": Decimal(50_000), "ETHUSDT": Decimal(2_000)}
        self.liquidity: Decimal | None = None  # how much one market order gets; None: all
        self.faults: list[dict[str, Any]] = []  # each {"at": "POST order", "do": what}, used once, in order
        self.fee = Decimal(0)  # part of what is bought that the venue keeps
        self.clock_ahead_ms = 0
        self.requests: list[list[Any]] = []  # [method, path, parameters] of each signed request that was let in
        self.next_id = 100
        self.gate.set()
        self.gate = threading.Event()  # what is held back ends with it

    def now_ms(self) -> int:
        return int(time.time() * 1000) + self.clock_ahead_ms

    def place(self, p: Params) -> dict[str, Any]:
        """Take a new order."""
        symbol, identity = _symbol(p), p.get("newClientOrderId") or f"auto{self.next_id}"
        if any(o["clientOrderId"] == identity and o["status"] not in ENDED for o in self.orders):
            raise Refused(-2010, "Duplicate order sent.")
        quantity, market = Decimal(p["quantity"]), p["type"] == "MARKET"
        price = self.price[symbol] if market else Decimal(p["price"])
        if quantity <= 0 or quantity % STEP:
            raise Refused(-1013, "Filter failure: LOT_SIZE")
        if price % TICK:
            raise Refused(-1013, "Filter failure: PRICE_FILTER")
        if quantity * price < LEAST_COST:
            raise Refused(-1013, "Filter failure: NOTIONAL")
        base, quote = SYMBOLS[symbol]
        need = (quote, quantity * price) if p["side"] == "BUY" else (base, quantity)
        if self.free(need[0]) < need[1]:
            raise Refused(-2010, "Account has insufficient balance for requested action.")
        order: dict[str, Any] = {
            "symbol": symbol, "orderId": self.next_id, "clientOrderId": identity, "price": price, "origQty": quantity,
            "executedQty": Decimal(0), "cummulativeQuoteQty": Decimal(0), "status": "NEW", "timeInForce": "GTC",
            "type": p["type"], "side": p["side"], "time": self.now_ms(), "updateTime": self.now_ms(),
        }  # fmt: skip
        self.next_id += 1
        self.orders.append(order)
        crosses = price >= self.price[symbol] if p["side"] == "BUY" else price <= self.price[symbol]
        if market or crosses:
            self.fill(order, quantity if self.liquidity is None else min(quantity, self.liquidity))
            if market and order["status"] != "FILLED":
                order["status"] = "EXPIRED"  # a market order does not rest
        return order

    def fill(self, order: dict[str, Any], quantity: Decimal) -> None:
        """Trade a part of an order at its price, or the market's where that is better."""
        base, quote = SYMBOLS[order["symbol"]]
        sign = 1 if order["side"] == "BUY" else -1
        market = self.price[order["symbol"]]
        price = min(order["price"], market) if sign > 0 else max(order["price"], market)
        order["executedQty"] += quantity
        order["cummulativeQuoteQty"] += quantity * price
        order["status"] = "FILLED" if order["executedQty"] == order["origQty"] else "PARTIALLY_FILLED"
        order["updateTime"] = self.now_ms()
        self.balances[base] += sign * quantity - (quantity * self.fee if sign > 0 else 0)
        self.balances[quote] -= sign * quantity * price

    def free(self, asset: str) -> Decimal:
        return self.balances[asset] - self.locked(asset)

    def locked(self, asset: str) -> Decimal:
        total = Decimal(0)
        for o in self.orders:
            if o["status"] not in ENDED:
                left = o["origQty"] - o["executedQty"]
                base, quote = SYMBOLS[o["symbol"]]
                if asset == (quote if o["side"] == "BUY" else base):
                    total += left * o["price"] if o["side"] == "BUY" else left
        return total

    def wanted(self, p: Params, *, code: int = -2013, message: str = "Order does not exist.") -> dict[str, Any]:
        """Return the newest order of a client order id, or of a number."""
        order: dict[str, Any]
        for order in reversed(self.orders):
            if order["symbol"] == _symbol(p) and (
                order["clientOrderId"] == p.get("origClientOrderId") or str(order["orderId"]) == p.get("orderId")
            ):
                return order
        raise Refused(code, message)

    def cancel(self, p: Params) -> dict[str, Any]:
        order = self.wanted(p, code=-2011, message="Unknown order sent.")
        if order["status"] in ENDED:
            raise Refused(-2011, "Unknown order sent.")
        order["status"], order["updateTime"] = "CANCELED", self.now_ms()
        # As the real one: the cancellation has a client order id of its own.
        return {**order, "origClientOrderId": order["clientOrderId"], "clientOrderId": "cancelMyOrder1"}

    def history(self, p: Params) -> list[dict[str, Any]]:
        since, until = int(p.get("startTime", 0)), int(p.get("endTime", 1 << 60))
        if "startTime" in p and "endTime" in p and until - since > HISTORY_MS:
            raise Refused(-1127, "More than 24 hours between startTime and endTime.")
        limit = int(p.get("limit", 500))
        if limit > 1000:
            raise Refused(-1130, "Data sent for parameter 'limit' is not valid.")
        return [o for o in self.orders if o["symbol"] == _symbol(p) and since <= o["time"] <= until][:limit]

    def account(self, _: Params) -> dict[str, Any]:
        held = [{"asset": a, "free": self.free(a), "locked": self.locked(a)} for a in self.balances]
        return {"canTrade": True, "accountType": "SPOT", "updateTime": self.now_ms(), "balances": held}

    def check(self, key: str | None, query: str) -> Params:
        """Return the parameters of a signed request, or refuse it as the real one does."""
        if key is None:
            raise Refused(-2014, "API-key format invalid.", 401)
        if key != KEY:
            raise Refused(-2015, "Invalid API-key, IP, or permissions for action.", 401)
        signed, _, signature = query.rpartition("&signature=")
        if not hmac.compare_digest(hmac.new(SECRET.encode(), signed.encode(), hashlib.sha256).hexdigest(), signature):
            raise Refused(-1022, "Signature for this request is not valid.")
        p = dict(parse_qsl(signed))
        window, stamp, now = int(p.get("recvWindow", 5000)), int(p["timestamp"]), self.now_ms()
        if not 0 < window <= 60_000:
            raise Refused(-1131, "recvWindow must be less than 60000")
        if stamp >= now + 1000:
            raise Refused(-1021, "Timestamp for this request was 1000ms ahead of the server's time.")
        if now - stamp > window:
            raise Refused(-1021, "Timestamp for this request is outside of the recvWindow.")
        return p

    def control(self, what: str, given: dict[str, Any]) -> Any:
        """Do what a test orders."""
        if what == "charge":
            self.fee = Decimal(given["fee"])
        elif what == "fill":
            order = next(o for o in reversed(self.orders) if o["clientOrderId"] == given["id"])
            self.fill(order, Decimal(given["quantity"]))
        elif what == "set":
            self.clock_ahead_ms = given.get("clock_ahead_ms", self.clock_ahead_ms)
            if "liquidity" in given:
                self.liquidity = None if given["liquidity"] is None else Decimal(given["liquidity"])
        elif what == "age":
            for order in self.orders:
                order["time"] -= given["ms"]
        elif what == "release":
            self.gate.set()
        elif what == "many":
            for n in range(given["count"]):
                self.place({**given["order"], "newClientOrderId": f"many{n}"})
        elif what == "faults":
            self.faults = given["faults"]
        elif what == "state":
            return {"orders": self.orders, "requests": self.requests, "faults": self.faults}
        else:
            getattr(self, what)(given)
        return {}


def _symbol(p: Params) -> str:
    if p.get("symbol") not in SYMBOLS:
        raise Refused(-1121, "Invalid symbol.")
    return p["symbol"]


def exchange_info() -> dict[str, Any]:
    filters = [
        {"filterType": "PRICE_FILTER", "minPrice": str(TICK), "maxPrice": "1000000.00", "tickSize": str(TICK)},
        {"filterType": "LOT_SIZE", "minQty": str(STEP), "maxQty": "9000.00000", "stepSize": str(STEP)},
        {"filterType": "NOTIONAL", "minNotional": str(LEAST_COST), "applyMinToMarket": True, "avgPriceMins": 5},
    ]
    listed = [
        {"symbol": symbol, "status": "TRADING", "baseAsset": base, "quoteAsset": quote, "baseAssetPrecision": 8,
         "quotePrecision": 8, "quoteAssetPrecision": 8, "orderTypes": ["LIMIT", "MARKET"], "permissions": ["SPOT"],
         "isSpotTradingAllowed": True, "isMarginTradingAllowed": False, "filters": filters}
        for symbol, (base, quote) in SYMBOLS.items()
    ]  # fmt: skip
    return {"timezone": "UTC", "rateLimits": [], "exchangeFilters": [], "symbols": listed}


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    venue: Venue

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def do_DELETE(self) -> None:
        self._serve()

    def _serve(self) -> None:
        path, _, query = self.path.partition("?")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        if path.startswith("/control/"):
            with self.venue.lock:
                said = self.venue.control(path.removeprefix("/control/"), json.loads(body or "{}"))
                return self._say(200, said)
        name = path.rpartition("/")[2]
        with self.venue.lock:
            fault = self._fault(f"{self.command} {name}")
            gate = self.venue.gate
        match fault:
            case "refuse to listen":
                return self._hang_up()
            case "503 unapplied":
                return self._say(503, {"code": -1008, "msg": "Server is currently overloaded with other requests."})
            case "429":
                return self._say(429, {"code": -1003, "msg": "Too much request weight used."}, retry_after="0")
            case "429 silent":
                return self._say(429, {"code": -1003, "msg": "Too much request weight used."})
            case "418":
                told = {"code": -1003, "msg": "Way too much request weight used; IP banned."}
                return self._say(418, told, retry_after="120")
            case "echo":
                return self._say(400, {"code": -1100, "msg": f"Illegal characters: {self.headers.get('X-MBX-APIKEY')}"})
            case "echo unknown":
                return self._say(400, {"code": -9999, "msg": f"key={self.headers.get('X-MBX-APIKEY')} {SECRET}"})
            case "late":
                return self._say(
                    400, {"code": -1021, "msg": "Timestamp for this request is outside of the recvWindow."}
                )
        try:
            with self.venue.lock:
                status, said = 200, self._answer(name, query or body)
        except Refused as no:
            status, said = no.status, {"code": no.code, "msg": no.message}
        match fault:
            case "lose the answer":
                return self._hang_up()
            case "hold the answer":
                gate.wait(30)
                return self._hang_up()
            case "500 applied":
                return self._say(500, {"code": -1000, "msg": "An unknown error occurred while processing the request."})
            case "504 applied":
                return self._say(504, {"code": -1007, "msg": "Timeout waiting for response from backend server."})
            case "html applied":
                return self._say(502, "<html>Bad Gateway</html>")
            case "nonsense applied":
                return self._say(200, "<html>Welcome</html>")
            case "half an answer":
                return self._say(200, said, cut=True)
            case "another's answer":
                return self._say(200, {**said, "clientOrderId": "somebodyelse"})
        return self._say(status, said)

    def _fault(self, at: str) -> str:
        faults = self.venue.faults
        if faults and faults[0]["at"] == at:
            return str(faults.pop(0)["do"])
        return ""

    def _answer(self, name: str, query: str) -> Any:
        venue = self.venue
        if name == "time":
            return {"serverTime": venue.now_ms()}
        if name == "exchangeInfo":
            return exchange_info()
        if name == "24hr":
            symbol = _symbol(dict(parse_qsl(query)))
            return {"symbol": symbol, "lastPrice": str(venue.price[symbol]), "closeTime": venue.now_ms()}
        p = venue.check(self.headers.get("X-MBX-APIKEY"), query)
        venue.requests.append([self.command, name, p])
        routes: dict[str, Callable[[Params], Any]] = {
            "POST order": venue.place, "GET order": venue.wanted, "DELETE order": venue.cancel,
            "GET allOrders": venue.history, "GET account": venue.account,
            "GET openOrders": lambda p: [
                o for o in venue.orders
                if o["status"] not in ENDED and p.get("symbol") in (None, o["symbol"])
            ],
        }  # fmt: skip
        return routes[f"{self.command} {name}"](p)

    def _say(self, status: int, said: Any, *, cut: bool = False, retry_after: str = "") -> None:
        text = said if isinstance(said, str) else json.dumps(said, default=str)
        data = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/html" if isinstance(said, str) else "application/json")
        self.send_header("Content-Length", str(len(data)))
        if retry_after:
            self.send_header("Retry-After", retry_after)
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if cut else data)
        if cut:
            self._hang_up()

    def _hang_up(self) -> None:
        self.wfile.flush()
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)


def main() -> None:
    """Serve until the process is ended."""
    Handler.venue = Venue()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    place = Path(sys.argv[1])
    (place / "port.new").write_text(str(server.server_address[1]))
    (place / "port.new").rename(place / "port")
    server.serve_forever()


if __name__ == "__main__":
    main()
