"""The history of orders at one of ccxt's exchanges: all pages of it, however many questions that takes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

from ..errors import InvalidInputError, UnavailableError
from .ccxt_access import Access

_PAGE = 500
_MAX_PAGES = 200
_IN_PARTS = (("fetchClosedOrders", "fetch_closed_orders"), ("fetchCanceledOrders", "fetch_canceled_orders"))


async def orders_since(access: Access, unified: str, since_ms: int) -> list[Mapping[str, Any]]:
    """Return ccxt's orders of a market from ``since_ms`` on, each once, the oldest first.

    Raises:
        InvalidInputError: ccxt cannot ask this exchange for its history.
        UnavailableError: It cannot be asked now, or its history does not end.
    """
    client, in_one = access.client, access.has("fetchOrders")
    kinds = ["fetch_orders"] if in_one else [kind for ability, kind in _IN_PARTS if access.has(ability)]
    if not kinds:
        raise InvalidInputError(f"ccxt cannot ask {getattr(client, 'id', '?')!r} for the history of orders")
    found: dict[str, Mapping[str, Any]] = {}
    for kind in kinds:
        async for order in _pages(access, getattr(client, kind), unified, since_ms):
            found[str(order.get("id"))] = order
    if not in_one:
        for order in await access.asked(client.fetch_open_orders, unified):
            found[str(order.get("id"))] = order
    listed = sorted(found.values(), key=lambda order: (order.get("timestamp") or 0, str(order.get("id"))))
    return [order for order in listed if (order.get("timestamp") or since_ms) >= since_ms]


async def _pages(
    access: Access, ask: Callable[..., Awaitable[Any]], unified: str, since_ms: int
) -> AsyncIterator[Mapping[str, Any]]:
    """Yield the orders of all pages from ``since_ms`` to now; some come twice."""
    now_ms, span_ms = int(access.now() * 1000) + 1, access.venue.history_ms
    while since_ms <= now_ms:
        until_ms = now_ms if span_ms is None else since_ms + span_ms
        parameters = {} if span_ms is None else {"until": until_ms}
        seen: set[str] = set()
        from_ms = since_ms
        for _ in range(_MAX_PAGES):
            page = await access.asked(ask, unified, from_ms, _PAGE, parameters)
            fresh = [order for order in page if str(order.get("id")) not in seen]
            for order in fresh:
                yield order
            seen.update(str(order.get("id")) for order in fresh)
            newest_ms = max((int(order.get("timestamp") or 0) for order in fresh), default=0)
            if not fresh or (len(page) < _PAGE and span_ms is not None):
                break
            from_ms = max(from_ms, newest_ms)  # not past it: others may have the same time stamp
        else:
            raise UnavailableError(f"the history of {unified} does not end: ask from a later time on")
        since_ms = until_ms + 1
