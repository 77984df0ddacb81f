"""Re-keying: beside a bot, interrupted anywhere, run again; every state in between is readable with both keys."""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from mortal import Death, Killer, MortalBackend
from power_workloads import FOCUS, make_backend
from process_store import signal as signal_row

from holdfast.backends.file import FileBackend
from holdfast.backends.memory import MemoryBackend
from holdfast.backends.sqlite import SqliteBackend
from holdfast.cli import main
from holdfast.contract import Backend, Key, Op, Survives
from holdfast.domains import context_key, decode, encode, from_mapping, worker_key
from holdfast.errors import CorruptedError, LockedError, UnknownOutcomeError
from holdfast.names import Context
from holdfast.rows import Worker
from holdfast.store import Store
from holdfast.testing.disk import SimulatedDisk
from holdfast.testing.faults import Fault, FaultyBackend
from holdfast.testing.medium import Medium
from holdfast.testing.power import Cuts, Ground, power_cuts
from holdfast.wrappers.around import Around
from holdfast.wrappers.encrypted import Encrypted, sealed_row
from holdfast.wrappers.keyring import Keyring
from holdfast.wrappers.rekeying import rekey

Note = Callable[[str, object], None]
OLD, NEW = bytes(range(32)), bytes(range(32, 64))
BOT = Path(__file__).parent.parent / "examples" / "bot.py"
KEYS = [Key("signal", f"S{n:03d}_a_x", f"S{n:03d}") for n in range(150)]
LEDGER = [Key("ledger", "S0_a_x", f"trade-{n}") for n in range(10)]


def old_ring() -> Keyring:
    return Keyring({"old": OLD})


def both() -> Keyring:
    return Keyring({"new": NEW, "old": OLD})


def new_ring() -> Keyring:
    return Keyring({"new": NEW})


def environment(*keys: tuple[str, bytes]) -> str:
    return ",".join(f"{key_id}={base64.b64encode(raw).decode()}" for key_id, raw in keys)


ENV_OLD = environment(("old", OLD))
ENV_BOTH = environment(("new", NEW), ("old", OLD))
ENV_NEW = environment(("new", NEW))


def row(n: int) -> bytes:
    return b'{"n":%d}' % n


async def fill(backend: Backend, keys: Keyring | None = None) -> None:
    """Write rows in two scopes; the backend is closed afterwards."""
    store = Encrypted(backend, keys) if keys else backend
    await store.open()
    for at in range(0, len(KEYS), 50):
        changes: dict[Key, bytes | None] = {key: row(n) for n, key in enumerate(KEYS[at : at + 50], at)}
        await store.commit("main", changes, {}, op=Op("w", at + 1))
    await store.commit("main.ledger", {key: row(n) for n, key in enumerate(LEDGER)}, {}, op=Op("w", 1))
    await store.close()


async def require_rows(backend: Backend, keys: Keyring) -> None:
    """Every row that was filled in can be read."""
    store = Encrypted(backend, keys)
    await store.open()
    found = await store.read("main", KEYS)
    assert {key: found[key].payload for key in KEYS} == {key: row(n) for n, key in enumerate(KEYS)}
    found = await store.read("main.ledger", LEDGER)
    assert [found[key].payload for key in LEDGER] == [row(n) for n in range(10)]
    await store.close()


@pytest.fixture
async def memory() -> AsyncIterator[MemoryBackend]:
    backend = MemoryBackend()
    await fill(backend, old_ring())
    yield backend
    await backend.close()


async def test_every_row_of_every_scope_comes_under_the_current_key_and_a_second_run_writes_nothing(
    memory: MemoryBackend,
) -> None:
    seen: list[tuple[int, int]] = []
    for expected in (160, 0):
        store = Encrypted(memory, both())
        await store.open()
        found = await rekey(store, progress=lambda done, total: seen.append((done, total)))
        await store.close()
        assert (found.key, found.rows, found.rewritten, found.left, found.ok) == ("new", 160, expected, {}, True)
    assert seen[0] == (64, 160)
    assert seen[-1] == (160, 160)
    await require_rows(memory, new_ring())
    with pytest.raises(LockedError, match="key id 'new'"):
        await require_rows(memory, old_ring())


