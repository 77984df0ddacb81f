"""MongoDB's protocol (on SecantusDB): answers and requests cut at every message boundary, and inside messages."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pymongo.common
import pytest
from proxy import SLACK_SECONDS, Direction, How, Proxy, opened
from servers.mongo import MongoServer, sweep_sockets
from servers.shared import own_name, shared

from holdfast.backends.mongo import MongoBackend
from holdfast.contract import Key, Op
from holdfast.errors import ConflictError, HoldfastError, UnavailableError, UnknownOutcomeError

KEYS = [Key("signal", f"BTCUSDT_s{i}_x", "BTCUSDT") for i in range(4)]
DEADLINE_SECONDS = 1.2


@pytest.fixture(autouse=True)
def impatient_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver looks for a lost server twice a second; here (and by polling) sooner, so that many cuts are tried."""
    monkeypatch.setattr(pymongo.common, "MIN_HEARTBEAT_INTERVAL", 0.01)


@pytest.fixture
async def proxy() -> AsyncIterator[Proxy]:
    server = shared("mongo")
    assert isinstance(server, MongoServer)
    async with Proxy(server.port) as between:
        yield between
    sweep_sockets()


def through(proxy: Proxy, place: Path, deadline_seconds: float = DEADLINE_SECONDS) -> MongoBackend:
    # Direct: the driver would otherwise go round the proxy to the address that the server tells of itself.
    return MongoBackend(
        f"mongodb://127.0.0.1:{proxy.port}/bots?collection={own_name(place)}&directConnection=true&serverMonitoringMode=poll"
        f"&deadline_seconds={deadline_seconds}"
    )


async def put(backend: MongoBackend, n: int, expect: int, writer: str = "w", at: int = 0) -> int:
    payload = b'{"n":%d}' % n
    return await backend.commit("main", {KEYS[at]: payload}, {KEYS[at]: expect}, op=Op(writer, n))


async def settled(backend: MongoBackend, n: int, expect: int) -> tuple[int, str]:
    """Commit as a caller must: the same op again after an unknown outcome, anew after an unavailable server."""
    seen = ""
    clock = asyncio.get_running_loop().time
    for _ in range(40):
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


async def sizes(proxy: Proxy, backend: MongoBackend) -> tuple[dict[Direction, int], int]:
    """Return how many bytes one warm commit takes in each direction, and the version it wrote."""
    version = await put(backend, 1, 0)
    before = dict(proxy.passed)
    version = await put(backend, 2, version)
    return {way: proxy.passed[way] - before[way] for way in before}, version


async def row_of(backend: MongoBackend) -> tuple[bytes, int, Op]:
    record = (await backend.read("main", [KEYS[0]]))[KEYS[0]]
    return record.payload, record.version, record.op


async def read_at_last(backend: MongoBackend) -> tuple[bytes, int, Op]:
    """Read, again where the driver has not found the server yet."""
    for _ in range(40):
        try:
            return await row_of(backend)
        except UnavailableError:
            continue
    raise AssertionError("never read")


