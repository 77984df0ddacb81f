"""Conformance checks that need no concurrency: versions, expect, ops, keys, scopes, reopening."""

from __future__ import annotations

from collections.abc import Awaitable

from ..contract import MAX_WRITERS, Backend, Key, KeyPrefix, Op, Record, WriterOp
from ..errors import ConflictError, FailedError, HeldError, HoldfastError, InvalidInputError
from .conformance import Bench, Need, check


async def refused_with(kind: type[HoldfastError], call: Awaitable[object]) -> HoldfastError:
    """Return the error that ``call`` raises; it must be of this kind."""
    try:
        answer = await call
    except kind as error:
        return error
    raise AssertionError(f"expected {kind.__name__}, got the answer {answer!r:.80}")


async def listed(backend: Backend, scope: str, prefix: KeyPrefix = KeyPrefix()) -> list[Key]:
    """Return what ``keys`` yields."""
    return [key async for key in backend.keys(scope, prefix)]


@check()
async def absent_keys_are_absent(bench: Bench) -> None:
    backend = await bench.open()
    assert await backend.read(bench.scope, list(bench.keys)) == {}
    assert await backend.read(bench.scope, []) == {}
    await bench.put(backend, {0: 1})
    assert set(await backend.read(bench.scope, list(bench.keys))) == {bench.keys[0]}


@check()
async def a_record_carries_payload_version_and_op(bench: Bench) -> None:
    backend = await bench.open()
    op = bench.op()
    number = await bench.put(backend, {0: 7}, op=op)
    assert await bench.get(backend, 0) == Record(bench.payload(0, 7), number, op)


@check()
async def commits_are_counted_one_by_one(bench: Bench) -> None:
    backend = await bench.open()
    numbers = [await bench.put(backend, {i % 3: i}) for i in range(6)]
    assert numbers == [1, 2, 3, 4, 5, 6]
    versions = [record.version for i in range(3) if (record := await bench.get(backend, i))]
    assert versions == [4, 5, 6], "a record's version is the number of the commit that wrote it"


@check(Need.ATOMIC)
async def several_rows_of_a_commit_share_its_number(bench: Bench) -> None:
    backend = await bench.open()
    await bench.put(backend, {0: 1, 1: 1})
    number = await bench.put(backend, {0: None, 1: 2, 2: 2, 3: 2})
    found = await backend.read(bench.scope, list(bench.keys))
    assert {key: record.version for key, record in found.items()} == dict.fromkeys(bench.keys[1:4], number)


@check()
async def payloads_come_back_byte_for_byte(bench: Bench) -> None:
    backend = await bench.open()
    for payload in (*bench.material.odd_payloads, *(bench.payload(0, i) for i in range(3))):
        await backend.commit(bench.scope, {bench.keys[0]: payload}, {}, op=bench.op())
        record = await bench.get(backend, 0)
        assert record is not None
        assert record.payload == payload


@check()
async def none_deletes_and_deleting_the_absent_is_allowed(bench: Bench) -> None:
    backend = await bench.open()
    await bench.put(backend, {0: 1})
    await bench.put(backend, {0: None})
    assert await bench.get(backend, 0) is None
    assert await bench.put(backend, {0: None}) == 3


@check()
async def expect_zero_means_absent(bench: Bench) -> None:
    backend = await bench.open()
    version = await bench.put(backend, {0: 1}, {0: 0})
    await refused_with(ConflictError, bench.put(backend, {0: 2}, {0: 0}))
    await bench.put(backend, {0: None}, {0: version})
    await bench.put(backend, {0: 3}, {0: 0})


@check()
async def a_version_never_comes_back(bench: Bench) -> None:
    backend = await bench.open()
    old = await bench.put(backend, {0: 1})
    await bench.put(backend, {0: None})
    new = await bench.put(backend, {0: 1})
    assert new > old
    await refused_with(ConflictError, bench.put(backend, {0: 2}, {0: old}))
    await bench.put(backend, {0: 2}, {0: new})