async def test_killed_at_every_step_it_leaves_rows_that_both_keys_read_and_goes_on(record_property: Note) -> None:
    kills = 0
    for step in range(1000):
        inner = MemoryBackend()
        await fill(inner, old_ring())
        store = Encrypted(MortalBackend(inner, Killer(step)), both())
        await store.open()
        try:
            await rekey(store)
            break
        except Death:
            kills += 1
        await inner.close()
        await require_rows(inner, both())
        again = Encrypted(inner, both())
        await again.open()
        assert (await rekey(again)).ok
        await again.close()
        await require_rows(inner, new_ring())
    assert kills >= 12
    record_property("proof:re-keying", {"kills at a step": kills})


async def test_a_power_cut_at_every_moment_leaves_rows_that_both_keys_read(record_property: Note) -> None:
    rows = {Key("signal", f"S{n}_a_x", f"S{n}"): row(n) for n in range(3)}
    medium = Medium()
    backend = make_backend(SimulatedDisk(medium))
    earlier = Encrypted(backend, old_ring())
    await earlier.open()
    for n, (key, payload) in enumerate(rows.items(), 1):
        await earlier.commit("main", {key: payload}, {}, op=Op("w", n))
    await earlier.close()

    async def workload(ground: Ground) -> None:
        store = Encrypted(await ground.start(), both())
        assert (await rekey(store)).rewritten == 3
        await ground.stop()

    async def check(recovered: Backend) -> None:
        store = Encrypted(recovered, both())
        found = await store.read("main", list(rows))
        assert {key: record.payload for key, record in found.items()} == rows
        assert (await rekey(store)).ok

    cuts = Cuts(focus=FOCUS, most_per_cut=128)
    report = await power_cuts(workload, make_backend, cuts, image=medium.now(), check=check)
    record_property("proof:re-keying", {"images of a power cut": report.distinct, "lost": len(report.violations)})
    assert not report.violations, report
    assert report.distinct >= 20


class _Bot(Around):
    """A bot that writes between the re-keying's read and its commit, as often as told."""

    def __init__(self, backend: Backend, keys: Keyring, times: int = 1) -> None:
        super().__init__(backend)
        self.bot, self.times, self.n = Encrypted(backend, keys), times, 0

    async def commit(self, scope: str, changes: Any, expect: Any, *, op: Op) -> int:
        if op.writer.startswith("rekey@") and self.n < self.times:
            self.n += 1
            gone: dict[Key, bytes | None] = {KEYS[1]: None}
            await self.bot.commit("main", {KEYS[0]: b'"bot"', **gone}, {}, op=Op("bot", self.n))
        return await super().commit(scope, changes, expect, op=op)


async def test_what_a_bot_writes_or_deletes_meanwhile_stays(memory: MemoryBackend) -> None:
    store = Encrypted(_Bot(memory, both()), both())
    await store.open()
    found = await rekey(store)
    assert found.ok
    assert found.rewritten == 158
    read = await store.read("main", KEYS)
    assert read[KEYS[0]].payload == b'"bot"'
    assert KEYS[1] not in read
    assert len(read) == 149
    await store.close()


async def test_a_bot_that_goes_on_under_another_key_is_told_of(memory: MemoryBackend) -> None:
    class Stubborn(_Bot):
        async def read(self, scope: str, keys: Any) -> Any:
            self.n += 1
            await self.bot.commit("main", {KEYS[0]: b'"bot"'}, {}, op=Op("bot", self.n))
            return await super().read(scope, keys)

    store = Encrypted(Stubborn(memory, old_ring(), times=0), both())
    await store.open()
    found = await rekey(store)
    assert not found.settled
    assert not found.ok
    await store.close()


@pytest.mark.parametrize("kind", ["unavailable", "unknown_applied", "unknown_lost"])
async def test_a_commit_whose_answer_is_lost_is_sent_again_and_applied_once(kind: Any, memory: MemoryBackend) -> None:
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    store = Encrypted(FaultyBackend(memory, Fault(2, kind), Fault(3, kind)), both())
    await store.open()
    found = await rekey(store, sleep=sleep)
    assert found.ok
    assert found.rewritten == 160
    assert len(slept) == 2
    assert (await memory.head("main")).number == 3 + 3
    await store.close()
    await require_rows(memory, new_ring())


