"""Venue accounts: which scope of a store trades one, and who alone may act on the whole of it.

The record lies in a scope of its own, so that bots whose contexts lie in different scopes of one store see each other.
Workers of one scope share an account: what they do, they do for one context each. Whatever touches the account as a
whole (all its orders, its foreign positions) is done by one at a time, who raises the record's epoch first and looks
at it again before each act.
"""

from __future__ import annotations

import os
import socket
from typing import cast

import msgspec

from ..domains import account_key
from ..errors import ConflictError, FencedError, HeldError, UnavailableError
from ..rows import Account
from ..store import Loaded, Store
from .broker import Broker
from .lanes import Sleep, commit_surely

_MAX_ATTEMPTS = 20


class AccountRecord:
    """The record of one broker's account, on an open store.

    Args:
        store: Whose scope trades it.
        broker: Whose account it is.
        exchange_name: Under which it was added.
        holder: The worker that asks.
        now_ms: For a new record.
        sleep: Takes seconds; a seam for tests.
    """

    def __init__(
        self, store: Store, broker: Broker, exchange_name: str, *, holder: str, now_ms: int, sleep: Sleep
    ) -> None:  # fmt: skip
        self._store, self._sleep = store, sleep
        self._writer = store.writer(f"account-{broker.account}")
        self._key = account_key(broker.account)
        self._fresh = Account(
            fingerprint=broker.account, exchange_name=exchange_name, scope=store.scope, epoch=0, holder=holder,
            host=socket.gethostname(), pid=os.getpid(), since_ms=now_ms,
        )  # fmt: skip
        self._mine: int | None = None
        """The epoch under which this one acts on the whole account."""

    async def check(self) -> Account:
        """Put the account on record where it is not; refuse it where another scope trades it.

        Raises:
            HeldError: Another scope of the store trades it; the message names it.
            UnavailableError: The store cannot be used now; call again.

        Crash: The record is there or not.
        """
        return (await self._checked()).row

    async def act(self) -> None:
        """Become the one that may act on the whole account, before the first such act.

        Raises:
            HeldError, UnavailableError: As :meth:`check`.

        Crash: The epoch is raised or not; whoever acts next raises it again.
        """
        for _ in range(_MAX_ATTEMPTS):
            found = await self._checked()
            fresh = self._fresh
            row = msgspec.structs.replace(
                found.row, epoch=found.row.epoch + 1, holder=fresh.holder, host=fresh.host, pid=fresh.pid
            )
            try:
                await commit_surely(self._writer, {self._key: row}, {self._key: found.version}, sleep=self._sleep)
            except ConflictError:
                continue
            self._mine = row.epoch
            return
        raise UnavailableError(f"account {self._fresh.fingerprint}: others keep acting on it: try again")

    async def still(self) -> None:
        """Look again before each act that touches the whole account.

        Raises:
            FencedError: Somebody else has begun to act on it; the message names who. Stop.
            UnavailableError: The store cannot be read now; do not act.
        """
        row = (await self._checked()).row
        if self._mine is None or row.epoch != self._mine:
            raise FencedError(
                f"account {row.fingerprint}: process {row.pid} on {row.host} acts on the whole of it now "
                f"(epoch {row.epoch}): stop",
                key=self._key,
            )

    async def release(self) -> None:
        """Delete the record, so that another scope may trade the account; nothing of it may be open. Repeatable.

        Crash: The record is there or not.
        """
        await self._writer.commit({self._key: None})
        self._mine = None

    async def _checked(self) -> Loaded[Account]:
        for _ in range(_MAX_ATTEMPTS):
            found = cast("Loaded[Account] | None", await self._store.get(self._key))
            if found is not None:
                if found.row.scope != self._fresh.scope:
                    raise HeldError(
                        f"account {found.row.fingerprint} is traded by the scope {found.row.scope!r} of this store, "
                        f"not by {self._fresh.scope!r}: use that scope, or another account",
                        key=self._key,
                    )
                return found
            try:
                await commit_surely(self._writer, {self._key: self._fresh}, {self._key: 0}, sleep=self._sleep)
            except ConflictError:
                continue
        raise UnavailableError(f"account {self._fresh.fingerprint}: its record changes too often: try again")
