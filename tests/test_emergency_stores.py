"""Positions are closed with the store full, its server paused or dead; and by whom, where it is shared."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from emergency_kit import TARGET, Watched, drain, policy_of, reached, session_in
from fakes import candle, flat, minute_ms, session_of, sound, stepped
from order_kit import Desk, orders_in
from servers import require
from servers.valkey import RedisServer, valkey_binary
from test_ownership import LEASE_SECONDS, Process, Time, two  # noqa: F401 -- a fixture

from holdfast.backends.file import FileBackend
from holdfast.backends.redis import RedisBackend
from holdfast.domains import ledger_key
from holdfast.engine.health import Health
from holdfast.errors import FencedError, UnavailableError
from holdfast.names import Context
from holdfast.rows import Event, Trade
from holdfast.store import Store

Full = tuple[Path, Callable[[], None], Callable[[], None]]
"""A folder for a store, what fills its disk to the last byte, what makes room again."""


def mounted(tmp_path: Path) -> Iterator[Full]:
    """A file system of its own of one megabyte."""
    where = tmp_path / "small"
    where.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", where], capture_output=True).returncode:
        pytest.skip("mounting a small file system takes rights that this user lacks; the limit test runs anyway")
    ballast = where / "ballast"

    def fill() -> None:
        with ballast.open("ab", buffering=0) as file:
            for size in (4096, 512, 1):
                try:
                    while True:
                        file.write(b"x" * size)
                except OSError:
                    continue

    yield where / "store", fill, ballast.unlink
    subprocess.run(["umount", "-l", where], check=True)


def limited(tmp_path: Path) -> Iterator[Full]:
    """A limit on the size of files: for the store's log, which has grown past the journal, as good as a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    where = tmp_path / "store"

    def fill() -> None:
        log = next(where.rglob("commit.log"))
        resource.setrlimit(resource.RLIMIT_FSIZE, (log.stat().st_size, before[1]))

    yield where, fill, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, before)
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture(params=[mounted, limited], ids=["small disk", "file limit"])
def full(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Full]:
    yield from request.param(tmp_path)


async def test_the_bot_closes_its_position_at_the_venue_with_the_disk_full_and_nothing_is_lost_or_repeated(
    full: Full, tmp_path: Path
) -> None:
    where, fill, free = full
    store = Store(FileBackend(where))
    await store.open()
    await store.writer("test").commit({ledger_key(Context("other", "OLD", "other"), "old"): _long_trade()})
    watched = Watched()
    desk = watched.desk
    running = watched.start(desk.run(store, on_trouble=policy_of(tmp_path / "emergency")))
    await watched.holds()
    fill()
    desk.market.go_on([candle(4, 43000, high=44100)])
    await watched.has_sold()
    await reached(lambda: [event.kind for event in watched.told] == ["opened", "closed"])
    assert [(change.after, change.why) for change in watched.modes] == [("CLOSE_ONLY", "the store is full")]
    free()
    desk.market.go_on(flat(43000, 5, 9))
    await reached(desk.market.waiting.is_set)
    desk.market.finish()
    await running
    assert [one.kind for one in watched.trouble] == ["emergency"]
    await watched.is_sound(store)
    await store.close()


def _long_trade() -> Trade:
    """Return a row that makes the store's log longer than the journal."""
    return Trade(
        id="old", event_id="other/OLD/other#1", symbol="OLD", exchange_name="other", strategy_name="other",
        position="long", note="x" * 200_000, price_open=1.0, price_close=1.0, price_take_profit=2.0,
        price_stop_loss=0.5, scheduled_at=1, pending_at=1, closed_at=2, reason="take_profit", pnl_percent=0.0,
    )  # fmt: skip