async def test_a_store_that_stays_away_ends_it_and_it_can_be_run_again(memory: MemoryBackend) -> None:
    store = Encrypted(FaultyBackend(memory, *(Fault(n, "unknown_lost") for n in range(2, 22))), both())
    await store.open()
    for _ in range(2):
        with pytest.raises(UnknownOutcomeError):
            await rekey(store, sleep=lambda seconds: asyncio.sleep(0))
    assert (await rekey(store)).ok
    await store.close()


async def test_a_row_that_cannot_be_read_is_named_and_left_and_the_others_are_done(memory: MemoryBackend) -> None:
    rows = memory._state.scope("main").rows
    bad = rows[KEYS[7]] = rows[KEYS[7]]._replace(payload=rows[KEYS[8]].payload)
    store = Encrypted(memory, both())
    await store.open()
    found = await rekey(store)
    assert (found.settled, found.ok, found.rewritten) == (True, False, 159)
    assert list(found.left) == [str(KEYS[7])]
    assert rows[KEYS[7]] == bad
    await store.close()


async def test_a_row_whose_key_is_missing_is_left(memory: MemoryBackend) -> None:
    store = Encrypted(memory, new_ring())
    await store.open()
    found = await rekey(store)
    assert len(found.left) == 160
    assert found.rewritten == 0
    await store.close()


# ---------------------------------------------------------------------- from plain


def sound(key: Key, payload: bytes) -> None:
    decode(key, payload)


async def test_plain_rows_are_encrypted_only_when_asked_and_only_sound_ones() -> None:
    memory = MemoryBackend()
    context = Context("binance", "BTCUSDT", "my-strategy")
    good, bad = context_key("signal", context), Key("signal", "ETHUSDT_a_x", "ETHUSDT")
    payload = encode(good, from_mapping("signal", signal_row()))
    await memory.open()
    await memory.commit("main", {good: payload, bad: payload}, {}, op=Op("w", 1))
    await memory.close()
    store = Encrypted(memory, old_ring())
    await store.open()
    assert set((await rekey(store)).left) == {str(good), str(bad)}
    found = await rekey(store, accept_plain=sound)
    assert set(found.left) == {str(bad)}
    assert found.rewritten == 1
    assert (await store.read("main", [good]))[good].payload == payload
    await store.close()
    await memory.open()
    records = await memory.read("main", [good, bad])
    assert sealed_row(good, records[good].payload).key == "old"
    assert records[bad].payload == payload, "another key's row is not made trustworthy by encrypting it"


async def test_half_done_from_plain_moves_nothing_to_quarantine_whichever_bot_starts() -> None:
    """Neither a bot with the keys nor one without takes the other half for damage."""
    memory = MemoryBackend()
    contexts = [Context("binance", f"S{n}USDT", "my-strategy") for n in range(100)]
    keys = [context_key("signal", context) for context in contexts]
    store = Store(memory, require=Survives.NOTHING)
    await store.open()
    lane = store.writer("test")
    for context, key in zip(contexts, keys, strict=True):
        await lane.commit({key: from_mapping("signal", signal_row(symbol=context.symbol))})
    await store.close()
    half = Encrypted(MortalBackend(memory, Killer(4)), old_ring())
    await half.open()
    with pytest.raises(Death):
        await rekey(half, accept_plain=sound)
    await half.close()
    before = dict(memory._state.scope("main").rows)
    assert len({record.payload[:13] == b'{"_encrypted"' for record in before.values()}) == 2, "half of each"
    for backend in (memory, Encrypted(memory, old_ring())):
        store = Store(backend, require=Survives.NOTHING)
        await store.open()
        found, damaged = await store.salvage(*keys)
        assert found
        assert damaged
        with pytest.raises(CorruptedError):
            await store.load(*keys)
        await store.close()
        assert memory._state.scope("main").rows == before
    again = Encrypted(memory, old_ring())
    await again.open()
    assert (await rekey(again, accept_plain=sound)).ok
    await again.close()


