"""Encryption: what is changed, moved or put in another's place is refused, and nothing is lost."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from encrypted_kit import NEW, ROW, A, B, C, lying, opened, put_back, refused, ring
from process_store import signal

from holdfast.backends.memory import MemoryBackend
from holdfast.contract import Key, KeyPrefix, Op, Record, Survives
from holdfast.domains import context_key, from_mapping
from holdfast.errors import (
    CorruptedError,
    InvalidInputError,
    LockedError,
    NewerFormatError,
)
from holdfast.names import Context
from holdfast.quarantine import kept_bytes
from holdfast.rows import Quarantined
from holdfast.store import Store
from holdfast.wrappers.encrypted import MAX_PLAIN_BYTES, Encrypted, sealed_row
from holdfast.wrappers.keyring import Keyring

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
        scope, *names = (separator.join("aaaaaa"[a:b]) for a, b in itertools.pairwise((0, *cuts, 6)))
        places.append((scope, Key(*names)))
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