@check()
async def expect_guards_rows_that_are_not_written(bench: Bench) -> None:
    backend = await bench.open()
    version = await bench.put(backend, {0: 1})
    await bench.put(backend, {1: 1}, {0: version})
    await bench.put(backend, {0: 2})
    await refused_with(ConflictError, bench.put(backend, {1: 2}, {0: version}))
    record = await bench.get(backend, 1)
    assert record is not None
    assert record.payload == bench.payload(1, 1)


@check()
async def a_conflict_names_the_keys_and_changes_nothing(bench: Bench) -> None:
    backend = await bench.open()
    first = await bench.put(backend, {0: 1})
    second = await bench.put(backend, {1: 1})
    before = await backend.head(bench.scope)
    error = await refused_with(ConflictError, bench.put(backend, {0: 2, 1: 2, 2: 2}, {0: second, 1: second, 2: 9}))
    assert isinstance(error, ConflictError)
    assert set(error.keys) == {bench.keys[0], bench.keys[2]}, "exactly the keys that did not match"
    found = await backend.read(bench.scope, list(bench.keys))
    assert {key: record.version for key, record in found.items()} == {bench.keys[0]: first, bench.keys[1]: second}
    assert await backend.head(bench.scope) == before, "a refused commit has no number and no op"


@check()
async def a_refused_op_can_be_used_again(bench: Bench) -> None:
    backend = await bench.open()
    op = bench.op()
    await refused_with(ConflictError, bench.put(backend, {0: 1}, {0: 5}, op=op))
    number = await bench.put(backend, {0: 2}, {0: 0}, op=op)
    assert await bench.get(backend, 0) == Record(bench.payload(0, 2), number, op)


@check()
async def a_repeated_op_gets_its_number_and_is_not_applied_again(bench: Bench) -> None:
    backend = await bench.open()
    op = bench.op()
    number = await bench.put(backend, {0: 1}, {0: 0}, op=op)
    assert await bench.put(backend, {0: 1}, {0: 0}, op=op) == number
    other = await bench.put(backend, {0: 2}, op=bench.op("another"))
    assert await bench.put(backend, {0: 1}, {0: 0}, op=op) == number, "though its expect does not hold any more"
    record = await bench.get(backend, 0)
    assert record is not None
    assert (record.version, record.payload) == (other, bench.payload(0, 2))


@check()
async def an_op_lower_than_the_last_is_refused(bench: Bench) -> None:
    backend = await bench.open()
    await bench.put(backend, {0: 1}, op=Op("w", 5))
    await refused_with(ConflictError, bench.put(backend, {0: 2}, op=Op("w", 4)))
    await bench.put(backend, {0: 3}, op=Op("w", 9))  # numbers may be left out
    await bench.put(backend, {0: 4}, op=Op("v", 1))  # each writer counts alone
    record = await bench.get(backend, 0)
    assert record is not None
    assert record.payload == bench.payload(0, 4)


@check(Need.LISTS)
async def an_empty_commit_counts(bench: Bench) -> None:
    backend = await bench.open()
    assert await bench.put(backend, {}) == 1
    version = await bench.put(backend, {0: 1})
    assert await bench.put(backend, {}, {0: version}, op=Op("e", 1)) == 3
    await refused_with(ConflictError, bench.put(backend, {}, {0: 0}))
    head = await backend.head(bench.scope)
    assert (head.number, head.writers["e"]) == (3, WriterOp(1, 3))


@check(Need.LISTS)
async def head_tells_the_number_and_each_writers_last_op(bench: Bench) -> None:
    backend = await bench.open()
    nothing = await backend.head("never-used")
    assert (nothing.number, dict(nothing.writers)) == (0, {})
    await bench.put(backend, {0: 1}, op=Op("a", 1))
    await bench.put(backend, {0: 2}, op=Op("b", 4))
    await bench.put(backend, {0: 3}, op=Op("a", 2))
    head = await backend.head(bench.scope)
    assert (head.number, dict(head.writers)) == (3, {"a": WriterOp(2, 3), "b": WriterOp(4, 2)})


