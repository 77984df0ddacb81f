"""Zombies: an owner is paused past its lease, replaced, and woken; nothing that it then does may count.

Both processes trade one account of a paper venue, a third process, which is the witness. An owner is paused anywhere,
or right after it committed the intent of an order, or right before the order is sent: after its last look at the lease.

``python tests/zombies.py URL [--runs N] [--lease SECONDS] [--seed S] [--time-cap SECONDS]`` prints one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, get_args

import fleet_bot
import msgspec
from order_witness import Witness
from owner_records import Commit, Records, entity_of

from holdfast.brokers.paper_venue import VenueProcess
from holdfast.brokers.paper_wire import Heard
from holdfast.contract import Survives
from holdfast.domains import context_key
from holdfast.engine.broker import Features, RepeatedIds
from holdfast.engine.orders import Book, is_ended
from holdfast.invariants import check_store
from holdfast.names import Context, quote
from holdfast.rows import Order, Owner
from holdfast.store import Store
from holdfast.urls import open_backend

SYMBOLS = ("BTCUSDT", "ETHUSDT", "SOLUSDT")
MINUTE_SECONDS = 0.05
PLACES = ("anywhere", "sending", "committed", "sending")
_LOOK_SECONDS = 0.02
_DUST = 1e-9
_MOST_TOLD = 20
_PATIENCE_LEASES = 100
"""How long anything may take that should take one lease, on a busy machine."""
_ORDERLESS_LEASES = 30
"""After so long without an order it cannot be stopped there: on so busy a machine it never sees its lease held."""
_BLOCKED_LEASES = 8
"""After so long nobody can replace a paused owner: it holds a lock of the store's, as one of SQLite's writers may."""


class Found(msgspec.Struct, kw_only=True):
    """What some runs showed."""

    runs: int = 0
    """An owner was paused past its lease, replaced and woken."""
    blocked: int = 0
    """It was paused while it held a lock of the store's, so that nobody could replace it; not counted as runs."""
    orderless: int = 0
    """It sent no order at which it could have been paused; not counted as runs."""
    late_writes_refused: int = 0
    """Contexts whose old owner ended with an error that names the new one."""
    stopped_before_sending: int = 0
    """Runs whose pause began between the last look at the lease and the request."""
    orders: int = 0
    """Taken by the venue."""
    late_orders_refused: int = 0
    """Requests of a replaced owner, on their way when it was paused, that the venue refused."""
    commits: int = 0
    events: int = 0
    longest_takeover_leases: float = 0.0
    wrong: list[str] = []
    seconds: float = 0.0


