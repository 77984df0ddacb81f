"""Retrying: what is made again, how often, after which waits; and what never is."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from proxy import How, Proxy
from servers.shared import own_name, shared
from servers.valkey import RedisServer

from holdfast.backends.memory import MemoryBackend
from holdfast.backends.redis import RedisBackend
from holdfast.contract import Backend, Guarantees, Head, Key, KeyPrefix, Op, Record
from holdfast.errors import (
    ConflictError,
    CorruptedError,
    FailedError,
    FencedError,
    HeldError,
    HoldfastError,
    InvalidInputError,
    NotFoundError,
    UnavailableError,
    UnknownOutcomeError,
    UnsafeSettingError,
)
from holdfast.testing.faults import Fault, FaultyBackend
from holdfast.testing.steps import cancelled_at
from holdfast.wrappers.around import Around
from holdfast.wrappers.retrying import Retry, Retrying

KEY = Key("signal", "BTCUSDT_trend_binance", "BTCUSDT")
KEYS = [Key("signal", f"S{i:02}_trend_x", f"S{i:02}") for i in range(20)]
FINAL: list[type[HoldfastError]] = [
    ConflictError,
    InvalidInputError,
    FailedError,
    FencedError,
    UnsafeSettingError,
    CorruptedError,
    NotFoundError,
    HeldError,
]
"""What trying again cannot mend."""


class Clock:
    """Seconds that pass only while somebody sleeps."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        """Let the seconds pass at once."""
        self.slept.append(seconds)
        self.now += seconds
        await asyncio.sleep(0)


class Scripted(Around):
    """A backend whose calls answer as written down: an error, or what the backend says."""

    def __init__(self, *script: BaseException | type[BaseException] | str, backend: Backend | None = None) -> None:
        super().__init__(backend or MemoryBackend())
        self.script = list(script)
        self.calls: list[str] = []
        self.sent: list[tuple[str, dict[Key, bytes | None], dict[Key, int], Op]] = []
        self.looked = asyncio.Event()
        self.took_seconds = 0.0
        self.clock: Clock | None = None

    def _before(self, call: str) -> str:
        self.calls.append(call)
        if call == "head":
            self.looked.set()
        if self.clock is not None:
            self.clock.now += self.took_seconds
        turn = self.script.pop(0) if self.script else "pass"
        if isinstance(turn, str):
            return turn
        raise turn("as it was written down") if isinstance(turn, type) else turn

    async def open(self, *, read_only: bool = False) -> Guarantees:
        found = await self.backend.open(read_only=read_only)
        self._before("open")
        return found

    async def read(self, scope: str, keys: Sequence[Key]) -> dict[Key, Record]:
        self._before("read")
        return await self.backend.read(scope, keys)

    async def commit(
        self, scope: str, changes: Mapping[Key, bytes | None], expect: Mapping[Key, int], *, op: Op
    ) -> int:  # fmt: skip
        self.sent.append((scope, dict(changes), dict(expect), op))
        turn = self._before("commit")
        if turn == "lost":
            raise UnknownOutcomeError("lost on the way there")
        number = await self.backend.commit(scope, changes, expect, op=op)
        if turn == "applied":
            raise UnknownOutcomeError("lost on the way back")
        return number

    async def head(self, scope: str) -> Head:
        self._before("head")
        return await self.backend.head(scope)

    async def keys(self, scope: str, prefix: KeyPrefix = KeyPrefix()) -> AsyncIterator[Key]:
        turn = self._before("keys")
        count = 0
        async for key in self.backend.keys(scope, prefix):
            if turn == f"break {count}":
                raise UnavailableError("the page did not come")
            count += 1
            yield key

    async def scopes(self) -> AsyncIterator[str]:
        self._before("scopes")
        async for scope in self.backend.scopes():
            yield scope


def retrying(inner: Backend, clock: Clock, random: Callable[[], float] = lambda: 1.0, **options: Any) -> Retrying:
    return Retrying(inner, clock=clock, sleep=clock.sleep, random=random, **options)


async def opened(
    *script: BaseException | type[BaseException] | str, **options: Any
) -> tuple[Retrying, Scripted, Clock]:
    clock = Clock()
    inner = Scripted(backend=MemoryBackend())
    wrapper = retrying(inner, clock, **options)
    await wrapper.open()
    inner.calls.clear()
    inner.script = list(script)
    return wrapper, inner, clock


async def put(backend: Backend, n: int = 1, expect: int | None = 0) -> int:
    guard = {} if expect is None else {KEY: expect}
    return await backend.commit("main", {KEY: b'{"n":%d}' % n}, guard, op=Op("w", n))


async def listed(backend: Backend) -> list[Key]:
    return [key async for key in backend.keys("main")]


async def named(backend: Backend) -> list[str]:
    return [scope async for scope in backend.scopes()]


CALLS: dict[str, Callable[[Backend], Coroutine[Any, Any, Any]]] = {
    "open": lambda backend: backend.open(),
    "read": lambda backend: backend.read("main", [KEY]),
    "commit": put,
    "head": lambda backend: backend.head("main"),
    "keys": listed,
    "scopes": named,
}


@pytest.mark.parametrize("call", CALLS)
async def test_a_call_that_could_not_be_made_is_made_again(call: str) -> None:
    wrapper, inner, clock = await opened(UnavailableError, UnavailableError)
    if call == "open":
        await wrapper.close()
    await CALLS[call](wrapper)
    assert inner.calls == [call] * 3
    assert clock.slept == [0.05, 0.1]


@pytest.mark.parametrize("error", FINAL)
@pytest.mark.parametrize("call", CALLS)
async def test_what_was_refused_is_not_made_again(call: str, error: type[HoldfastError]) -> None:
    wrapper, inner, clock = await opened(error)
    if call == "open":
        await wrapper.close()
    with pytest.raises(error, match="written down"):
        await CALLS[call](wrapper)
    assert inner.calls == [call]
    assert clock.slept == []


@pytest.mark.parametrize("script", [["lost"], ["applied"], [UnavailableError], ["lost", UnavailableError, "applied"]])
async def test_a_guarded_commit_is_sent_again_with_its_own_op_and_guards(script: list[Any]) -> None:
    wrapper, inner, _ = await opened(*script)
    assert await put(wrapper) == 1
    assert len(inner.sent) == len(script) + 1
    assert all(sent == inner.sent[0] for sent in inner.sent)
    assert inner.sent[0][2:] == ({KEY: 0}, Op("w", 1))
    assert (await wrapper.head("main")).number == 1, "applied once"


async def test_waits_double_up_to_the_longest_and_are_drawn_from_the_whole_range() -> None:
    wrapper, _, clock = await opened(*[UnavailableError] * 9)
    await put(wrapper)
    assert clock.slept == [0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0, 2.0]
    draws = iter([0.0, 0.5, 1.0])
    wrapper, _, clock = await opened(*[UnavailableError] * 3, random=lambda: next(draws))
    await put(wrapper)
    assert clock.slept == [0.0, 0.05, 0.2]


@pytest.mark.parametrize("call", [call for call in CALLS if call != "open"])
async def test_no_attempt_begins_after_the_deadline_and_the_last_error_escapes(call: str) -> None:
    wrapper, inner, clock = await opened(*[UnavailableError(f"failure {i}") for i in range(1, 99)])
    with pytest.raises(UnavailableError) as caught:
        await CALLS[call](wrapper)
    assert sum(clock.slept) <= 30.0
    assert sum(clock.slept) + 2.0 > 30.0, "it went on as long as it could"
    assert str(caught.value) == f"failure {len(inner.calls)}"


async def test_the_time_that_attempts_take_counts() -> None:
    wrapper, inner, clock = await opened(*[UnavailableError] * 99, deadline_seconds=10.0)
    inner.clock, inner.took_seconds = clock, 4.0
    with pytest.raises(UnavailableError):
        await put(wrapper)
    assert len(inner.sent) == 3, "at 0, 4 and 8 seconds; the next would begin at 12"


async def test_without_a_deadline_nothing_is_made_again() -> None:
    wrapper, inner, _ = await opened(UnavailableError, deadline_seconds=0)
    with pytest.raises(UnavailableError):
        await put(wrapper)
    assert len(inner.sent) == 1


@pytest.mark.parametrize("first", ["lost", "applied"])
async def test_an_unknown_outcome_stays_unknown_however_often_the_store_is_unavailable_later(first: str) -> None:
    wrapper, inner, _ = await opened(first, *[UnavailableError] * 99)
    with pytest.raises(UnknownOutcomeError):
        await put(wrapper)
    assert len(inner.sent) > 10
    wrapper, inner, _ = await opened(first, HeldError)
    with pytest.raises(UnknownOutcomeError):
        await put(wrapper)
    assert len(inner.sent) == 2


async def test_a_conflict_after_an_unknown_outcome_tells_that_it_was_not_applied() -> None:
    wrapper, inner, _ = await opened("lost")
    other = inner.backend
    race = asyncio.ensure_future(put(wrapper))
    await asyncio.sleep(0)
    await other.commit("main", {KEY: b'"other"'}, {}, op=Op("other", 1))
    with pytest.raises(ConflictError):
        await race
    assert (await wrapper.read("main", [KEY]))[KEY].op == Op("other", 1)


async def test_an_unguarded_commit_of_unknown_outcome_is_looked_for_and_not_sent_again() -> None:
    wrapper, inner, _ = await opened("applied", UnavailableError)
    assert await put(wrapper, expect=None) == 1
    assert inner.calls == ["commit", "head", "head"]
    wrapper, inner, clock = await opened("lost")
    with pytest.raises(UnknownOutcomeError):
        await put(wrapper, expect=None)
    assert inner.calls == ["commit", "head", "head", "head"]
    assert len(clock.slept) == 2
    wrapper, inner, _ = await opened("lost", *[UnavailableError] * 99)
    with pytest.raises(UnknownOutcomeError):
        await put(wrapper, expect=None)
    assert len(inner.sent) == 1


async def test_an_unguarded_commit_that_lands_late_is_found() -> None:
    wrapper, inner, _ = await opened("lost")
    looking = asyncio.ensure_future(put(wrapper, expect=None))
    await inner.looked.wait()
    await put(inner.backend, expect=None)  # it was still on its way
    assert await looking == 1
    assert len(inner.sent) == 1


async def test_an_unguarded_commit_that_was_not_applied_for_certain_is_sent_again() -> None:
    wrapper, inner, _ = await opened(UnavailableError)
    assert await put(wrapper, expect=None) == 1
    assert inner.sent[0] == inner.sent[1]


async def test_a_cancelled_call_leaves_at_once_and_makes_no_further_attempt() -> None:
    for at in range(1, 30):
        wrapper, inner, _ = await opened(UnavailableError, "applied", UnavailableError)
        cancelled, number = await cancelled_at(put(wrapper), at)
        sent = len(inner.sent)
        for _ in range(5):
            await asyncio.sleep(0)
        assert len(inner.sent) == sent
        if not cancelled:
            assert (at, number, sent) == (4, 1, 4)
            return
        assert sent == at, "cancelled while it waited after that attempt"
    raise AssertionError("it never came to its end")


async def test_keys_go_on_after_the_last_one_that_was_yielded() -> None:
    wrapper, inner, clock = await opened()
    for n, key in enumerate(KEYS, 1):
        await wrapper.commit("main", {key: b"1"}, {}, op=Op("w", n))
    inner.script = ["break 7", UnavailableError, "break 7", "break 12"]
    found: list[Key] = []
    async for key in wrapper.keys("main"):
        found.append(key)
        clock.now += 1000.0  # the consumer's own time is none of its deadline
        if len(found) == 3:  # already yielded, and gone: must not shift the rest
            await inner.backend.commit("main", {KEYS[0]: None}, {}, op=Op("x", 1))
    assert found == KEYS
    assert len(clock.slept) == 4


async def test_keys_that_never_come_on_end_at_the_deadline_with_those_yielded_kept() -> None:
    wrapper, inner, clock = await opened()
    for n, key in enumerate(KEYS, 1):
        await wrapper.commit("main", {key: b"1"}, {}, op=Op("w", n))
    inner.script = ["break 5"] * 99
    found: list[Key] = []
    with pytest.raises(UnavailableError):
        async for key in wrapper.keys("main"):
            found.append(key)  # noqa: PERF401  (those before the failure count)
    assert found == KEYS[:5]
    assert 28.0 < sum(clock.slept) <= 30.0


async def test_opening_again_first_closes_what_was_half_open() -> None:
    inner = Scripted(UnavailableError, UnavailableError)  # memory refuses to be opened twice
    clock = Clock()
    wrapper = retrying(inner, clock)
    assert (await wrapper.open()).backend == "memory"
    assert inner.calls == ["open"] * 3
    await wrapper.close()


async def test_an_observer_is_told_of_each_attempt_that_is_followed_by_another() -> None:
    told: list[Retry] = []
    wrapper, _, _ = await opened(UnavailableError, "applied", observer=told.append)
    await put(wrapper)
    assert told == [
        Retry("commit", "memory", 1, 0.05, "UnavailableError"),
        Retry("commit", "memory", 2, 0.1, "UnknownOutcomeError"),
    ]


@pytest.mark.parametrize(
    "options",
    [
        {"deadline_seconds": -1},
        {"deadline_seconds": float("nan")},
        {"first_delay_seconds": 0},
        {"first_delay_seconds": 3},
        {"most_delay_seconds": float("inf")},
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(InvalidInputError, match="_seconds is"):
        Retrying(MemoryBackend(), **options)  # type: ignore[arg-type]


async def test_a_bot_above_never_sees_a_store_that_is_away_now_and_then() -> None:
    """Every fifth call fails in one of three ways; 200 commits by four writers are applied once each."""
    faults = [
        Fault(at, kind)  # type: ignore[arg-type]
        for at, kind in zip(range(2, 2000, 5), ["unavailable", "unknown_lost", "unknown_applied"] * 133, strict=False)
    ]
    clock = Clock()
    backend = retrying(FaultyBackend(MemoryBackend(), *faults), clock)
    await backend.open()

    async def lane(number: int) -> None:
        version = 0
        for n in range(1, 51):
            version = await backend.commit(
                "main", {KEYS[number]: b"%d" % n}, {KEYS[number]: version}, op=Op(f"w{number}", n)
            )

    await asyncio.gather(*(lane(number) for number in range(4)))
    assert (await backend.head("main")).number == 200


@pytest.mark.parametrize("how", ["close", "reset", "hole"])
async def test_through_a_cutting_proxy_every_commit_is_applied_exactly_once(
    how: How, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    server = shared("valkey")
    assert isinstance(server, RedisServer)
    async with Proxy(server.port) as proxy:
        url = f"redis://127.0.0.1:{proxy.port}/?prefix={own_name(tmp_path)}&deadline_seconds=0.3"
        told: list[Retry] = []
        backend = Retrying(RedisBackend(url), first_delay_seconds=0.01, observer=told.append)
        await backend.open()
        version, n = 0, 0

        async def once() -> dict[str, int]:
            nonlocal version, n
            before = dict(proxy.passed)
            n += 1
            number = await backend.commit("main", {KEY: b'{"n":%d}' % n}, {KEY: version}, op=Op("w", n))
            assert number == version + 1, "once, and nothing else was counted"
            version = number
            return {way: proxy.passed[way] - before[way] for way in before}

        await once()
        taken = await once()
        cuts = 0
        for direction in ("requests", "answers"):
            places = 5 if how == "hole" else 25  # each hole costs a whole deadline
            for at in range(0, taken[direction], max(1, taken[direction] // places)):
                proxy.cut(direction, at, how)
                await once()
                assert proxy.was_cut.is_set()
                cuts += 1
        assert len(told) >= cuts
        record = (await backend.read("main", [KEY]))[KEY]
        assert (record.version, record.op) == (version, Op("w", n))
        await backend.close()
    record_property("proof:retrying", {f"commits cut by {how}, applied once": cuts})
