"""S3: answers and requests cut at every message boundary, and inside messages, by a proxy before the service."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator

import pytest
from proxy import SLACK_SECONDS, Direction, How, Proxy
from s3_fake import FakeS3
from servers.s3 import S3Server, credentials
from servers.shared import own_name, shared

from holdfast.backends.s3 import S3Backend
from holdfast.contract import Key, Op
from holdfast.errors import HoldfastError, UnavailableError, UnknownOutcomeError

KEYS = [Key("signal", f"BTCUSDT_s{i}_x", "BTCUSDT") for i in range(4)]
DEADLINE_SECONDS = 1.0


@pytest.fixture
async def proxy() -> AsyncIterator[Proxy]:
    server = shared("moto")
    assert isinstance(server, S3Server)
    async with Proxy(server.port) as between:
        yield between


@pytest.fixture(autouse=True)
def with_credentials() -> Iterator[None]:
    credentials()
    yield


def through(proxy: Proxy, prefix: str, deadline_seconds: float = DEADLINE_SECONDS) -> S3Backend:
    return S3Backend(
        f"s3://bucket/{prefix}?endpoint=http://127.0.0.1:{proxy.port}&region=us-east-1&deadline_seconds={deadline_seconds}"
    )


async def opened(proxy: Proxy, prefix: str) -> S3Backend:
    """Return a backend that was given time to open, and is quick from then on."""
    slow = through(proxy, prefix, 20)
    await slow.open()  # the races, which are not made again
    await slow.close()
    backend = through(proxy, prefix)
    await backend.open()
    return backend


async def put(backend: S3Backend, n: int, expect: int, writer: str = "w", at: int = 0) -> int:
    return await backend.commit("main", {KEYS[at]: b'{"n":%d}' % n}, {KEYS[at]: expect}, op=Op(writer, n))


async def settled(backend: S3Backend, n: int, expect: int) -> tuple[int, str]:
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


async def sizes(proxy: Proxy, backend: S3Backend) -> tuple[dict[Direction, int], int]:
    """Return how many bytes one warm commit takes in each direction, and the version it wrote."""
    first = await put(backend, 1, 0)
    before = dict(proxy.passed)
    version = await put(backend, 2, first)
    return {way: proxy.passed[way] - before[way] for way in before}, version


@pytest.mark.parametrize("how", ["close", "reset", "hole"])
@pytest.mark.parametrize("direction", ["requests", "answers"])
async def test_a_commit_cut_anywhere_is_applied_exactly_once(
    proxy: Proxy, direction: Direction, how: How, record_property: Callable[[str, object], None]
) -> None:
    backend = await opened(proxy, f"cut-{direction}-{how}")
    taken, version = await sizes(proxy, backend)
    # The message boundaries, and some forty places within the message; a hole costs a whole deadline each.
    step = max(1, taken[direction] // (4 if how == "hole" else 40))
    cuts = 0
    for at in [*range(0, taken[direction] - 1, step), taken[direction] - 1]:
        proxy.cut(direction, at, how)
        n = cuts + 3
        number, seen = await settled(backend, n, version)
        assert proxy.was_cut.is_set()
        assert seen or how != "hole", "the cut was noticed"
        assert number == version + 1, "once, and nothing else was counted"
        record = (await backend.read("main", [KEYS[0]]))[KEYS[0]]
        assert (record.payload, record.version, record.op) == (b'{"n":%d}' % n, number, Op("w", n))
        version = number
        cuts += 1
    assert (await backend.head("main")).number == version
    await backend.close()
    record_property("proof:s3 cuts", {f"{direction} cut by {how}": cuts})


async def test_a_request_that_was_still_in_flight_when_it_was_sent_again_is_not_applied_twice(proxy: Proxy) -> None:
    backend = await opened(proxy, "flight")
    taken, version = await sizes(proxy, backend)
    for turn in range(12):
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


@pytest.mark.parametrize("how", ["reset", "hole"])
async def test_an_unknown_outcome_is_not_called_unwritten_while_nobody_can_be_reached(proxy: Proxy, how: How) -> None:
    backend = await opened(proxy, f"doubt-{how}")
    version = await put(backend, 1, 0)
    proxy.refusing = True
    proxy.cut("answers", 0, how)
    with pytest.raises(UnknownOutcomeError):
        await put(backend, 2, version)
    for _ in range(3):
        with pytest.raises(UnknownOutcomeError):
            await put(backend, 2, version)  # nothing was sent, but the first one was
    with pytest.raises(UnavailableError, match="nothing was written"):
        await put(backend, 1, 0, writer="another", at=1)
    proxy.refusing = False
    proxy.spare()
    assert (await settled(backend, 2, version))[0] == version + 1
    await backend.close()


@pytest.mark.parametrize("direction", ["requests", "answers"])
async def test_a_black_hole_costs_nobody_more_than_the_deadline(proxy: Proxy, direction: Direction) -> None:
    backend = await opened(proxy, f"hole-{direction}")
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
    assert {kind for kind, _ in outcomes[1:]} <= {None, UnavailableError, UnknownOutcomeError}
    assert max(seconds for _, seconds in outcomes) < DEADLINE_SECONDS + SLACK_SECONDS
    await backend.close()


async def test_reads_are_bounded_too_and_work_again_after_it(proxy: Proxy) -> None:
    backend = await opened(proxy, "reads")
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


async def test_a_service_that_fails_for_good_is_told_as_unknown_and_not_asked_for_ever() -> None:
    async with FakeS3() as fake:
        backend = S3Backend(fake.url(own_name_of("down"), "deadline_seconds=5"))
        await backend.open()
        version = await put(backend, 1, 0)
        fake.quirks.add("is-down")
        before = len(fake.requests)
        with pytest.raises(UnknownOutcomeError, match="send the same op again"):
            await put(backend, 2, version)
        assert len(fake.requests) - before < 20
        fake.quirks.clear()
        assert await put(backend, 2, version) == version + 1
        await backend.close()


def own_name_of(word: str) -> str:
    from pathlib import Path

    return own_name(Path(word))
