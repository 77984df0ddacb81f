"""Encryption: what is changed, moved or put back is refused, and nothing tells the key."""

from __future__ import annotations

import asyncio
import base64
import itertools
import logging
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from process_store import signal

from holdfast.backends.file import FileBackend
from holdfast.backends.memory import MemoryBackend
from holdfast.backends.sqlite import SqliteBackend
from holdfast.contract import Key, KeyPrefix, Op, Record, Survives
from holdfast.domains import context_key, from_mapping
from holdfast.errors import (
    ConflictError,
    CorruptedError,
    HoldfastError,
    InvalidInputError,
    LockedError,
    NewerFormatError,
    UnavailableError,
)
from holdfast.names import Context
from holdfast.quarantine import kept_bytes
from holdfast.rows import Quarantined
from holdfast.store import Store
from holdfast.testing.faults import Fault, FaultyBackend
from holdfast.wrappers.around import Around
from holdfast.wrappers.encrypted import MAX_PLAIN_BYTES, Encrypted, sealed_row
from holdfast.wrappers.keyring import Keyring, new_entry

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


# ---------------------------------------------------------------------- one row


async def test_the_medium_holds_json_without_a_word_of_the_row() -> None:
    store, memory = await opened()
    await store.commit("main", {A: b'{"note":"breakout"}'}, {}, op=Op("w", 1))
    lies = lying(memory, A).payload
    assert lies.startswith(b'{"_encrypted":1,"key":"old","op":["w",1],"nonce":"')
    assert b"breakout" not in lies
    assert b"breakout" not in sealed_row(A, lies).data
    assert (await store.read("main", [A]))[A] == Record(b'{"note":"breakout"}', 1, Op("w", 1))


