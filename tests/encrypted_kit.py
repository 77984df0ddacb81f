"""What the tests of encryption share: keys, rows, and a hand on the medium."""

from __future__ import annotations

from pathlib import Path

import pytest

from holdfast.backends.memory import MemoryBackend
from holdfast.contract import Key, Record
from holdfast.errors import (
    CorruptedError,
)
from holdfast.wrappers.encrypted import Encrypted
from holdfast.wrappers.keyring import Keyring

OLD, NEW = bytes(range(32)), bytes(range(32, 64))
A, B, C = Key("signal", "BTCUSDT_a_x", "BTCUSDT"), Key("signal", "ETHUSDT_a_x", "ETHUSDT"), Key("risk", "limits", "a")
ROW = b'{"id":"s-1","priceOpen":43000.0,"note":"' + b"n" * 600 + b'"}'
CANARY = b"canary-0123456789-canary-0123456"


def ring(**keys: bytes) -> Keyring:
    return Keyring(keys or {"old": OLD})


def put_back(memory: MemoryBackend, key: Key, record: Record, scope: str = "main") -> None:
    """Write a record as somebody does who has the medium in hand."""
    memory._state.scope(scope).rows[key] = record


def lying(memory: MemoryBackend, key: Key, scope: str = "main") -> Record:
    """Return a record as it lies on the medium."""
    return memory._state.scope(scope).rows[key]


async def opened(
    memory: MemoryBackend | None = None, *, witness: Path | None = None
) -> tuple[Encrypted, MemoryBackend]:
    inner = memory or MemoryBackend()
    store = Encrypted(inner, ring(), witness=witness)
    await store.open()
    return store, inner


async def refused(store: Encrypted, key: Key, scope: str = "main") -> CorruptedError:
    with pytest.raises(CorruptedError) as caught:
        await store.read(scope, [key])
    assert caught.value.key == key
    assert str(key) in str(caught.value)
    return caught.value