@check(Need.LISTS)
async def the_writer_that_wrote_longest_ago_is_forgotten_first(bench: Bench) -> None:
    import asyncio

    backend = await bench.open()
    await bench.put(backend, {0: 1}, {0: 0}, op=Op("oldest", 1))
    await bench.put(backend, {1: 1}, op=Op("second", 1))
    last = await bench.put(backend, {1: 2}, op=Op("oldest", 2))  # no longer the oldest
    for start in range(0, MAX_WRITERS - 1, 512):
        some = range(start, min(start + 512, MAX_WRITERS - 1))
        await asyncio.gather(*(bench.put(backend, {}, op=Op(f"w{i}", 1)) for i in some))
    head = await backend.head(bench.scope)
    assert len(head.writers) == MAX_WRITERS
    assert head.writers["oldest"] == WriterOp(2, last)
    assert "second" not in head.writers


@check(Need.LISTS)
async def keys_come_in_byte_order_and_under_their_prefix(bench: Bench) -> None:
    backend = await bench.open()
    for at in reversed(range(len(bench.keys))):
        await bench.put(backend, {at: 1})
    assert await listed(backend, bench.scope) == list(bench.keys)
    for key in bench.keys:
        for prefix in (KeyPrefix(key.domain), KeyPrefix(key.domain, key.entity_name)):
            assert await listed(backend, bench.scope, prefix) == [k for k in bench.keys if prefix.matches(k)]
    assert await listed(backend, bench.scope, KeyPrefix("nowhere")) == []
    await bench.put(backend, {0: None})
    assert await listed(backend, bench.scope) == list(bench.keys[1:])


@check(Need.LISTS)
async def keys_are_complete_while_others_commit(bench: Bench) -> None:
    backend = await bench.open()
    for at in range(len(bench.keys)):
        await bench.put(backend, {at: 1})
    seen: list[Key] = []
    async for key in backend.keys(bench.scope):
        seen.append(key)
        await bench.put(backend, {0: None if len(seen) % 2 else 2, len(bench.keys) - 1: len(seen)})
    assert seen == sorted(set(seen)), "in byte order, none twice"
    assert set(seen) >= set(bench.keys[1:]), "a key that is there all the time is yielded"


@check(Need.LISTS)
async def scopes_do_not_touch_each_other(bench: Bench) -> None:
    backend = await bench.open()
    one, two = bench.keys[:2]
    await backend.commit("one", {one: bench.payload(0, 1)}, {}, op=Op("w", 1))
    assert await backend.commit("two.b", {two: bench.payload(1, 1)}, {two: 0}, op=Op("w", 1)) == 1
    await backend.commit("one", {one: bench.payload(0, 2)}, {}, op=Op("w", 2))
    assert ((await backend.head("one")).number, (await backend.head("two.b")).number) == (2, 1)
    assert set(await backend.read("one", [one, two])) == {one}
    assert set(await backend.read("two.b", [one, two])) == {two}
    assert (await listed(backend, "one"), await listed(backend, "two.b")) == ([one], [two])
    assert [scope async for scope in backend.scopes()] == ["one", "two.b"]


@check()
async def a_payload_over_the_limit_is_refused_and_one_at_it_is_kept(bench: Bench) -> None:
    backend = await bench.open()
    await bench.put(backend, {0: 1})
    largest = b'"' + b"x" * (bench.material.most_bytes - 2) + b'"'
    changes = {bench.keys[0]: largest + b" ", bench.keys[1]: bench.payload(1, 1)}
    await refused_with(InvalidInputError, backend.commit(bench.scope, changes, {}, op=bench.op()))
    assert await bench.get(backend, 1) is None
    record = await bench.get(backend, 0)
    assert record is not None
    assert record.payload == bench.payload(0, 1)
    if bench.material.free:
        await backend.commit(bench.scope, {bench.keys[0]: largest}, {}, op=bench.op())
        record = await bench.get(backend, 0)
        assert record is not None
        assert record.payload == largest


