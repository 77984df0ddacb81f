"""A venue's process and what is asked of it, for the tests of the broker over ccxt."""

from __future__ import annotations

import http.client
import itertools
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rest_venue import KEY, SECRET
from servers.process import ServerProcess

from holdfast.brokers.ccxt import CcxtBroker
from holdfast.engine.broker import OrderRequest

_IDS = (f"h{n}" for n in itertools.count())


class Remote:
    """The venue's process, as a test orders it about."""

    def __init__(self, port: int) -> None:
        self.port = port

    def __call__(self, what: str, **given: Any) -> Any:
        link = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            link.request("POST", f"/control/{what}", json.dumps(given))
            answer = link.getresponse()
            assert answer.status == 200
            return json.loads(answer.read())
        finally:
            link.close()

    def faults(self, *what: str, at: str = "POST order") -> None:
        self("faults", faults=[{"at": at, "do": one} for one in what])

    def orders(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self("state")["orders"]
        return found

    def sent(self, what: str) -> list[dict[str, str]]:
        """Return the parameters of each request of a kind that was let in."""
        return [given for verb, name, given in self("state")["requests"] if f"{verb} {name}" == what]


@contextmanager
def started(place: Path) -> Iterator[Remote]:
    """Run a venue in a process of its own; its port is written to ``place``."""
    port = place / "port"
    script = Path(__file__).with_name("rest_venue.py")
    server = ServerProcess([sys.executable, str(script), str(place)], place, port.exists)
    server.start()
    try:
        yield Remote(int(port.read_text()))
    finally:
        server.stop()


def client_of(port: int, *, as_at_home: bool = True, **options: Any) -> Any:
    """Make ccxt's binance, all of whose addresses are those of the venue on this machine."""
    given = {"api_key": KEY, "secret": SECRET, "enableRateLimit": False, "timeout": 5000, **options}
    client = CcxtBroker.named("binance", **given).client
    client.urls["api"] = dict.fromkeys(client.urls["api"], f"http://127.0.0.1:{port}/api/v3")
    if as_at_home:  # ccxt knows more error codes of binance's own host than of ours
        client.get_exceptions_by_url = lambda url, kind: client.exceptions["spot"].get(kind, {})
    return client


def request(**more: Any) -> OrderRequest:
    given = {
        "symbol": "BTCUSDT", "client_order_id": next(_IDS), "side": "buy", "quantity": 0.5,
        "expires_at_ms": int(time.time() * 1000) + 30_000,
    }  # fmt: skip
    return OrderRequest(**{**given, **more})


def resting(**more: Any) -> OrderRequest:
    return request(**{"price": 49_000.0, **more})