class Zombies:
    """Two processes that want to own the same contexts.

    Args:
        url: The store.
        place: An empty directory.
        lease_seconds: Of both.
        seed: For the market and the moments of the pauses.
        valid_seconds: How long orders are valid. Less than the lease: what a paused owner was about to send is refused
            when it wakes. More: only the lease keeps it from sending, and its successor waits or sends the same order.
        repeated: Whether the venue refuses repeated ids.
        homes: The machines of the two, where they are to believe that these are two. Then they trade nowhere: orders
            carry times of the wall clock, which must be near the venue's.
    """

    def __init__(
        self, url: str, place: Path, *, lease_seconds: float, seed: int, valid_seconds: float = 0.5,
        repeated: RepeatedIds = "always", homes: Sequence[fleet_bot.Home] = (),
    ) -> None:  # fmt: skip
        self.homes, self.valid_seconds = homes, valid_seconds
        self.features = Features(refuses_repeated_ids=repeated, refuses_expired=True, reduce_only=True)
        self.url, self.lease_seconds, self.seed = url, lease_seconds, seed
        self.logs = place / "logs"
        self.logs.mkdir()
        (place / "records").mkdir()
        self.records = Records(place / "records")
        self.random = random.Random(seed)
        self.found = Found()
        self.venue: VenueProcess | None = None
        self.heard: list[Heard] = []
        self.contexts = [Context(fleet_bot.EXCHANGE, symbol, fleet_bot.STRATEGY) for symbol in SYMBOLS]
        self.names = [context_key("owner", context).entity_name for context in self.contexts]

    def run(self, runs: int, *, time_cap_seconds: float = float("inf")) -> Found:
        """Pause, replace and wake so often; then look at everything that was committed and told."""
        began = time.monotonic()
        with ExitStack() as stack:
            if not self.homes:
                self.venue = stack.enter_context(VenueProcess(self.features))
            with self._processes(minutes=int(min(runs * 400, 200_000)) + 2000) as processes:
                while self.found.runs < runs and not self.found.wrong:
                    if (
                        time.monotonic() - began > time_cap_seconds
                        or self.found.blocked + self.found.orderless > 5 + runs
                    ):
                        break
                    if any(one.poll() is not None for one in processes.values()):
                        break  # how it ended is told below
                    self._one(processes)
                    self._listen()
                self._until(self._calm, "the last owner does not go on")
            self._judge()
        self.found.seconds = round(time.monotonic() - began, 1)
        return self.found

    def _calm(self, records: Records) -> bool:
        """Whether the last owner has gone on with everything, so that it knows what became of others' orders."""
        owned = [(name, records.owner(name)) for name in self.names]
        return all(owner is not None and records.has_decided(name, owner.epoch) for name, owner in owned)

    @contextmanager
    def _processes(self, *, minutes: int) -> Iterator[dict[int, subprocess.Popen[bytes]]]:
        market = fleet_bot.Market(
            seed=self.seed, symbols=SYMBOLS, minutes=minutes, began=time.monotonic() + 1, minute_seconds=MINUTE_SECONDS,
            venue="" if self.venue is None else self.venue.address, features=self.features,
            valid_seconds=self.valid_seconds,
        )  # fmt: skip
        environment = {
            **os.environ,
            "HOLDFAST_TEST_MARKET": msgspec.json.encode(market).decode(),
            "HOLDFAST_TEST_RECORD": str(self.records.directory),
            **({"HOLDFAST_TEST_CALM": "1"} if self.url.startswith("sqlite:") else {}),
        }
        command = [sys.executable, str(Path(__file__).with_name("owner_process.py")), self.url, str(self.lease_seconds)]
        processes: dict[int, subprocess.Popen[bytes]] = {}
        try:
            for number in range(2):
                home = self.homes[number] if self.homes else None
                if home is not None:
                    environment["HOLDFAST_TEST_HOME"] = msgspec.json.encode(home).decode()
                with (self.logs / f"{number}").open("wb") as log:
                    there = [] if home is None else home.command()
                    one = subprocess.Popen([*there, *command], env=environment, stdout=log, stderr=log)
                processes[_only_child(one.pid) if there else one.pid] = one
            yield processes
            for pid in processes:
                os.kill(pid, signal.SIGTERM)
            for one in processes.values():
                if one.wait(60):
                    self.found.wrong.append(f"process {one.pid} ended with {one.returncode}: {self._last_words()}")
        finally:
            for one in processes.values():
                one.kill()
                one.wait()

    def _last_words(self) -> str:
        return " | ".join(path.read_text()[-1500:] for path in sorted(self.logs.iterdir()))

    # ------------------------------------------------------------------ one run

    def _one(self, processes: dict[int, subprocess.Popen[bytes]]) -> None:
        """Pause one process somewhere until the other owns what it had, then wake it."""
        settled = self._until(self._settled, "nobody owns everything, and goes on with it")
        if settled is None:
            return
        pid = self.random.choice([owner.pid for owner in settled.values()])
        had = {name: owner for name, owner in settled.items() if owner.pid == pid}
        time.sleep(self.random.uniform(0.0, 4 * MINUTE_SECONDS))
        place = PLACES[self.found.runs % len(PLACES)] if self.venue else "anywhere"
        try:
            if not self._pause(pid, place, had):
                return
            paused = time.monotonic()
            replaced = self._until(lambda records: self._replaced(records, had, pid), "", _BLOCKED_LEASES)
        finally:
            os.kill(pid, signal.SIGCONT)
        if replaced is None:
            self.found.blocked += 1
            return
        took = max((replaced.owner(name).at - paused) / self.lease_seconds for name in had)
        self.found.longest_takeover_leases = max(self.found.longest_takeover_leases, round(took, 2))
        ended = self._until(lambda records: self._fenced(records, had, pid), f"process {pid} was not told in time")
        if ended is None:
            return
        self.found.runs += 1
        self.found.stopped_before_sending += place == "sending"
        self.found.late_writes_refused += len(had)

    def _listen(self) -> None:
        if self.venue is not None:
            self.heard += self.venue.heard()

    def _pause(self, pid: int, place: str, had: dict[str, Commit]) -> bool:
        """Pause the process, as SIGSTOP does, at this place of its code; False where it was replaced before."""
        if place != "anywhere":
            stop = self.records.directory / f"stop-{pid}"
            stop.with_suffix(".new").write_text(place)
            stop.with_suffix(".new").rename(stop)
            ends = time.monotonic() + _ORDERLESS_LEASES * self.lease_seconds
            while not _is_stopped(pid):
                replaced = any(self.records.refresh().owner(name) != owner for name, owner in had.items())
                if replaced or time.monotonic() > ends:
                    stop.unlink(missing_ok=True)
                    self.found.orderless += not replaced
                    return False
                time.sleep(_LOOK_SECONDS / 4)
        os.kill(pid, signal.SIGSTOP)
        return True

    def _settled(self, records: Records) -> dict[str, Commit]:
        """Return the takeover of each context, once all have an owner that has gone on to commit something."""
        owned = {name: owner for name in self.names if (owner := records.owner(name)) is not None}
        busy = all(records.commits[name][-1].number > owner.number for name, owner in owned.items())
        return owned if len(owned) == len(self.names) and busy else {}

    def _replaced(self, records: Records, had: dict[str, Commit], pid: int) -> Any:
        """The records, once another process owns everything and has committed an event of its own everywhere.

        Where orders outlast the lease it need not have committed anything yet: it waits for those of the first.
        """
        for name, before in had.items():
            owner = records.owner(name)
            if owner is None or owner.epoch == before.epoch or owner.pid == pid:
                return None
            if self.valid_seconds < self.lease_seconds and not records.has_decided(name, owner.epoch):
                return None
        return records

    def _fenced(self, records: Records, had: dict[str, Commit], pid: int) -> Any:
        """The records, once the old owner has ended everywhere with an error that names the new one."""
        for name, before in had.items():
            told = [
                line["error"] for line in records.fenced
                if line["pid"] == pid and entity_of(line["context"]) == name and f"(epoch {before.epoch})" in
                line["error"].rpartition("not by this session")[2]
            ]  # fmt: skip
            if not told:
                return None
            by = re.search(r"owned by process (\d+) on ", told[0])
            if by is None or int(by[1]) == pid:
                self.found.wrong.append(f"{name}: the error does not name the new owner: {told[0]}")
        return records

    def _until(self, holds: Callable[[Records], Any], complaint: str, leases: float = _PATIENCE_LEASES) -> Any:
        """Look at the records until they are as wanted; None (and a complaint, if there is one) when they never are."""
        ends = time.monotonic() + leases * self.lease_seconds
        while time.monotonic() < ends:
            found = holds(self.records.refresh())
            if found:
                return found
            time.sleep(_LOOK_SECONDS)
        if complaint:
            self.found.wrong.append(f"{complaint}: {self._last_words()}")
        return None

    # ------------------------------------------------------------------ judging

    def _judge(self) -> None:
        records = self.records.refresh()
        self.found.commits = sum(map(len, records.commits.values()))
        self.found.events = sum(map(len, records.told.values()))
        self.found.wrong += records.wrong()
        self._listen()
        witness = Witness(records, self.heard, dict(zip(SYMBOLS, self.names, strict=True)), fleet_bot.QUANTITY)
        self.found.wrong += witness.wrong()
        self.found.orders, self.found.late_orders_refused = witness.accepted, witness.late_refused
        self.found.wrong += [f"{line['context']}: {line['error']}" for line in records.failed]
        self.found.wrong += asyncio.run(self._stored(records))

    async def _stored(self, records: Records) -> list[str]:
        """Look into the store itself: the newest commit of each lane that ever owned a context, against its end."""
        store = Store(open_backend(self.url), require=Survives.NOTHING)
        await store.open(read_only=True)
        try:
            wrong = [str(one) for one in await check_store(store)]
            for context, name in zip(self.contexts, self.names, strict=True):
                loaded = await store.get(context_key("owner", context))
                newest = records.commits[name][-1].epoch
                if loaded is None or not isinstance(loaded.row, Owner) or loaded.row.epoch != newest:
                    wrong.append(f"{name}: the store's owner row is not of epoch {newest}")
            wrong += await self._positions(store)
            return wrong + await self._lanes(store, records)
        finally:
            await store.close()

    async def _positions(self, store: Store) -> list[str]:
        """Compare what the account holds with what the rows of its orders say."""
        held = {one.symbol: one.quantity for one in self.venue.witness().positions} if self.venue else {}
        wrong = []
        for symbol, name in zip(SYMBOLS, self.names, strict=True):
            rows = [loaded.row for loaded in (await store.scan("order", name)).values()]
            book = Book(row for row in rows if isinstance(row, Order))
            known = sum(book.position(signal_id) for signal_id in book.signal_ids())
            # The last owner may have been ended while it still waited to learn what became of one of them.
            asked = sum(one.quantity - one.filled_quantity for one in book.orders.values() if not is_ended(one))
            if abs(held.get(symbol, 0.0) - known) > asked + _DUST:
                wrong.append(f"{name}: the account holds {held.get(symbol, 0.0)}, the rows say {known}")
        return wrong

    async def _lanes(self, store: Store, records: Records) -> list[str]:
        """The server remembers each lane's last commit: none may lie in the time of a later owner."""
        head = await store.head()
        wrong = []
        for context, name in zip(self.contexts, self.names, strict=True):
            lanes = sorted(op.number for lane, op in head.writers.items() if lane.startswith(_lane(context)))
            owners = [one for one in records.commits[name] if one.taking]
            ends = {max(c.number for c in records.commits[name] if c.epoch == one.epoch) for one in owners}
            wrong += [
                f"{name}: a lane's last commit {number} was told to nobody and lies in another's time"
                for number in lanes
                if number not in ends and not self._in_doubt(records, name, number)
            ]
        return wrong

    @staticmethod
    def _in_doubt(records: Records, name: str, number: int) -> bool:
        """Whether a commit that no record tells of was the last one of an epoch, whose process never learned of it."""
        before = [one for one in records.commits[name] if one.number < number]
        after = [one for one in records.commits[name] if one.number > number]
        return not before or not after or before[-1].epoch < after[0].epoch


def _only_child(pid: int) -> int:
    children = Path(f"/proc/{pid}/task/{pid}/children")
    ends = time.monotonic() + 30
    while not (found := children.read_text().split()):
        assert time.monotonic() < ends
        time.sleep(0.01)
    return int(found[0])


def _is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def _lane(context: Context) -> str:
    return f"{quote(str(context), keep_underscore=True)}@"


def main() -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--lease", type=float, default=0.8)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--time-cap", type=float, default=float("inf"))
    parser.add_argument("--valid", type=float, default=0.5, metavar="SECONDS", help="how long orders are valid")
    parser.add_argument("--repeated", choices=get_args(RepeatedIds), default="always", help="what the venue refuses")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="holdfast-zombies-") as place:
        zombies = Zombies(options.url, Path(place), lease_seconds=options.lease, seed=options.seed,
                          valid_seconds=options.valid, repeated=options.repeated)  # fmt: skip
        found = zombies.run(options.runs, time_cap_seconds=options.time_cap)
    found.wrong[_MOST_TOLD:] = []
    print(json.dumps(msgspec.to_builtins(found)))
    sys.exit(bool(found.wrong))


if __name__ == "__main__":
    main()
