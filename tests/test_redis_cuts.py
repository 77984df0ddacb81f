"""Redis: answers and requests cut at every message boundary, and inside messages, by a proxy before the server."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from proxy import SLACK_SECONDS, Direction, How, Proxy, opened
from servers.shared import own_name, shared
from servers.valkey import RedisServer

from holdfast.backends.redis import RedisBackend
from holdfast.contract import Key, Op
from holdfast.errors import ConflictError, HoldfastError, UnavailableError, UnknownOutcomeError

KEYS = [Key("signal", f"BTCUSDT_s{i}_x", "BTCUSDT") for i in range(4)]
DEADLINE_SECONDS = 0.8


@pytest.fixture
async def proxy() -> AsyncIterator[Proxy]:
    server = shared("valkey")
    assert isinstance(server, RedisServer)
    async with Proxy(server.port) as between:
        yield between


def through(proxy: Proxy, place: Path, deadline_seconds: float = DEADLINE_SECONDS) -> RedisBackend:
    return RedisBackend(f"redis://127.0.0.1:{proxy.port}/?prefix={own_name(place)}&deadline_seconds={deadline_seconds}")


async def put(backend: RedisBackend, n: int, expect: int, writer: str = "w", at: int = 0) -> int:
    payload = b'{"n":%d}' % n
    return await backend.commit("main", {KEYS[at]: payload}, {KEYS[at]: expect}, op=Op(writer, n))


async def settled(backend: RedisBackend, n: int, expect: int) -> tuple[int, str]:
    """Commit as a caller must: the same op again after an unknown outcome, anew after an unavailable server."""
    seen = ""
    clock = asyncio.get_running_loop().time
    for _ in range(20):
        begun = clock()
        try:
            return await put(backend, n, expect), seen
        except UnknownOutcomeError:
            seen += "?"
        except UnavailableError:
            seen += "-"
        finally:
            assert clock() - begun < DEADLINE_SECONDS + SLACK_SECONDS, "beyond its deadline"
    raise AssertionError("never settled")


async def sizes(proxy: Proxy, backend: RedisBackend) -> tuple[dict[Direction, int], int]:
    """Return how many bytes one warm commit takes in each direction, and the version it wrote."""
    first = await put(backend, 1, 0)
    before = dict(proxy.passed)
    version = await put(backend, 2, first)
    return {way: proxy.passed[way] - before[way] for way in before}, version


@pytest.mark.parametrize("how", ["close", "reset", "hole"])
@pytest.mark.parametrize("direction", ["requests", "answers"])
async def test_a_commit_cut_anywhere_is_applied_exactly_once(
    proxy: Proxy, tmp_path: Path, direction: Direction, how: How, record_property: Callable[[str, object], None]
) -> None:
    backend = await opened(through(proxy, tmp_path))
    taken, version = await sizes(proxy, backend)
    all_bytes = taken[direction]
    # Every byte of the answers; of the longer requests some forty places, the message boundaries among them.
    step = 1 if direction == "answers" else max(1, all_bytes // 40)
    if how == "hole":
        step = max(step, all_bytes // 4)  # each costs a whole deadline
    cuts = 0
    for at in range(0, all_bytes, step):
        proxy.cut(direction, at, how)
        n = cuts + 3
        number, seen = await settled(backend, n, version)
        assert proxy.was_cut.is_set()
        assert seen, "the cut was noticed"
        assert number == version + 1, "once, and nothing else was counted"
        record = (await backend.read("main", [KEYS[0]]))[KEYS[0]]
        assert (record.payload, record.version, record.op) == (b'{"n":%d}' % n, number, Op("w", n))
        version = number
        cuts += 1
    assert (await backend.head("main")).number == version
    await backend.close()
    record_property("proof:redis cuts", {f"{direction} cut by {how}": cuts})


async def test_a_request_that_was_still_in_flight_when_it_was_sent_again_is_not_applied_twice(
    proxy: Proxy, tmp_path: Path
) -> None:
    backend = await opened(through(proxy, tmp_path))
    taken, version = await sizes(proxy, backend)
    for turn in range(20):
        n = turn + 3
        proxy.cut("requests", 0 if turn % 2 else taken["requests"] // 2, "hold")
        with pytest.raises(UnknownOutcomeError):
            await put(backend, n, version)
        if turn % 4 < 2:
            number = await put(backend, n, version)
            await proxy.release()  # the first one comes after its repetition
        else:
            await proxy.release()  # the first one arrives late, and then its repetition
            number = await put(backend, n, version)
        assert number == version + 1
        later = await put(backend, 1000 + turn, number, writer="other")
        assert later == number + 1, "nothing was counted twice"
        record = (await backend.read("main", [KEYS[0]]))[KEYS[0]]
        assert (record.version, record.op) == (later, Op("other", 1000 + turn))
        version = later
    await backend.close()


async def test_a_late_request_after_a_later_op_of_the_same_writer_changes_nothing(proxy: Proxy, tmp_path: Path) -> None:
    backend = await opened(through(proxy, tmp_path))
    _, version = await sizes(proxy, backend)
    proxy.cut("requests", 0, "hold")
    with pytest.raises(UnknownOutcomeError):
        await put(backend, 3, version)
    version = await put(backend, 3, version)
    version = await put(backend, 4, version)
    await proxy.release()
    record = (await backend.read("main", [KEYS[0]]))[KEYS[0]]
    assert (record.version, record.op) == (version, Op("w", 4))
    assert (await backend.head("main")).number == version
    await backend.close()


async def test_a_cut_in_a_group_leaves_each_of_its_commits_applied_once(proxy: Proxy, tmp_path: Path) -> None:
    backend = await opened(through(proxy, tmp_path))
    versions = [await put(backend, 1, 0, f"w{i}", i) for i in range(4)]
    await asyncio.gather(*(put(backend, 2, versions[i], f"w{i}", i) for i in range(4)))
    before = proxy.passed["answers"]
    found = await backend.read("main", KEYS)
    before = proxy.passed["answers"]
    numbers = await asyncio.gather(*(put(backend, 3, found[KEYS[i]].version, f"w{i}", i) for i in range(4)))
    all_bytes = proxy.passed["answers"] - before
    for turn, at in enumerate(range(all_bytes)):
        n = turn + 4
        proxy.cut("answers", at, "reset")

        async def one(i: int, n: int = n, numbers: list[int] = numbers) -> int:
            for _ in range(5):
                try:
                    return await put(backend, n, numbers[i], f"w{i}", i)
                except UnknownOutcomeError:
                    continue
            raise AssertionError("never settled")

        start = max(numbers)
        numbers = list(await asyncio.gather(*map(one, range(4))))
        assert sorted(numbers) == list(range(start + 1, start + 5))
        found = await backend.read("main", KEYS)
        assert [found[key].version for key in KEYS] == numbers
    await backend.close()


@pytest.mark.parametrize("direction", ["requests", "answers"])
async def test_a_black_hole_costs_nobody_more_than_the_deadline(
    proxy: Proxy, tmp_path: Path, direction: Direction
) -> None:
    backend = await opened(through(proxy, tmp_path))
    await put(backend, 1, 0)
    proxy.cut(direction, 0, "hole")
    clock = asyncio.get_running_loop().time
    begun = clock()

    async def timed(n: int) -> tuple[type[BaseException] | None, float]:
        try:
            await backend.commit("main", {}, {}, op=Op(f"hole-{n}", 1))
        except HoldfastError as error:
            return type(error), clock() - begun
        return None, clock() - begun

    first = asyncio.ensure_future(timed(0))
    await proxy.was_cut.wait()
    outcomes = await asyncio.gather(first, *(timed(n) for n in range(1, 20)))
    assert outcomes[0][0] is UnknownOutcomeError
    # Those behind it were not sent, or sent anew at the last moment.
    assert {kind for kind, _ in outcomes[1:]} <= {None, UnavailableError, UnknownOutcomeError}
    assert max(seconds for _, seconds in outcomes) < DEADLINE_SECONDS + SLACK_SECONDS
    await backend.close()


async def test_reads_are_bounded_too_and_work_again_after_it(proxy: Proxy, tmp_path: Path) -> None:
    backend = await opened(through(proxy, tmp_path))
    await put(backend, 1, 0)
    clock = asyncio.get_running_loop().time
    ways: list[How] = ["hole", "reset", "close"]
    for how in ways:
        assert len(await backend.read("main", KEYS)) == 1
        proxy.cut("answers", 3, how)
        begun = clock()
        with pytest.raises(UnavailableError):
            await backend.read("main", KEYS)
        assert clock() - begun < DEADLINE_SECONDS + SLACK_SECONDS
    assert len(await backend.read("main", KEYS)) == 1
    await backend.close()


async def test_nobody_there_is_unavailable_and_nothing_was_written(proxy: Proxy, tmp_path: Path) -> None:
    backend = await opened(through(proxy, tmp_path))
    version = await put(backend, 1, 0)
    proxy.refusing = True
    proxy.cut("requests", 0, "reset")
    with pytest.raises(UnknownOutcomeError):
        await put(backend, 2, version)
    for _ in range(3):
        with pytest.raises(UnavailableError, match="nothing was written"):
            await put(backend, 2, version)
    with pytest.raises(UnavailableError):
        await through(proxy, tmp_path).open()
    proxy.refusing = False
    assert await put(backend, 2, version) == version + 1
    await backend.close()


async def test_an_open_whose_probe_is_cut_is_unavailable_and_blames_no_setting(proxy: Proxy, tmp_path: Path) -> None:
    for _ in range(2):  # what INFO tells grows with the first one
        before = proxy.passed["answers"]
        backend = through(proxy, tmp_path)
        await backend.open()
        all_bytes = proxy.passed["answers"] - before
        await backend.close()
    in_probe = 0
    for back in range(1, 70, 3):  # near the end, where the probe is
        backend = through(proxy, tmp_path)
        proxy.cut("answers", all_bytes - back, "close")
        try:
            await backend.open()
        except UnavailableError as error:
            in_probe += "probe" in str(error)
        finally:
            await backend.close()
            proxy.spare()
    assert in_probe > 3


async def test_a_slow_network_is_waited_for_and_20_writers_still_share_their_trips(
    proxy: Proxy, tmp_path: Path
) -> None:
    backend = through(proxy, tmp_path, 5)
    await backend.open()
    await put(backend, 1, 0)
    proxy.delay_seconds = 0.02
    before = proxy.chunks["answers"]
    numbers = await asyncio.gather(*(backend.commit("main", {}, {}, op=Op(f"w{i}", 9)) for i in range(20)))
    assert sorted(numbers) == list(range(2, 22))
    assert proxy.chunks["answers"] - before <= 5, "one after the other they would take 20 round trips"
    await backend.close()


@pytest.mark.parametrize("seed", range(3))
async def test_cuts_at_random_also_while_connecting_lose_nothing_and_apply_nothing_twice(
    proxy: Proxy, tmp_path: Path, seed: int
) -> None:
    """Eight writers, each with a counter of its own and one that all share; every few kilobytes the link is cut."""
    chance = random.Random(seed)
    backend = await opened(through(proxy, tmp_path))
    shared_key, raised, cuts = Key("risk", "shared", "counter"), 0, 0
    done = asyncio.Event()

    async def cutter() -> None:
        nonlocal cuts
        while not done.is_set():
            ways: list[Direction] = ["requests", "answers"]
            proxy.cut(chance.choice(ways), chance.randrange(12_000), chance.choice(["close", "reset"]))
            await proxy.was_cut.wait()
            cuts += 1

    async def writer(name: str) -> None:
        nonlocal raised
        for n in range(1, 26):
            while True:
                try:
                    found = (await backend.read("main", [shared_key])).get(shared_key)
                    value = int(found.payload) if found else 0
                    expect = {shared_key: found.version if found else 0}
                    await again(name, n, value + 1, expect)
                    raised += 1
                    break
                except (ConflictError, UnavailableError):
                    await asyncio.sleep(0)

    async def again(name: str, n: int, value: int, expect: dict[Key, int]) -> None:
        changes = {shared_key: b"%d" % value}
        sent = False
        while True:
            try:
                await backend.commit("main", changes, expect, op=Op(name, n))
                return
            except UnknownOutcomeError:
                sent = True
            except UnavailableError:
                if not sent:
                    raise  # surely not written: read again, decide again

    task = asyncio.ensure_future(cutter())
    await asyncio.gather(*(writer(f"storm-{i}") for i in range(8)))
    done.set()
    task.cancel()
    proxy.spare()
    while True:
        try:
            found = (await backend.read("main", [shared_key]))[shared_key]
            break
        except UnavailableError:
            continue
    assert (int(found.payload), found.version, raised) == (200, 200, 200)
    assert cuts > 5
    await backend.close()