@check()
async def unquoted_keys_and_bad_scopes_are_refused(bench: Bench) -> None:
    backend = await bench.open()
    good = bench.keys[0]
    for part in ("", "..", ".hidden", "a/b", "a\0b", "a b", "é", "x" * 251):
        for bad in (
            Key(part, good.entity_name, good.entity_id),
            Key(good.domain, part, "x"),
            Key(good.domain, "x", part),
        ):
            await refused_with(InvalidInputError, backend.commit(bench.scope, {bad: b"{}"}, {}, op=bench.op()))
    for scope in ("", "a/b", "x" * 65, "ü"):
        await refused_with(InvalidInputError, backend.commit(scope, {good: bench.payload(0, 1)}, {}, op=bench.op()))
    assert await bench.get(backend, 0) is None


@check(Need.PERSISTENT)
async def reopening_keeps_everything(bench: Bench) -> None:
    backend = await bench.open()
    await bench.put(backend, {0: 1, 1: 1, 2: 1}, op=Op("a", 1))
    await bench.put(backend, {1: None, 3: 2}, op=Op("b", 1))
    await backend.commit("other", {bench.keys[4]: bench.payload(4, 1)}, {}, op=Op("a", 1))
    found = await backend.read(bench.scope, list(bench.keys))
    heads = [await backend.head(scope) for scope in (bench.scope, "other")]
    for _ in range(3):
        await backend.close()
        backend = await bench.open()
        assert await backend.read(bench.scope, list(bench.keys)) == found
        assert [await backend.head(scope) for scope in (bench.scope, "other")] == heads
        assert await listed(backend, bench.scope) == sorted(found)
        assert [scope async for scope in backend.scopes()] == ["main", "other"]
    assert await bench.put(backend, {1: None, 3: 2}, op=Op("b", 1)) == 2, "an op is remembered across a restart"
    assert await bench.put(backend, {1: 9}, {1: 0}, op=Op("c", 1)) == 3, "a deleted key's version is not used again"


@check(Need.PERSISTENT)
async def a_reader_beside_the_owner_sees_what_was_committed_and_writes_nothing(bench: Bench) -> None:
    backend = await bench.open()
    number = await bench.put(backend, {0: 1, 1: 1})
    reader = bench.make()
    await reader.open(read_only=True)
    record = await bench.get(reader, 0)
    assert record is not None
    assert (record.version, record.payload) == (number, bench.payload(0, 1))
    await refused_with(HoldfastError, bench.put(reader, {0: 2}, op=Op("reader", 1)))
    await reader.close()
    assert await bench.put(backend, {0: 3}) == number + 1, "the owner goes on"


@check(Need.EXCLUSIVE)
async def a_second_owner_is_refused_until_the_first_closes(bench: Bench) -> None:
    backend = await bench.open()
    await bench.put(backend, {0: 1})
    second = bench.make()
    await refused_with(HeldError, second.open())
    await bench.put(backend, {0: 2})
    await backend.close()
    await second.open()
    record = await bench.get(second, 0)
    assert record is not None
    assert record.payload == bench.payload(0, 2)


@check()
async def a_closed_backend_refuses_and_closes_again(bench: Bench) -> None:
    backend = await bench.open()
    await bench.put(backend, {0: 1})
    await backend.close()
    await backend.close()
    await refused_with(FailedError, bench.get(backend, 0))
    await refused_with(FailedError, bench.put(backend, {0: 2}))
    if bench.can_list:
        await refused_with(FailedError, backend.head(bench.scope))


@check()
async def a_backend_that_was_never_opened_refuses(bench: Bench) -> None:
    await refused_with(FailedError, bench.get(bench.make(), 0))