async def test_a_store_that_is_half_encrypted_lets_no_bot_in_whichever_step_it_stopped_at() -> None:
    """A plain bot cannot read the owner row, or one with the keys cannot read the session row."""
    domains = ("guard", "ledger", "outbox", "owner", "risk", "session", "signal")
    keys = [Key(domain, f"S{n}_a_x", "x") for domain in domains for n in range(40)]
    halves = 0
    for step in range(200):
        memory = MemoryBackend()
        await memory.open()
        for n, key in enumerate(keys, 1):
            scope = "main.ledger" if key.domain == "ledger" else "main"
            await memory.commit(scope, {key: b'{"n":1}'}, {}, op=Op("w", n))
        await memory.close()
        store = Encrypted(MortalBackend(memory, Killer(step)), old_ring())
        await store.open()
        try:
            await rekey(store, accept_plain=lambda key, payload: None)
        except Death:
            pass
        else:
            break
        await store.close()
        rows = {key: row for scope in memory._state.scopes.values() for key, row in scope.rows.items()}
        done = {key.domain for key, row in rows.items() if row.payload.startswith(b'{"_encrypted"')}
        if done and len(done) < len(domains):
            halves += 1
            assert "owner" in done
            assert "session" not in done
    assert halves >= 6


# ---------------------------------------------------------------------- processes


async def test_a_live_bot_trades_on_while_its_rows_are_rekeyed_again_and_again(
    tmp_path: Path, record_property: Note
) -> None:
    """Its ledger is, row for row, that of a bot which was left alone."""

    def make(name: str) -> SqliteBackend:
        return SqliteBackend(tmp_path / name)

    async def run(name: str) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            sys.executable, "-m", "holdfast.cli", "run", str(BOT), "--store", f"encrypted+sqlite:{tmp_path / name}",
            "--market", "synthetic:3", "--speed", "wait", "--minutes", "200", "--plain",
            env={**os.environ, "HOLDFAST_KEYS": ENV_BOTH}, stdout=asyncio.subprocess.DEVNULL,
        )  # fmt: skip

    async def trades(name: str) -> dict[Key, Any]:
        store = Store(Encrypted(make(name), both()))
        await store.open(read_only=True)
        found = {key: loaded.row for key, loaded in (await store.scan("ledger")).items()}
        assert not store.damaged
        await store.close()
        return found

    bot = await run("left-alone")
    assert await bot.wait() == 0
    bot = await run("rekeyed")
    waiting = asyncio.ensure_future(bot.wait())
    rings = [Keyring({"old": OLD, "new": NEW}), both()]
    turns = rewritten = 0
    while not waiting.done():
        store = Encrypted(make("rekeyed"), rings[turns % 2])
        await store.open()
        found = await rekey(store)
        rewritten += found.rewritten
        assert not found.left
        await store.close()
        turns += 1
    assert await waiting == 0
    expected = await trades("left-alone")
    assert len(expected) >= 10, "a run without trades proves nothing"
    assert await trades("rekeyed") == expected
    assert turns >= 5
    assert rewritten >= 100
    record_property("proof:re-keying", {"rows rewritten under a live bot": rewritten})


_REKEYING = """
import asyncio, sys
from holdfast.backends.sqlite import SqliteBackend
from holdfast.wrappers.encrypted import Encrypted
from holdfast.wrappers.keyring import Keyring
from holdfast.wrappers.rekeying import rekey

async def run():
    store = Encrypted(SqliteBackend(sys.argv[1]), Keyring.from_env())
    await store.open()
    await rekey(store, progress=lambda done, total: print(done, flush=True))

asyncio.run(run())
"""


async def test_a_process_killed_while_it_rekeys_has_lost_nothing(tmp_path: Path, record_property: Note) -> None:
    path = tmp_path / "store.db"
    await fill(SqliteBackend(path), old_ring())
    for after in range(1, 4):
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", _REKEYING, str(path),
            env={**os.environ, "HOLDFAST_KEYS": ENV_BOTH}, stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        assert process.stdout is not None
        for _ in range(after):
            await process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        await process.stdout.read()
        await process.wait()
        await require_rows(SqliteBackend(path), both())
    store = Encrypted(SqliteBackend(path), both())
    await store.open()
    assert (await rekey(store)).ok
    await store.close()
    await require_rows(SqliteBackend(path), new_ring())
    record_property("proof:re-keying", {"SIGKILLs": 3})


