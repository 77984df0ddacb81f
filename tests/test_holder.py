"""A process knows its own rows by its holder, and takes nobody else's for them: no parent's, no other store's."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest
from fakes import Bot, FakeMarket, flat, session_of, until

from holdfast.backends.sqlite.backend import SqliteBackend
from holdfast.contract import KeyPrefix, Survives
from holdfast.engine import worker
from holdfast.engine.holder import holder_of
from holdfast.engine.live import LiveRun
from holdfast.engine.worker import is_gone, sign_of_life
from holdfast.errors import HeldError
from holdfast.store import Store


async def opened(path: Path) -> Store:
    store = Store(SqliteBackend(path), require=Survives.NOTHING)
    await store.open()
    return store


async def test_a_forked_child_has_a_holder_of_its_own(tmp_path: Path) -> None:
    store = await opened(tmp_path / "db")
    mine = holder_of(store)
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.write(writing, holder_of(store).encode())
        os.kill(os.getpid(), signal.SIGKILL)  # nothing of the parent's is ended here
    os.close(writing)
    _, status = await asyncio.to_thread(os.waitpid, child, 0)
    with os.fdopen(reading) as told:
        theirs = told.read()
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert len(theirs) == len(mine) and theirs != mine
    assert holder_of(store) == mine
    await store.close()


async def test_the_end_of_one_run_does_not_free_what_another_store_of_the_process_owns(tmp_path: Path) -> None:
    first, second, third = [await opened(tmp_path / "db") for _ in range(3)]
    one, other = running(a_bot(), first, "ETHUSDT"), running(a_bot(), second, "BTCUSDT")
    await until(lambda: owns(one[0]) and owns(other[0]))
    assert len(await third.keys(KeyPrefix("worker"))) == 2, "each gives a sign of life"
    await ended(*one)
    assert len(await third.keys(KeyPrefix("worker"))) == 1

    sign = sign_of_life(third, holder=holder_of(third), lease_seconds=2, sleep=asyncio.sleep, clock=lambda: 0)
    session = await session_of(a_bot(), third, holder=holder_of(third), sign=sign, recover=False)
    session._sleep = asyncio.sleep
    with pytest.raises(HeldError, match="alive"):
        await session.recover()
    await session.close()

    assert owns(other[0])
    await ended(*other)
    for store in (first, second, third):
        await store.close()


@pytest.mark.parametrize(("pid", "gone"), [(0, False), (1, False), (2**22 + 1, True)])
def test_a_process_table_that_hides_others_makes_nobody_dead(
    pid: int, gone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "started_ticks", lambda pid: None)
    assert is_gone(pid or os.getpid(), 12345) is gone


def a_bot() -> Bot:
    market = FakeMarket({"BTCUSDT": flat(43000, -10, 0), "ETHUSDT": flat(43000, -10, 0)}, hold=True)
    return Bot(market, {})


def running(bot: Bot, store: Store, symbol: str) -> tuple[LiveRun, asyncio.Task[None]]:
    run = bot.run(store, symbol, lease_seconds=2)

    async def watch() -> None:
        async for _ in run:
            pass

    return run, asyncio.ensure_future(watch())


def owns(run: LiveRun) -> bool:
    session = run._entry.driver.session
    return session is not None and session.owner is not None


async def ended(run: LiveRun, task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await run.aclose()
