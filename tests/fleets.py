"""A fleet under fire: workers of ``holdfast fleet`` are killed, paused and told to leave, and come again.

``python tests/fleets.py URL [--workers N] [--contexts N] [--seconds S] [--every S] [--lease S] [--seed S]`` prints one
JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import fleet_bot
import msgspec
from owner_records import Records

from holdfast.contract import Key, Survives
from holdfast.domains import context_key, encode
from holdfast.engine.fleet import assignment
from holdfast.engine.registry import Registry
from holdfast.invariants import check_store
from holdfast.names import Context
from holdfast.rows import Outage
from holdfast.rules.params import get_config
from holdfast.store import Store
from holdfast.testing.pure import pure_rows
from holdfast.urls import open_backend

BOT = Path(__file__).with_name("fleet_bot.py")
BLOWS = ("kill", "leave", "pause", "kill")
_LOOK_SECONDS = 0.05
_PAUSE_LEASES = 2.2
_PATIENCE_SECONDS = 120.0
_PULSE_SECONDS = 0.02
_SLOW_LEASES = 0.1
"""A takeover is about eight calls of the store, one after the other, in the lease that there is for them beside the one
that must pass: where a commit takes longer than this, it is the store that is slow."""
_MOST_LAST = 3


class Found(msgspec.Struct, kw_only=True):
    """What a fleet under fire showed."""

    contexts: int = 0
    kills: int = 0
    pauses: int = 0
    leaves: int = 0
    takeovers: int = 0
    """Contexts that lost their owner to a kill or a pause, and got another."""
    slowest_takeover_leases: float = 0.0
    """Of those in whose time no commit of a worker that ran took longer than a tenth of the lease."""
    takeovers_unjudged: int = 0
    """The others: how long they took says how slow the store was."""
    slowest_unjudged_leases: float = 0.0
    slowest_commit_seconds: float = 0.0
    """Of a worker that was not paused then; 0: all took less than a quarter of a second."""
    slowest_handover_leases: float = 0.0
    """Longest time between letting go of a context and its next takeover, whatever happened meanwhile."""
    handovers: int = 0
    """Contexts that were released by one worker and taken by another."""
    commits: int = 0
    trades: int = 0
    outages: int = 0
    last_workers: int = 0
    """How many it took, one after the other, until all was stored: more than one where the store was too slow for what
    the first had to say at its end, which the next start finds anew, as it does after a crash."""
    wrong: list[str] = []
    late_seconds: float = 0.0
    """How late this process was woken at most, when it wanted to sleep for a moment: how busy the machine was."""
    seconds: float = 0.0


class Pulse:
    """Measures how late a thread of this machine is woken. Begins at once."""

    def __init__(self) -> None:
        self.most_seconds = 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End it. Repeatable."""
        self._over.set()
        self._thread.join()

    def _beat(self) -> None:
        while not self._over.is_set():
            before = time.monotonic()
            self._over.wait(_PULSE_SECONDS)
            self.most_seconds = max(self.most_seconds, time.monotonic() - before - _PULSE_SECONDS)


class Blow(NamedTuple):
    """What was done to a worker, and when."""

    at: float
    pid: int
    kind: str