async def test_every_flipped_bit_and_every_truncation_is_refused_and_left_where_it_is(record_property: Any) -> None:
    store, memory = await opened()
    await store.commit("main", {A: ROW}, {}, op=Op("w", 1))
    whole = lying(memory, A)
    flips = cuts = 0
    for bit in range(8 * len(whole.payload)):
        changed = bytearray(whole.payload)
        changed[bit // 8] ^= 1 << bit % 8
        bad = whole._replace(payload=bytes(changed))
        put_back(memory, A, bad)
        error = await refused(store, A)
        assert error.record == bad
        assert lying(memory, A) == bad
        flips += 1
    for length in range(len(whole.payload)):
        put_back(memory, A, whole._replace(payload=whole.payload[:length]))
        await refused(store, A)
        cuts += 1
    put_back(memory, A, whole)
    assert (await store.read("main", [A]))[A].payload == ROW
    record_property("proof:encryption", {"flipped bits refused": flips, "truncations refused": cuts})


async def test_bytes_behind_it_and_another_spelling_of_the_same_json_are_refused() -> None:
    store, memory = await opened()
    await store.commit("main", {A: b"{}"}, {}, op=Op("w", 1))
    whole = lying(memory, A)
    for changed in (
        whole.payload + b" ",
        whole.payload.replace(b":1,", b": 1,", 1),
        whole.payload.replace(b'"key":"old"', b'"key":"\\u006fld"'),
        whole.payload.replace(b'"key":"old"', b'"key":"none","key":"old"'),
        whole.payload[:-1] + b',"more":1}',
    ):
        put_back(memory, A, whole._replace(payload=changed))
        await refused(store, A)


async def test_any_two_rows_that_change_places_are_refused(record_property: Any) -> None:
    """Between keys, scopes and ops; with the op that the medium names left, or moved along."""
    store, memory = await opened()
    spots = [("main", A), ("main", B), ("main", C), ("other", Key("signal", "BTCUSDT_a_y", "BTCUSDT"))]
    for n, (scope, key) in enumerate(spots, 1):
        await store.commit(scope, {key: ROW}, {}, op=Op("w", n))
    records = {spot: lying(memory, spot[1], spot[0]) for spot in spots}
    swaps = 0
    for (scope, key), other in itertools.permutations(spots, 2):
        for op in (records[scope, key].op, records[other].op):
            put_back(memory, key, records[scope, key]._replace(payload=records[other].payload, op=op), scope)
            await refused(store, key, scope)
            swaps += 1
        put_back(memory, key, records[scope, key], scope)
    record_property("proof:encryption", {"swaps refused": swaps})


async def test_a_row_moved_to_another_scope_under_its_own_key_and_op_is_refused() -> None:
    store, memory = await opened()
    await store.commit("main", {A: ROW}, {}, op=Op("w", 1))
    put_back(memory, A, lying(memory, A), "other")
    await refused(store, A, "other")


@pytest.mark.parametrize("op", [Op("w", 2), Op("v", 1), Op("w", 11), Op("", 1)])
async def test_a_row_under_another_op_is_refused(op: Op) -> None:
    store, memory = await opened()
    await store.commit("main", {A: ROW}, {}, op=Op("w", 1))
    whole = lying(memory, A)
    inside = whole.payload.replace(b'"op":["w",1]', b'"op":["%b",%d]' % (op.writer.encode(), op.n))
    for payload in (whole.payload, inside):
        put_back(memory, A, Record(payload, whole.version, op))
        await refused(store, A)


@pytest.mark.parametrize("separator", ["", ",", ":", "1:a,", "/"])
def test_no_two_places_share_their_associated_data(separator: str) -> None:
    """The same characters cut elsewhere into scope, domain, entity name and id are another place."""
    store = Encrypted(MemoryBackend(), ring())
    op = Op("w", 1)
    places = []
    for cuts in itertools.combinations(range(1, 6), 3):
        scope, *key = (separator.join("aaaaaa"[a:b]) for a, b in itertools.pairwise((0, *cuts, 6)))
        places.append((scope, Key(*key)))
    for (scope, key), other in itertools.permutations(places, 2):
        record = Record(store.sealed(scope, key, op, b"{}"), 1, op)
        assert store.opened(scope, key, record) == b"{}"
        with pytest.raises(CorruptedError, match="does not verify"):
            store.opened(*other, record)


def test_the_same_op_gives_the_same_bytes_and_anything_else_another_nonce() -> None:
    store = Encrypted(MemoryBackend(), ring())
    again = [store.sealed("main", A, Op("w", 1), b"{}") for _ in range(2)]
    assert again[0] == again[1], "a commit that is sent again is the same commit to every copy"
    others = [
        store.sealed("main", A, Op("w", 2), b"{}"),
        store.sealed("main", A, Op("w", 1), b"[]"),
        store.sealed("main", B, Op("w", 1), b"{}"),
        store.sealed("more", A, Op("w", 1), b"{}"),
        Encrypted(MemoryBackend(), Keyring({"old": NEW})).sealed("main", A, Op("w", 1), b"{}"),
    ]
    assert len({sealed_row(A, raw).nonce for raw in (again[0], *others)}) == 1 + len(others)


async def test_a_plain_row_is_refused_and_the_store_leaves_it_where_it_is() -> None:
    memory = MemoryBackend()
    await memory.open()
    await memory.commit("main", {A: b'{"id":"s-1"}'}, {}, op=Op("w", 1))
    await memory.close()
    encrypted, _ = await opened(memory)
    error = await refused(encrypted, A)
    assert isinstance(error, LockedError)
    await encrypted.close()
    store = Store(Encrypted(memory, ring()), require=Survives.NOTHING)
    await store.open()
    with pytest.raises(CorruptedError, match="not encrypted"):
        await store.load(A)
    assert lying(memory, A).payload == b'{"id":"s-1"}'
    await store.close()


async def test_a_store_without_the_keys_leaves_encrypted_rows_where_they_are() -> None:
    encrypted, memory = await opened()
    await encrypted.commit("main", {A: ROW}, {}, op=Op("w", 1))
    await encrypted.close()
    before = lying(memory, A)
    store = Store(memory, require=Survives.NOTHING)
    await store.open()
    with pytest.raises(CorruptedError, match=r"encrypted\+URL"):
        await store.load(A)
    assert lying(memory, A) == before
    await store.close()


async def test_a_missing_key_is_named_by_its_id_with_the_remedy_and_the_row_stays() -> None:
    encrypted, memory = await opened()
    await encrypted.commit("main", {A: ROW, B: ROW}, {}, op=Op("w", 1))
    await encrypted.close()
    store = Store(Encrypted(memory, ring(new=NEW, third=bytes(32))), require=Survives.NOTHING)
    await store.open()
    with pytest.raises(CorruptedError, match=r"key id 'old', which is not among the keys \(new, third\): add that key"):
        await store.load(A, B)
    assert set(store.damaged) == {A, B}, "all of them are named at once"
    assert len([key async for key in memory.keys("main", KeyPrefix("quarantine"))]) == 0
    await store.close()


async def test_a_newer_format_asks_for_an_upgrade() -> None:
    store, memory = await opened()
    await store.commit("main", {A: ROW}, {}, op=Op("w", 1))
    whole = lying(memory, A)
    put_back(memory, A, whole._replace(payload=whole.payload.replace(b'"_encrypted":1', b'"_encrypted":2')))
    with pytest.raises(NewerFormatError, match="upgrade"):
        await store.read("main", [A])


async def test_a_payload_over_the_limit_is_refused_before_anything_changes() -> None:
    store, memory = await opened()
    with pytest.raises(InvalidInputError, match="base64"):
        await store.commit("main", {A: b"{}", B: b" " * (MAX_PLAIN_BYTES + 1)}, {}, op=Op("w", 1))
    assert (await memory.head("main")).number == 0
    longest = Op('"' * 250, 2**63 - 1)
    await store.commit("main", {B: b" " * MAX_PLAIN_BYTES}, {}, op=longest)
    assert len((await store.read("main", [B]))[B].payload) == MAX_PLAIN_BYTES


@pytest.mark.parametrize("payload", ["text", 7, bytearray(b"{}")])
async def test_a_payload_that_is_not_bytes_is_refused(payload: Any) -> None:
    store, memory = await opened()
    with pytest.raises(InvalidInputError, match="give bytes"):
        await store.commit("main", {A: payload}, {}, op=Op("w", 1))
    with pytest.raises(InvalidInputError):
        await store.commit("main", {A: b"{}"}, {}, op=Op("\ud800", 1))
    assert (await memory.head("main")).number == 0


# ---------------------------------------------------------------------- the store above


async def test_one_changed_row_among_many_goes_to_quarantine_with_its_exact_bytes() -> None:
    """In one commit, as every row that cannot be trusted; the others can still be read, and nothing is lost."""
    store, memory = await _store_of_signals(5)
    keys = await store.keys(KeyPrefix("signal"))
    bad, worse = keys[1], keys[3]
    for key in (bad, worse):
        lies = lying(memory, key)
        put_back(memory, key, lies._replace(payload=lies.payload[:-3] + b'X"}'))
    damaged = {key: lying(memory, key).payload for key in (bad, worse)}
    assert list(await store.scan("signal")) == [keys[0], keys[2], keys[4]]
    for key in (bad, worse):
        kept = await store.quarantined(key.domain, key.entity_name)
        rows = [loaded.row for loaded in kept.values()]
        assert all(isinstance(row, Quarantined) for row in rows)
        assert kept_bytes(rows) == damaged[key]
        with pytest.raises(CorruptedError, match="does not verify"):
            await store.load(key)
    await store.close()


async def test_bytes_from_quarantine_can_still_be_decrypted_because_they_name_their_op() -> None:
    store, memory = await _store_of_signals(1)
    (key,) = await store.keys(KeyPrefix("signal"))
    whole = lying(memory, key)
    await store.quarantine(key, "the operator's hand")
    kept = kept_bytes([loaded.row for loaded in (await store.quarantined(key.domain, key.entity_name)).values()])
    assert b'"priceOpen"' in kept
    row = sealed_row(key, whole.payload)
    assert Op(*row.op) == whole.op
    await store.close()


async def _store_of_signals(count: int) -> tuple[Store, MemoryBackend]:
    memory = MemoryBackend()
    store = Store(Encrypted(memory, ring()), require=Survives.NOTHING)
    await store.open()
    lane = store.writer("test")
    for n in range(count):
        context = Context("binance", f"S{n}USDT", "my-strategy")
        row = from_mapping("signal", signal(symbol=context.symbol))
        await lane.commit({context_key("signal", context): row})
    return store, memory


# ---------------------------------------------------------------------- the witness


def witnessed(inner: Any, path: Path) -> Encrypted:
    return Encrypted(inner, ring(), witness=path)


async def test_without_a_witness_an_older_row_is_believed_and_the_guarantees_say_so(tmp_path: Path) -> None:
    memory = MemoryBackend()
    store = Encrypted(memory, ring())
    promised = await store.open()
    assert any("without a witness" in warning for warning in promised.warnings)
    await store.commit("main", {A: b"1"}, {}, op=Op("w", 1))
    old = lying(memory, A)
    await store.commit("main", {A: b"2"}, {}, op=Op("w", 2))
    put_back(memory, A, old)
    assert (await store.read("main", [A]))[A].payload == b"1"
    await store.close()
    promised = await witnessed(memory, tmp_path / "w").open()
    assert not any("without a witness" in warning for warning in promised.warnings)


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("version", [1, 3, 9])
async def test_an_older_row_put_back_is_found(version: int, restart: bool, tmp_path: Path) -> None:
    """With its old version, with the newest, and with one made up, by its own writer's numbers."""
    memory = MemoryBackend()
    store = witnessed(memory, tmp_path / "w")
    await store.open()
    await store.commit("main", {A: b"1"}, {}, op=Op("w", 1))
    old = lying(memory, A)
    await store.commit("main", {B: b"1"}, {}, op=Op("w", 2))
    await store.commit("main", {A: b"2"}, {}, op=Op("w", 3))
    if restart:
        await store.close()
        store = witnessed(memory, tmp_path / "w")
        await store.open()
    put_back(memory, A, old._replace(version=version))
    error = await refused(store, A)
    assert "an older row was put back" in str(error)
    assert (await store.read("main", [B]))[B].payload == b"1"
    await store.close()


async def test_a_deleted_row_put_back_is_found_and_a_new_one_is_not_mistaken_for_it(tmp_path: Path) -> None:
    memory = MemoryBackend()
    store = witnessed(memory, tmp_path / "w")
    await store.open()
    await store.commit("main", {A: b"1"}, {}, op=Op("w", 1))
    old = lying(memory, A)
    await store.commit("main", {A: None}, {}, op=Op("w", 2))
    put_back(memory, A, old)
    await refused(store, A)
    del memory._state.scope("main").rows[A]
    await store.commit("main", {A: b"1"}, {A: 0}, op=Op("w", 3))
    assert (await store.read("main", [A]))[A].payload == b"1"
    await store.close()


@pytest.mark.parametrize("kind", ["file", "sqlite"])
async def test_a_whole_store_put_back_is_refused_at_open_until_the_witness_is_moved_away(
    kind: str, tmp_path: Path
) -> None:
    import shutil

    make: dict[str, Callable[[], Any]] = {
        "file": lambda: FileBackend(tmp_path / "data"),
        "sqlite": lambda: SqliteBackend(tmp_path / "data"),
    }
    witness = tmp_path / "w"

    async def commit(n: int) -> None:
        store = witnessed(make[kind](), witness)
        await store.open()
        await store.commit("main", {A: b"%d" % n}, {}, op=Op("w", n))
        await store.close()

    await commit(1)
    copy = shutil.copytree if kind == "file" else shutil.copy
    copy(tmp_path / "data", tmp_path / "backup")
    await commit(2)
    if kind == "file":
        shutil.rmtree(tmp_path / "data")
    copy(tmp_path / "backup", tmp_path / "data")
    for _ in range(2):
        with pytest.raises(CorruptedError, match=r"scope main stands at commit 1, but .* has seen 2"):
            await commit(3)
    store = witnessed(make[kind](), witness)
    promised = await store.open(read_only=True)
    assert any("stands at commit 1" in warning for warning in promised.warnings), "people may look at it"
    await store.close()
    witness.rename(tmp_path / "moved")
    await commit(3)


async def test_a_store_that_falls_back_while_it_is_open_is_found_by_its_head(tmp_path: Path) -> None:
    memory = MemoryBackend()
    store = witnessed(memory, tmp_path / "w")
    await store.open()
    for n in (1, 2):
        await store.commit("main", {A: b"1"}, {}, op=Op("w", n))
    memory._state.scope("main").number = 1
    with pytest.raises(CorruptedError, match="has seen 2"):
        await store.head("main")
    await store.close()


async def test_a_commit_that_failed_or_conflicted_is_not_noted(tmp_path: Path) -> None:
    faulty = FaultyBackend(MemoryBackend(), Fault(2, "unavailable"))
    store = witnessed(faulty, tmp_path / "w")
    await store.open()
    await store.commit("main", {A: b"1"}, {}, op=Op("w", 1))
    with pytest.raises(UnavailableError):
        await store.commit("main", {A: b"2"}, {}, op=Op("w", 2))
    with pytest.raises(ConflictError):
        await store.commit("main", {A: b"2"}, {A: 7}, op=Op("w", 2))
    assert store.witness is not None
    assert store.witness.floor("main") == 1
    assert (await store.read("main", [A]))[A].payload == b"1"
    await store.close()


async def test_a_repeated_op_raises_no_alarm_though_its_row_was_written_since(tmp_path: Path) -> None:
    store, _ = await opened(witness=tmp_path / "w")
    await store.commit("main", {A: b"1"}, {}, op=Op("v", 1))
    await store.commit("main", {A: b"2"}, {}, op=Op("w", 1))
    assert await store.commit("main", {A: b"1"}, {}, op=Op("v", 1)) == 1
    assert (await store.read("main", [A]))[A].payload == b"2"
    await store.close()


class _Slow(Around):
    """Answers reads with what was there when they began, but only when told to."""

    def __init__(self, backend: Any) -> None:
        super().__init__(backend)
        self.go_on = asyncio.Event()
        self.reading = asyncio.Event()

    async def read(self, scope: str, keys: Any) -> Any:
        found = await super().read(scope, keys)
        self.reading.set()
        await self.go_on.wait()
        return found

    async def head(self, scope: str) -> Any:
        found = await super().head(scope)
        self.reading.set()
        await self.go_on.wait()
        return found


@pytest.mark.parametrize("what", ["read", "head"])
async def test_a_read_that_a_commit_overtakes_is_no_alarm(what: str, tmp_path: Path) -> None:
    slow = _Slow(MemoryBackend())
    slow.go_on.set()
    store = witnessed(slow, tmp_path / "w")
    await store.open()
    await store.commit("main", {A: b"1"}, {}, op=Op("w", 1))
    slow.go_on.clear()
    slow.reading.clear()
    call = asyncio.ensure_future(store.read("main", [A]) if what == "read" else store.head("main"))
    await slow.reading.wait()
    await store.commit("main", {A: b"2"}, {}, op=Op("w", 2))
    slow.go_on.set()
    assert await call
    assert (await store.read("main", [A]))[A].payload == b"2"
    await store.close()


async def test_what_a_crash_keeps_from_the_witness_is_no_alarm(tmp_path: Path) -> None:
    """It lags, and never runs ahead: the file is written after the store has acknowledged."""
    memory = MemoryBackend()
    store = witnessed(memory, tmp_path / "w")
    await store.open()
    await store.commit("main", {A: b"1"}, {}, op=Op("w", 1))
    assert store.witness is not None
    await store.witness.flush()
    image = (tmp_path / "w").read_bytes()
    await store.commit("main", {A: b"2", B: b"2"}, {}, op=Op("w", 2))
    await store.close()
    (tmp_path / "w").write_bytes(image)
    (tmp_path / "w.new").write_bytes(b'{"half')
    store = witnessed(memory, tmp_path / "w")
    await store.open()
    assert (await store.read("main", [A]))[A].payload == b"2"
    assert store.witness is not None
    assert store.witness.floor("main") == 2
    await store.close()


async def test_the_witness_is_written_soon_after_a_commit_without_being_asked(tmp_path: Path) -> None:
    from holdfast.wrappers.witness import Witness

    store, _ = await opened(witness=tmp_path / "w")
    store.witness = Witness(tmp_path / "w", flush_seconds=0.0)
    await store.witness.open("memory", read_only=False)
    await store.commit("main", {A: b"1"}, {}, op=Op("w", 1))
    async with asyncio.timeout(10):
        # Another thread writes it.
        while b'"main":1' not in (tmp_path / "w").read_bytes():  # noqa: ASYNC110
            await asyncio.sleep(0.005)
    await store.close()


async def test_processes_that_share_a_witness_add_what_they_know(tmp_path: Path) -> None:
    one, two = MemoryBackend(), MemoryBackend()
    path = tmp_path / "w"
    first, second = witnessed(one, path), witnessed(two, path)  # the same name, "memory": as two processes of one store
    two._state = one._state
    await first.open()
    await second.open()
    await first.commit("main", {A: b"1"}, {}, op=Op("a", 1))
    old = lying(one, A)
    await first.commit("main", {A: b"2"}, {}, op=Op("a", 2))
    await second.commit("other", {B: b"1"}, {}, op=Op("b", 1))
    await first.close()
    await second.close()
    third = witnessed(one, path)
    await third.open()
    assert third.witness is not None
    assert third.witness.scopes == {"main": 2, "other": 1}
    put_back(one, A, old)
    await refused(third, A)
    await third.close()


async def test_the_witness_keeps_a_bounded_number_of_rows_and_forgets_deleted_ones_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("holdfast.wrappers.witness.MAX_ROWS", 10)
    store, memory = await opened(witness=tmp_path / "w")
    assert store.witness is not None
    await store.commit("main", {A: b"1"}, {}, op=Op("w", 1))
    old = lying(memory, A)
    await store.commit("main", {A: b"2"}, {}, op=Op("w", 2))
    for n in range(3, 60):
        key = Key("outbox", "BTCUSDT_a_x", f"{n:012d}")
        await store.commit("main", {key: b"1"}, {}, op=Op("w", n * 2))
        await store.commit("main", {key: None}, {}, op=Op("w", n * 2 + 1))
        await store.witness.flush()
    assert len(store.witness._rows) <= 20
    await store.close()
    assert (tmp_path / "w").read_bytes().count(b'":[') == 10
    again, _ = await opened(memory, witness=tmp_path / "w")
    put_back(memory, A, old)
    await refused(again, A)
    await again.close()


@pytest.mark.parametrize("content", [b"", b"{}", b'{"format":1,"stores":{}}\n00000000\n'])
async def test_a_damaged_witness_is_refused_and_the_store_is_let_go(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "w").write_bytes(content)
    store = witnessed(FileBackend(tmp_path / "data"), tmp_path / "w")
    with pytest.raises(CorruptedError, match="is damaged"):
        await store.open()
    assert (tmp_path / "w").read_bytes() == content
    (tmp_path / "w").unlink()
    await store.open()
    await store.close()


async def test_a_witness_that_cannot_be_written_is_refused_at_open_and_told_later(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = witnessed(MemoryBackend(), tmp_path / "missing" / "w")
    with pytest.raises(InvalidInputError, match="cannot be written"):
        await store.open()
    (tmp_path / "there").mkdir()
    store = witnessed(MemoryBackend(), tmp_path / "there" / "w")
    await store.open()
    (tmp_path / "there").rename(tmp_path / "gone")
    await store.commit("main", {A: b"1"}, {}, op=Op("w", 1))
    with caplog.at_level(logging.WARNING, "holdfast"):
        await store.close()
    assert "could not be written" in caplog.text


async def test_read_only_writes_no_witness(tmp_path: Path) -> None:
    memory = MemoryBackend()
    store = witnessed(memory, tmp_path / "w")
    await store.open(read_only=True)
    await store.read("main", [A])
    await store.close()
    assert not (tmp_path / "w").exists()


# ---------------------------------------------------------------------- the keys


def b64(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b64(CANARY), "entry 1 is not id=base64"),
        (f"k={b64(OLD)},{b64(CANARY)}", "entry 2 is not id=base64"),
        (f"{b64(CANARY)}=k", "entry 1 is not id=base64"),
        (f"a b={b64(CANARY)}", "entry 1 is not id=base64"),
        (f"{'k' * 33}={b64(CANARY)}", "entry 1 is not id=base64"),
        (f"k={b64(CANARY[:31])}", "'k' is 31 bytes"),
        (f"k={b64(CANARY + b'x')}", "'k' is 33 bytes"),
        (f"k={b64(CANARY)[:-2]}!=", "'k' is not base64"),
        (f"k={b64(CANARY)},k={b64(OLD)}", "'k' stands twice"),
        (f"k={b64(CANARY)},l={b64(CANARY)}", "'k' and 'l' are the same"),
        ("k=", "entry 1 is not id=base64"),
        ("  ", "is not set"),
    ],
)
def test_keys_that_cannot_be_used_are_refused_without_being_shown(
    text: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOLDFAST_KEYS", text)
    with pytest.raises(InvalidInputError, match="HOLDFAST_KEYS") as caught:
        Keyring.from_env()
    assert said in str(caught.value)
    _require_no_canary(caught.value, extra=text.strip() or "-")


def _require_no_canary(error: BaseException, extra: str = "") -> None:
    """Neither the message nor a traceback with the locals of our frames shows key material."""
    ours = "".join(
        "".join(traceback.StackSummary.from_list([frame]).format())
        for frame in traceback.TracebackException.from_exception(error, capture_locals=True).stack
        if "/holdfast/" in frame.filename
    )
    shown = "\n".join([str(error), repr(error), ours])
    for form in (CANARY.decode(), b64(CANARY), b64(CANARY).rstrip("="), repr(CANARY), CANARY.hex(), extra):
        if len(form) > 20:
            assert form not in shown


async def test_no_error_log_or_repr_shows_a_key(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    caplog.set_level(logging.DEBUG)
    keys = Keyring({"k": CANARY, "l": NEW})
    memory = MemoryBackend()
    store = Encrypted(memory, keys, witness=tmp_path / "w")
    shown = [repr(keys), str(keys), repr(store), repr(keys.current), f"{vars(store)}"]
    promised = await store.open()
    await store.commit("main", {A: ROW}, {}, op=Op("w", 1))
    whole = lying(memory, A)
    errors: list[HoldfastError] = []
    for payload in (whole.payload[:-3] + b'A"}', b"{}", b"\0", whole.payload.replace(b'"k"', b'"m"')):
        put_back(memory, A, whole._replace(payload=payload))
        errors.append(await refused(store, A))
    for bad in ({"k": CANARY[:5]}, {"": CANARY}, {"k": CANARY.decode()}, [CANARY], {"k": bytearray(CANARY)}):
        with pytest.raises(InvalidInputError) as caught:
            Keyring(bad)  # type: ignore[arg-type]
        errors.append(caught.value)
    with pytest.raises(InvalidInputError) as caught:
        await store.commit("main", {A: b" " * (MAX_PLAIN_BYTES + 1)}, {}, op=Op("w", 2))
    errors.append(caught.value)
    await store.close()
    for error in errors:
        _require_no_canary(error)
    shown += [caplog.text, f"{promised}", (tmp_path / "w").read_text(), lying(memory, A).payload.decode()]
    for text in shown:
        for form in (CANARY.decode(), b64(CANARY), CANARY.hex()):
            assert form not in text
    assert repr(keys) == "Keyring(k, l; current: k)"


@pytest.mark.parametrize("form", ["mapping", "text", "sync", "async"])
async def test_keys_come_from_a_mapping_a_text_or_a_function(form: str) -> None:
    asked = 0

    def give() -> Mapping[str, bytes]:
        nonlocal asked
        asked += 1
        return {"new": NEW, "old": OLD}

    async def give_later() -> str:
        nonlocal asked
        asked += 1
        return f"new={b64(NEW)}, old={b64(OLD)},"

    sources: dict[str, Any] = {"mapping": give(), "text": await give_later(), "sync": give, "async": give_later}
    asked = 0
    keys = Keyring(sources[form])
    store = Encrypted(MemoryBackend(), keys)
    await store.open()
    assert keys.ids == ("new", "old")
    assert asked == (form in ("sync", "async"))
    await store.commit("main", {A: ROW}, {}, op=Op("w", 1))
    assert (await store.read("main", [A]))[A].payload == ROW
    await store.close()


async def test_a_function_for_the_keys_that_fails_opens_nothing() -> None:
    def fails() -> Mapping[str, bytes]:
        raise OSError("the vault is closed")

    memory = MemoryBackend()
    with pytest.raises(UnavailableError, match="OSError") as caught:
        await Encrypted(memory, Keyring(fails)).open()
    assert isinstance(caught.value.__cause__, OSError)
    await memory.open()  # it was not opened
    with pytest.raises(InvalidInputError, match="returned: keys come as a mapping"):
        await Encrypted(MemoryBackend(), Keyring(lambda: None)).open()  # type: ignore[arg-type,return-value]
    with pytest.raises(InvalidInputError, match="empty"):
        await Encrypted(MemoryBackend(), Keyring({})).open()
    with pytest.raises(InvalidInputError, match="pass a Keyring"):
        Encrypted(MemoryBackend(), {"k": OLD})  # type: ignore[arg-type]


def test_a_fresh_key_is_one_that_the_environment_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = {new_entry() for _ in range(3)}
    assert len(entries) == 3
    monkeypatch.setenv("HOLDFAST_KEYS", ",".join(sorted(entries)))
    assert len(Keyring.from_env().ids) == 3


def test_without_the_package_one_clear_error_names_the_extra() -> None:
    code = (
        "import os, sys; sys.modules['cryptography'] = None\n"
        f"os.environ['HOLDFAST_KEYS'] = {new_entry()!r}\n"
        "from holdfast.urls import open_backend\n"
        "open_backend('encrypted+memory:')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "holdfast.errors.InvalidInputError" in done.stderr
    assert "pip install 'holdfast[encryption]'" in done.stderr