# ---------------------------------------------------------------------- the command


async def command(*arguments: str) -> int:
    return await asyncio.to_thread(main, ["rekey", *arguments])


async def test_the_command_rekeys_and_tells(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "store.db"
    await fill(SqliteBackend(path), old_ring())
    monkeypatch.setenv("HOLDFAST_KEYS", ENV_BOTH)
    assert await command(f"encrypted+sqlite:{path}", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["rows"], found["rewritten"], found["ok"], found["key"]) == (160, 160, True, "new")
    assert await command(f"encrypted+sqlite:{path}", "--plain") == 0
    told = capsys.readouterr().out
    assert "rewritten  0" in told
    assert "needs old no more" in told
    monkeypatch.setenv("HOLDFAST_KEYS", ENV_OLD)
    assert await command(f"encrypted+sqlite:{path}", "--plain") == 4
    told = capsys.readouterr().out
    assert "key id 'new'" in told
    for shown in (ENV_OLD, ENV_NEW):
        assert shown.partition("=")[2] not in told


async def test_the_command_refuses_a_store_that_a_bot_holds_and_what_is_no_encrypted_store(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOLDFAST_KEYS", ENV_OLD)
    folder = tmp_path / "data"
    assert await command(f"encrypted+file:{folder}") == 2
    assert not folder.exists(), "no store is made where there is none"
    bot = Encrypted(FileBackend(folder), old_ring())
    await bot.open()
    assert await command(f"encrypted+file:{folder}") == 3
    assert "held" in capsys.readouterr().err
    await bot.close()
    for wrong in ([f"file:{folder}"], []):
        assert await command(*wrong) == 2
    monkeypatch.delenv("HOLDFAST_KEYS")
    assert await command(f"encrypted+file:{folder}") == 2
    assert "HOLDFAST_KEYS is not set" in capsys.readouterr().err


async def test_the_command_prints_a_fresh_key_and_what_to_do_with_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert await command("--new-key") == 0
    captured = capsys.readouterr()
    monkeypatch.setenv("HOLDFAST_KEYS", captured.out.strip())
    assert len(Keyring.from_env().ids) == 1
    assert captured.out.strip().partition("=")[2] not in captured.err


async def test_the_command_encrypts_a_plain_store(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    context = Context("binance", "BTCUSDT", "my-strategy")
    key = context_key("signal", context)
    store = Store(FileBackend(tmp_path / "data"), require=Survives.NOTHING)
    await store.open()
    await store.writer("test").commit({key: from_mapping("signal", signal_row())})
    await store.close()
    monkeypatch.setenv("HOLDFAST_KEYS", ENV_OLD)
    assert await command(f"encrypted+file:{tmp_path / 'data'}") == 4
    assert await command(f"encrypted+file:{tmp_path / 'data'}", "--from-plain", "--plain") == 0
    assert "Every row is encrypted" in capsys.readouterr().out
    store = Store(Encrypted(FileBackend(tmp_path / "data"), old_ring()), require=Survives.NOTHING)
    await store.open()
    assert (await store.get(key)) is not None
    await store.close()


@pytest.mark.parametrize("alive", [True, False])
async def test_a_plain_store_is_not_encrypted_while_a_bot_gives_signs_of_life(
    alive: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOLDFAST_KEYS", ENV_OLD)
    path = tmp_path / "store.db"
    bot = Store(SqliteBackend(path), require=Survives.NOTHING)
    await bot.open()
    lane = bot.writer("worker")
    worker = Worker(holder="w1", beat=1, lease_seconds=0.4, host="elsewhere", pid=7, machine="another", at_ms=0)
    await lane.commit({worker_key("w1"): worker})
    ended = asyncio.Event()

    async def beat() -> None:
        for beats in itertools.count(2):
            if not alive or ended.is_set():
                return
            await lane.commit({worker_key("w1"): msgspec.structs.replace(worker, beat=beats)})
            await asyncio.sleep(0.02)

    beating = asyncio.ensure_future(beat())
    assert await command(f"encrypted+sqlite:{path}", "--from-plain") == (3 if alive else 0)
    ended.set()
    await beating
    assert ("process 7 on elsewhere" in capsys.readouterr().err) is alive
    await bot.close()