class Fire:
    """A fleet, and what is done to it.

    Args:
        url: The store.
        place: An empty directory.
        workers: How many.
        contexts: How many.
        lease_seconds: Of all.
        minute_seconds: How long a minute of the market takes.
        seed: For the market and for chance.
    """

    def __init__(
        self, url: str, place: Path, *, workers: int, contexts: int, lease_seconds: float, minute_seconds: float,
        seed: int,
    ) -> None:  # fmt: skip
        self.url, self.place, self.lease_seconds = url, place, lease_seconds
        self.random = random.Random(seed)
        self.workers, self.seed, self.minute_seconds = workers, seed, minute_seconds
        symbols = tuple(f"S{n}USDT" for n in range(contexts))
        self.contexts = [Context(fleet_bot.EXCHANGE, symbol, fleet_bot.STRATEGY) for symbol in symbols]
        self.names = [context_key("owner", context).entity_name for context in self.contexts]
        self.file = place / "contexts"
        self.file.write_text("".join(f"{' '.join(context)}\n" for context in self.contexts))
        (place / "records").mkdir()
        self.records = Records(place / "records")
        self.processes: dict[int, subprocess.Popen[bytes]] = {}
        self.blows: list[Blow] = []
        self.found = Found(contexts=contexts)
        self.symbols = symbols

    def run(self, seconds: float, every: tuple[float, float], blows: Sequence[str] = BLOWS) -> Found:
        """Let the market run for so long, with these blows at random times apart; then compare everything."""
        began, clock = time.monotonic(), self.place / "began"
        self.market = fleet_bot.Market(
            seed=self.seed, symbols=self.symbols, minutes=int(seconds / self.minute_seconds), begins=str(clock),
            minute_seconds=self.minute_seconds, elsewhere=True,
        )  # fmt: skip
        pulse = Pulse()
        try:
            for _ in range(self.workers):
                self._start()
            self._until(self._all_owned, "not every context found an owner")
            # Only now: however long a busy machine takes to start them, there is as much time for the blows.
            self.ends = time.monotonic() + seconds
            clock.with_suffix(".new").write_text(repr(time.monotonic()))
            clock.with_suffix(".new").rename(clock)
            for kind in itertools.cycle(blows):
                pause = self.random.uniform(*every)
                if time.monotonic() + pause > self.ends - 2.5 * self.lease_seconds:
                    break
                time.sleep(pause)
                self._strike(kind)
            time.sleep(max(0.0, self.ends - time.monotonic()) + 0.5)
            journals = len(list((self.place / "journals").iterdir()))
            if journals > self.workers + 1:
                self.found.wrong.append(
                    f"{journals} journals for {self.workers} workers: one that ended leaves its own"
                )
            self._end_all()
            compared: list[str] = []
            while self.found.last_workers < _MOST_LAST:
                self._finish()
                self.found.last_workers += 1
                if not (compared := asyncio.run(self._compared())):
                    break
            self.found.wrong += compared
        finally:
            pulse.stop()
            for one in self.processes.values():
                one.kill()
                one.wait()
        self.found.late_seconds = round(pulse.most_seconds, 2)
        self._judge()
        self.found.seconds = round(time.monotonic() - began, 1)
        return self.found

    # ------------------------------------------------------------------ processes

    def _start(self) -> subprocess.Popen[bytes]:
        environment = {
            **os.environ,
            "HOLDFAST_TEST_MARKET": msgspec.json.encode(self.market).decode(),
            "HOLDFAST_TEST_RECORD": str(self.records.directory),
        }
        command = [sys.executable, "-m", "holdfast.cli", "fleet", str(BOT), "--contexts", str(self.file), "--json"]
        command += ["--store", self.url, "--lease", str(self.lease_seconds)]
        command += ["--emergency", str(self.place / "journals")]
        with (self.place / "log").open("ab") as log:
            one = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self.processes[one.pid] = one
        return one

    def _strike(self, kind: str) -> None:
        pid = self.random.choice(list(self.processes))
        one = self.processes[pid]
        self.blows.append(Blow(time.monotonic(), pid, kind))
        if kind == "pause":
            os.kill(pid, signal.SIGSTOP)
            time.sleep(self._pause_seconds)
            os.kill(pid, signal.SIGCONT)
            self.found.pauses += 1
            return
        if kind == "kill":
            one.kill()
            self.found.kills += 1
        else:
            one.terminate()
            self.found.leaves += 1
        self._ended(one, -signal.SIGKILL if kind == "kill" else 0)
        time.sleep(self.random.uniform(0.0, 0.5 * self.lease_seconds))
        self._start()

    @property
    def _pause_seconds(self) -> float:
        return _PAUSE_LEASES * self.lease_seconds

    def _ended(self, one: subprocess.Popen[bytes], code: int) -> None:
        del self.processes[one.pid]
        try:
            found = one.wait(_PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            one.kill()
            found = one.wait()
        if found == -signal.SIGTERM and code == 0 and not self._worked(one.pid):
            return  # told to leave before it had begun
        if found != code:
            self.found.wrong.append(f"worker {one.pid} ended with {found}: {(self.place / 'log').read_text()[-500:]}")

    def _worked(self, pid: int) -> bool:
        return any(one.pid == pid for commits in self.records.refresh().commits.values() for one in commits)

    def _end_all(self) -> None:
        for one in list(self.processes.values()):
            one.terminate()
        for one in list(self.processes.values()):
            self._ended(one, 0)

    def _finish(self) -> None:
        """One last worker finds the market ended everywhere, whatever was open when the others left, and ends."""
        self._ended(self._start(), 0)

    def _all_owned(self) -> bool:
        records = self.records.refresh()
        return all(records.owner(name) is not None for name in self.names)

    def _until(self, holds: Callable[[], bool], complaint: str) -> None:
        ends = time.monotonic() + _PATIENCE_SECONDS
        while not holds():
            if time.monotonic() > ends:
                raise AssertionError(f"{complaint}: {(self.place / 'log').read_text()[-1000:]}")
            time.sleep(_LOOK_SECONDS)

    # ------------------------------------------------------------------ judging

    def _judge(self) -> None:
        records = self.records.refresh()
        self.found.commits = sum(map(len, records.commits.values()))
        pauses = [one for one in self.blows if one.kind == "pause"]
        self.slow = [
            (began, ended)
            for began, ended, pid in records.slow
            if ended - began > _SLOW_LEASES * self.lease_seconds
            and not any(one.pid == pid and began < one.at + self._pause_seconds and one.at < ended for one in pauses)
        ]
        self.found.slowest_commit_seconds = round(max((b - a for a, b in self.slow), default=0.0), 2)
        self.found.wrong += records.wrong()
        for name in self.names:
            self._takeovers(name)

    def _takeovers(self, name: str) -> None:
        """Measure how long a context had no owner: from the last blow that hit whoever could have had it."""
        moves = [one for one in self.records.commits[name] if one.taking or one.releasing]
        for let_go, taken in itertools.pairwise(moves):
            if let_go.releasing and taken.taking and taken.at < self.ends:
                leases = round((taken.at - let_go.at) / self.lease_seconds, 2)
                self.found.slowest_handover_leases = max(self.found.slowest_handover_leases, leases)
        self.found.handovers += sum(
            a.releasing and b.taking and a.pid != b.pid for a, b in itertools.pairwise(moves)
        )  # fmt: skip
        for blow in self.blows:
            if blow.kind == "leave":
                continue
            before = [one for one in moves if one.at < blow.at]
            if not before or before[-1].releasing or before[-1].pid != blow.pid:
                continue
            after = next((one for one in moves if one.at > blow.at and one.taking), None)
            if after is None:
                self.found.wrong.append(f"{name}: nobody took it over after {blow}")
                continue
            since = max(one.at for one in self.blows if one.at < after.at)
            took = round((after.at - since) / self.lease_seconds, 2)
            self.found.takeovers += 1
            if any(began < after.at and since < ended for began, ended in self.slow):
                self.found.takeovers_unjudged += 1
                self.found.slowest_unjudged_leases = max(self.found.slowest_unjudged_leases, took)
            else:
                self.found.slowest_takeover_leases = max(self.found.slowest_takeover_leases, took)

    async def _compared(self) -> list[str]:
        """Compare what is stored with the pure step, entries forbidden in the recorded outages."""
        store = Store(open_backend(self.url), require=Survives.NOTHING)
        await store.open(read_only=True)
        try:
            wrong = [str(one) for one in await check_store(store)]
            stored: dict[Key, bytes] = {}
            for domain in ("ledger", "signal", "schedule"):
                stored |= {key: encode(key, one.row) for key, one in (await store.scan(domain)).items()}
            outages: dict[Context, list[Outage]] = {context: [] for context in self.contexts}
            by_name = dict(zip(self.names, self.contexts, strict=True))
            for key, one in (await store.scan("outage")).items():
                assert isinstance(one.row, Outage)
                outages[by_name[key.entity_name]].append(one.row)
        finally:
            await store.close()
        self.found.trades = sum(key.domain == "ledger" for key in stored)
        self.found.outages = sum(map(len, outages.values()))
        expected = await self._pure(outages)
        missing, more = expected.keys() - stored.keys(), stored.keys() - expected.keys()
        wrong += [f"the pure step has {key}, the store has not" for key in sorted(missing)]
        wrong += [f"the store has {key}, the pure step has not" for key in sorted(more)]
        same = expected.keys() & stored.keys()
        wrong += [f"{key} is not as the pure step has it" for key in sorted(same) if expected[key] != stored[key]]
        return wrong

    async def _pure(self, outages: dict[Context, list[Outage]]) -> dict[Key, bytes]:
        market = self.market.exchange()
        market.pace._began = -1e9  # type: ignore[attr-defined] # every candle of it has closed
        registry = Registry()
        registry.add_exchange(market, exchange_name=fleet_bot.EXCHANGE)
        registry.add_strategy(
            fleet_bot.swift, strategy_name=fleet_bot.STRATEGY, interval="1m", symbols=self.symbols
        )  # fmt: skip
        return await pure_rows(market, registry, get_config(), outages)


def balance(contexts: Sequence[Context], holders: Sequence[str]) -> list[int]:
    """Return how many contexts each holder should run, fewest first."""
    should = list(assignment(contexts, holders).values())
    return sorted(should.count(holder) for holder in holders)


def main() -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--contexts", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--every", type=float, default=4.0, help="seconds between two blows, on the average")
    parser.add_argument("--lease", type=float, default=3.0)
    parser.add_argument("--minute", type=float, default=1.0, help="seconds that a minute of the market takes")
    parser.add_argument("--seed", type=int, default=7)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="holdfast-fleet-") as place:
        fire = Fire(
            options.url, Path(place), workers=options.workers, contexts=options.contexts, seed=options.seed,
            lease_seconds=options.lease, minute_seconds=options.minute,
        )  # fmt: skip
        found = fire.run(options.seconds, (0.5 * options.every, 1.5 * options.every))
    if found.slowest_takeover_leases > 2:
        found.wrong.append(f"a context had no owner for {found.slowest_takeover_leases} leases")
    plain: dict[str, Any] = msgspec.to_builtins(found)
    print(json.dumps(plain))
    sys.exit(bool(found.wrong))


if __name__ == "__main__":
    main()