async def test_a_process_killed_with_its_disk_full_leaves_the_exit_that_it_made_to_the_next(full: Full) -> None:
    where, fill, free = full
    emergency = where.parent.parent / "emergency" if where.parent.name == "small" else where.parent / "emergency"
    store = Store(FileBackend(where))
    await store.open()
    await store.writer("test").commit({ledger_key(Context("other", "OLD", "other"), "old"): _long_trade()})
    before = Watched()
    running = before.start(before.desk.run(store, on_trouble=policy_of(emergency)))
    await before.holds()
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await store.close()
    # The next process finds the position, closes it on a full disk, and is killed as soon as its venue has the order.
    ready, go = where.parent / "ready", where.parent / "go"
    fresh = subprocess.Popen(  # noqa: ASYNC220 -- begins in a moment
        [sys.executable, "-c", textwrap.dedent(_MORTAL), str(where), str(emergency), str(ready), str(go)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        await reached(lambda: ready.exists() or fresh.poll() is not None)
        assert fresh.poll() is None, fresh.stderr and fresh.stderr.read().decode()
        if where.parent.name == "small":
            fill()
        else:
            resource.prlimit(fresh.pid, resource.RLIMIT_FSIZE, (_log_size(where), resource.RLIM_INFINITY))
        os.kill(fresh.pid, signal.SIGUSR1)
        assert fresh.stdout is not None
        line = await asyncio.wait_for(asyncio.to_thread(fresh.stdout.readline), 30)
        assert line.startswith(b"sent "), (line, fresh.stderr and fresh.stderr.read().decode())
    finally:
        fresh.kill()
        fresh.wait()
        assert fresh.stdout is not None and fresh.stderr is not None
        fresh.stdout.close()
        fresh.stderr.close()
    free()
    store = Store(FileBackend(where))
    await store.open()
    last = Desk(candles=[*flat(43000, -10, 3), candle(4, 43000, high=44100), *flat(43000, 5, 9)])
    last.broker.book.submit(before.desk.broker.sent[0])  # what the venue had before
    told: list[Event] = []
    await drain(last.run(store, on_trouble=policy_of(emergency)), told)
    closed = [order for order in (await orders_in(store)).orders.values() if order.action == "close"]
    assert [order.client_order_id.encode() for order in closed] == [line.split()[1]], "the same order, by the same id"
    assert [(event.kind, event.number) for event in told][-1] == ("closed", 2)
    await sound(store)
    await store.close()


def _log_size(where: Path) -> int:
    return next(where.rglob("commit.log")).stat().st_size


_MORTAL = """
    import asyncio, signal, sys
    from pathlib import Path
    from emergency_kit import policy_of
    from fakes import candle, flat
    from order_kit import Desk
    from holdfast.backends.file import FileBackend
    from holdfast.errors import UnknownOutcomeError
    from holdfast.store import Store

    async def main(where, emergency, ready, go):
        store = Store(FileBackend(where))
        await store.open()
        desk = Desk(candles=flat(43000, -10, 3), hold=True)

        async def submit(request):
            print("sent", request.client_order_id, flush=True)
            await asyncio.Event().wait()

        desk.broker.submit = submit
        goes = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, goes.set)

        async def drain():
            async for event in desk.run(store, on_trouble=policy_of(emergency)):
                pass

        running = asyncio.create_task(drain())
        while not desk.market.waiting.is_set():
            await asyncio.sleep(0.01)
        Path(ready).write_text("")
        await goes.wait()
        desk.market.go_on([candle(4, 43000, high=44100)])
        await running

    asyncio.run(main(*sys.argv[1:]))
"""


# ---------------------------------------------------------------------- a server


@pytest.mark.parametrize("trouble", ["paused", "killed"])
async def test_a_position_is_closed_while_the_server_is_paused_or_dead_and_stored_once_when_it_is_back(
    tmp_path: Path, trouble: str
) -> None:
    require("valkey")
    server = RedisServer(valkey_binary(), tmp_path / "server")
    try:
        store = Store(RedisBackend(f"{server.url}/?prefix=t&deadline_seconds=1"))
        await store.open()
        watched = Watched()
        desk = watched.desk
        run = desk.run(store, on_trouble=policy_of(tmp_path / "emergency", patience_seconds=0.3))
        running = watched.start(run)
        await watched.holds()
        if trouble == "paused":
            server.process.signal(signal.SIGSTOP)
        else:
            server.process.kill()
        desk.market.go_on([candle(4, 43000, high=44100)])
        await watched.has_sold()
        await reached(lambda: [event.kind for event in watched.told] == ["opened", "closed"])
        if trouble == "paused":
            server.process.signal(signal.SIGCONT)
        else:
            server.process.start()
        await reached(lambda: session_in(run).unsaved == 0)
        desk.market.go_on(flat(43000, 5, 9))
        desk.market.finish()
        await running
        await watched.is_sound(store)
        await store.close()
    finally:
        server.stop()


# ---------------------------------------------------------------------- shared


@pytest.mark.parametrize("without_lease", [False, True])
async def test_exits_end_with_the_lease_unless_the_user_wants_otherwise_and_a_fenced_one_is_never_made_twice(
    two: tuple[Process, Process, Time],  # noqa: F811
    tmp_path: Path,
    without_lease: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first, second, time = two
    policy = policy_of(tmp_path / "emergency", exit_without_lease=without_lease, lost_refusals=2)
    health = Health(first.store, policy)
    session = await session_of(
        first.bot, first.store, holder="first", sign=first.sign, health=health, recover=False,
    )  # fmt: skip
    session._sleep = time.sleep
    await Process.recover(session)
    assert [event.kind for event in await stepped(session, candle(0, 43000))] == ["opened"]
    await session.flush()
    await first.die()  # cut off from the store: no further sign of life reaches it
    await time.pass_by(LEASE_SECONDS * 0.8)

    async def cut_off(*arguments: Any, **named: Any) -> int:
        raise UnavailableError("cut off")

    monkeypatch.setattr(first.store.home.backend, "commit", cut_off)
    told = await stepped(session, TARGET)
    assert [event.kind for event in told] == (["closed"] if without_lease else [])
    assert session.unsaved == len(told)
    if not without_lease:
        assert session.health.mode.name in ("NORMAL", "HALT")
    taking = asyncio.ensure_future(second.session("wait"))
    async with asyncio.timeout(120):
        while not taking.done():
            await time.pass_by(0.5)
    follower = await taking
    assert follower.state.signal is not None, "the store knows of no exit"
    monkeypatch.undo()
    with pytest.raises(FencedError):
        await stepped(session, candle(2, 43000))
        await session.flush()
    again = await stepped(follower, TARGET, entries=False)
    assert [event.kind for event in again] == ["closed"]
    if told:
        assert (told[0].id, told[0].price_close) == (again[0].id, again[0].price_close), "a consumer can drop it"
    await session.close()
    await sound(second.store)
    await follower.close()


async def test_an_exit_kept_under_the_lease_is_not_sent_again_by_its_fenced_holder(
    two: tuple[Process, Process, Time],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first, second, time = two
    health = Health(first.store, policy_of(tmp_path / "emergency"))
    session = await session_of(first.bot, first.store, holder="first", sign=first.sign, health=health, recover=False)
    session._sleep = time.sleep
    await Process.recover(session)
    await stepped(session, candle(0, 43000))
    await session.flush()
    await first.die()

    async def cut_off(*arguments: Any, **named: Any) -> int:
        raise UnavailableError("cut off")

    with monkeypatch.context() as patch:
        patch.setattr(first.store.home.backend, "commit", cut_off)
        (closed,) = await stepped(session, TARGET)
        assert session.unsaved == 1
        taking = asyncio.ensure_future(second.session("wait"))
        async with asyncio.timeout(120):
            while not taking.done():
                await time.pass_by(0.5)
    follower = await taking
    (again,) = await stepped(follower, TARGET, entries=False)
    assert again.id == closed.id
    with pytest.raises(FencedError):
        await session.flush()
    assert await session.deliver() == []
    await session.close()
    await follower.close()

    # The machine comes back and takes its context again: what it kept is known to be done.
    returned = await session_of(
        first.bot, first.store, holder="third", health=Health(first.store, policy_of(tmp_path / "emergency"))
    )
    assert returned.state.signal is None
    assert returned.unsaved == 0
    assert [event.id for event in await returned.deliver()] == []
    await returned.close()
    await sound(second.store)
    assert minute_ms(1) == closed.candle_ms