@pytest.mark.parametrize(
    ("direction", "how"),
    [("requests", how) for how in ("close", "reset", "hole", "hold")]
    + [("answers", how) for how in ("close", "reset", "hole")],
)
async def test_a_commit_cut_anywhere_is_applied_exactly_once(
    proxy: Proxy, tmp_path: Path, direction: Direction, how: How, record_property: Callable[[str, object], None]
) -> None:
    backend = await opened(through(proxy, tmp_path))
    taken, version = await sizes(proxy, backend)
    all_bytes = taken[direction]
    # Around the header's end and each boundary of the message, and some places within.
    places = sorted({0, 1, 15, 16, 17, 20, 21, all_bytes - 1, *range(0, all_bytes, max(1, all_bytes // 16))})
    if how == "hole":
        places = [0, 16, all_bytes // 2, all_bytes - 1]  # each costs a whole deadline
    if how == "hold":
        places = [0, all_bytes // 2, all_bytes - 1]
    cuts, n = 0, 2
    for at in places:
        proxy.cut(direction, at, how)
        n += 1
        number, seen = await settled(backend, n, version)
        if not proxy.was_cut.is_set():
            continue  # a message of the driver's own took the place
        proxy.spare()
        if how == "hold":
            await proxy.release()  # the first request arrives after its repetition was answered
        assert number == version + 1, "once, and nothing else was counted"
        assert await read_at_last(backend) == (b'{"n":%d}' % n, number, Op("w", n))
        version = number
        cuts += bool(seen)
    assert (await backend.head("main")).number == version
    assert cuts >= len(places) // 2
    await backend.close()
    record_property("proof:mongo cuts", {f"{direction} cut by {how}": cuts})


async def test_a_request_that_was_still_in_flight_when_it_was_sent_again_is_not_applied_twice(
    proxy: Proxy, tmp_path: Path
) -> None:
    backend = await opened(through(proxy, tmp_path))
    taken, version = await sizes(proxy, backend)
    held = 0
    for turn in range(12):
        n = turn + 3
        proxy.cut("requests", 0 if turn % 2 else taken["requests"] // 2, "hold")
        with pytest.raises(UnknownOutcomeError):
            await put(backend, n, version)
        held += 1
        if turn % 4 < 2:
            number, _ = await settled(backend, n, version)
            await proxy.release()  # the first one comes after its repetition
        else:
            await proxy.release()  # the first one arrives late, and then its repetition
            number, _ = await settled(backend, n, version)
        assert number == version + 1
        later = await put(backend, 1000 + turn, number, writer="other")
        assert later == number + 1, "nothing was counted twice"
        _, version, op = await row_of(backend)
        assert (version, op) == (later, Op("other", 1000 + turn))
    assert held == 12
    await backend.close()


async def test_the_very_first_commit_held_back_does_not_make_the_document_twice(proxy: Proxy, tmp_path: Path) -> None:
    backend = await opened(through(proxy, tmp_path))
    assert await backend.read("main", KEYS) == {}
    assert (await backend.head("main")).number == 0
    other = await opened(through(proxy, tmp_path))
    # What a first commit sends is a look, then the insert: hold back the second one.
    before = proxy.passed["requests"]
    await backend.commit("sized", {KEYS[0]: b'{"n":1}'}, {KEYS[0]: 0}, op=Op("w", 1))
    look_and_insert = proxy.passed["requests"] - before
    proxy.cut("requests", look_and_insert - 30, "hold")
    with pytest.raises(UnknownOutcomeError):
        await put(backend, 1, 0)
    assert await settled_elsewhere(other) == 1
    await proxy.release()
    with pytest.raises(ConflictError):
        await put(backend, 1, 0)
    assert (await row_of(other))[1:] == (1, Op("v", 1))
    await backend.close()
    await other.close()


async def settled_elsewhere(backend: MongoBackend) -> int:
    for _ in range(40):
        try:
            return await put(backend, 1, 0, writer="v")
        except (UnavailableError, UnknownOutcomeError):
            continue
    raise AssertionError("never settled")


async def test_a_late_request_after_a_later_op_of_the_same_writer_changes_nothing(proxy: Proxy, tmp_path: Path) -> None:
    backend = await opened(through(proxy, tmp_path))
    _, version = await sizes(proxy, backend)
    proxy.cut("requests", 0, "hold")
    with pytest.raises(UnknownOutcomeError):
        await put(backend, 3, version)
    version, _ = await settled(backend, 3, version)
    version = await put(backend, 4, version)
    await proxy.release()
    assert (await row_of(backend))[1:] == (version, Op("w", 4))
    assert (await backend.head("main")).number == version
    await backend.close()


async def test_a_cut_in_a_group_leaves_each_of_its_commits_applied_once(proxy: Proxy, tmp_path: Path) -> None:
    backend = await opened(through(proxy, tmp_path))
    numbers = [await put(backend, 1, 0, f"w{i}", i) for i in range(4)]
    for turn in range(12):
        n = turn + 2
        proxy.cut("answers" if turn % 2 else "requests", turn * 13, "reset")

        async def one(i: int, n: int = n, numbers: list[int] = numbers) -> int:
            for _ in range(60):
                try:
                    return await put(backend, n, numbers[i], f"w{i}", i)
                except (UnknownOutcomeError, UnavailableError):
                    await asyncio.sleep(0)
            raise AssertionError("never settled")

        start = max(numbers)
        numbers = list(await asyncio.gather(*map(one, range(4))))
        proxy.spare()
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
        for _ in range(40):
            await read_at_last(backend)
            proxy.cut("answers", 3, how)
            begun = clock()
            try:
                await backend.read("main", KEYS)
            except UnavailableError:
                break
            finally:
                assert clock() - begun < DEADLINE_SECONDS + SLACK_SECONDS
            # The cut fell into an answer to the driver's own looking round, and the read went through.
        else:
            raise AssertionError(f"no read was cut by {how}")
    await read_at_last(backend)
    await backend.close()


async def test_nobody_there_is_unavailable_and_nothing_was_written(proxy: Proxy, tmp_path: Path) -> None:
    backend = await opened(through(proxy, tmp_path))
    version = await put(backend, 1, 0)
    proxy.refusing = True
    proxy.cut("requests", 0, "reset")
    with pytest.raises(UnknownOutcomeError):
        await put(backend, 2, version)
    with pytest.raises(UnknownOutcomeError, match="an earlier try"):
        await put(backend, 2, version)
    with pytest.raises(UnavailableError, match="nothing was written"):
        await put(backend, 9, version, writer="fresh")
    with pytest.raises(UnavailableError):
        await through(proxy, tmp_path).open()
    proxy.refusing = False
    assert (await settled(backend, 2, version))[0] == version + 1
    await backend.close()


@pytest.mark.parametrize("seed", range(2))
async def test_cuts_at_random_also_while_connecting_lose_nothing_and_apply_nothing_twice(
    proxy: Proxy, tmp_path: Path, seed: int
) -> None:
    """Six writers raise one counter; every few kilobytes the link is cut."""
    chance = random.Random(seed)
    backend = await opened(through(proxy, tmp_path))
    shared_key, raised, cuts = Key("risk", "shared", "counter"), 0, 0

    async def cutter() -> None:
        nonlocal cuts
        while True:
            ways: list[Direction] = ["requests", "answers"]
            proxy.cut(chance.choice(ways), chance.randrange(12_000), chance.choice(["close", "reset"]))
            await proxy.was_cut.wait()
            cuts += 1

    async def writer(name: str) -> None:
        nonlocal raised
        for n in range(1, 16):
            while True:
                try:
                    found = (await backend.read("main", [shared_key])).get(shared_key)
                    value = int(found.payload) if found else 0
                    await again(name, n, value + 1, {shared_key: found.version if found else 0})
                    raised += 1
                    break
                except (ConflictError, UnavailableError):
                    await asyncio.sleep(0)

    async def again(name: str, n: int, value: int, expect: dict[Key, int]) -> None:
        while True:
            try:
                await backend.commit("main", {shared_key: b"%d" % value}, expect, op=Op(name, n))
                return
            except UnknownOutcomeError:
                continue

    task = asyncio.ensure_future(cutter())
    async with asyncio.timeout(60):
        await asyncio.gather(*(writer(f"storm-{i}") for i in range(6)))
    task.cancel()
    proxy.spare()
    while True:
        try:
            found = (await backend.read("main", [shared_key]))[shared_key]
            break
        except UnavailableError:
            continue
    assert (int(found.payload), found.version, raised) == (90, 90, 90)
    assert cuts > 3
    await backend.close()
