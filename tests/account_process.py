"""A process that wants to trade venue accounts from one scope of a store: ``account_process.py URL SCOPE COUNT``.

Waits for a line on standard input once it is ready, claims the accounts a0, a1, … one after the other, then acts on the
account ``whole`` so often; prints one JSON object.
"""

from __future__ import annotations

import asyncio
import json
import sys
from types import SimpleNamespace
from typing import Any

import msgspec

from holdfast.contract import Survives
from holdfast.engine.account import AccountRecord
from holdfast.errors import FencedError, HeldError
from holdfast.store import Store
from holdfast.urls import open_backend


async def main(url: str, scope: str, count: int) -> dict[str, Any]:
    """Claim accounts; return what came of each."""
    store = Store(open_backend(url), scope=scope, require=Survives.NOTHING)
    await store.open()

    def record(account: str) -> AccountRecord:
        broker: Any = SimpleNamespace(account=account)
        return AccountRecord(store, broker, "paper", holder=scope, now_ms=0, sleep=asyncio.sleep)

    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    mine, refused = [], []
    for n in range(count):
        try:
            await record(f"a{n}").check()
            mine.append(n)
        except HeldError as error:
            refused.append(str(error))
    whole, epochs, replaced = record("whole"), [], 0
    whole._fresh = msgspec.structs.replace(whole._fresh, scope="both")  # as workers of one scope
    for _ in range(count):
        await whole.act()
        epochs.append(whole._mine)
        try:
            await whole.still()
        except FencedError:
            replaced += 1
    await store.close()
    return {"mine": mine, "refused": refused, "epochs": epochs, "replaced": replaced}


if __name__ == "__main__":
    print(json.dumps(asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))))
