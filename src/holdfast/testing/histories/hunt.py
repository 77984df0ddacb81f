"""One history after another on one store: start the clients, let the storm rage, gather the lines, check them."""

from __future__ import annotations

import asyncio
import secrets
import shutil
import signal
import time
from collections import Counter
from collections.abc import Awaitable
from contextlib import AsyncExitStack
from pathlib import Path

import msgspec

from ...contract import Guarantees, Survives
from ...errors import InvalidInputError
from ..linearizable import check, shortest_failure
from ..proxy import Proxy
from .client import backend_of
from .lines import Answered, Broken, Line, Looked, Orders, Read, Repeated, Sent, Troubled, decode
from .model import Scribe
from .nest import Nest
from .storm import Restart, Storm, address, reached

MOST_AT_ONCE = 8
"""Operations in flight at once: what checking costs grows with them."""
_PROCESSES = 4
_TURNS = 5
"""How many processes hold, one after another, a store that belongs to one process."""
_UNKNOWNS = 2
_LONGEST_SECONDS = 300.0
_N_APART = 1_000_000
"""Op numbers between one process of a writer and its next."""
_OPERATIONS = (b'"type":"read"', b'"type":"head"', b'"type":"answered"', b'"type":"repeated"')


class Report(msgspec.Struct):
    """What one history was and whether it is linearizable."""

    seed: int
    operations: int = 0
    """Reads, heads, commits and repetitions that had an answer."""
    commits: int = 0
    refused: int = 0
    unknown: int = 0
    """Commits that were left without an outcome: their process was killed, or they could not be sent again."""
    resent: int = 0
    faults: dict[str, int] = {}
    seconds: float = 0.0
    tries: int = 0
    """Of the checker."""
    undecided: bool = False
    violations: list[str] = []
    """For each scope that is not linearizable, the shortest failing window, as text."""
    broken: list[str] = []
    """What the contract does not allow besides: a foreign exception, a call that does not return."""

    @property
    def ok(self) -> bool:
        """Whether it was checked, and nothing is wrong."""
        return not (self.violations or self.broken or self.undecided)


class Hunt:
    """Histories on one store; an async context manager.

    Args:
        store: As for ``holdfast run --store``. The rows that are written lie in scopes of their own and are deleted.
        work: A directory for the clients' lines; those of a history that is in order are removed.
        operations: How many each history has, at least.
        scopes: On how many scopes; each is checked by itself.
        restart: Kills the store's server and starts it again; called once in each history.
        opener: ``module:callable`` that takes ``store`` and returns the backend, for one that no URL names.
        token: Part of the scopes' names; drawn if empty.

    Raises:
        InvalidInputError: A number is out of its range.
    """

    def __init__(
        self,
        store: str,
        work: Path,
        *,
        operations: int = 1000,
        scopes: int = 1,
        restart: Restart | None = None,
        opener: str = "",
        token: str = "",
    ) -> None:
        if not 1 <= operations <= 100_000:
            raise InvalidInputError(f"operations is {operations}: use 1 to 100,000 for one history")
        if not 1 <= scopes <= 8:
            raise InvalidInputError(f"scopes is {scopes}: use 1 to 8")
        self.store = store
        self.work = work
        self.operations = operations
        self.restart = restart
        self.opener = opener
        self.token = token or secrets.token_hex(4)
        self.scopes = [f"history-{self.token}-{at}" for at in range(scopes)]
        self.promised: Guarantees | None = None
        self._first_n = 0
        self._nest = Nest(store, opener)
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Hunt:
        backend = backend_of(self.store, self.opener)
        self.promised = await backend.open()
        await backend.close()
        await self._stack.enter_async_context(self._nest)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def history(self, seed: int, number: int) -> Report:
        """Make a history and check it.

        Args:
            seed: Of what the clients do and of the faults; the interleaving is the machine's.
            number: Which history of this token it is: 0, 1, 2, …
        """
        assert self.promised is not None, "enter it first"
        place = self.work / f"history-{number}"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        began = time.monotonic()
        storm: Storm | None = None
        async with AsyncExitStack() as stack:
            found, proxy = address(self.store), None
            if found is not None:
                proxy = await stack.enter_async_context(Proxy(found.port, server_host=found.host))
            # Above what any writer used in these scopes, also in a hunt that ended: hence the time of day.
            self._first_n = max(self._first_n + 1000 * _N_APART, time.time_ns())
            cast = _Cast(self, self._nest, place, seed, self._first_n)
            if proxy is not None and found is not None:
                cast.through = found.through(proxy.port)
            alone = not self.promised.shared
            mortal = self.promised.survives > Survives.NOTHING
            storm = Storm(
                seed, proxy=proxy, restart=self.restart, kills=2 if mortal else 0, pauses=1 if alone else 3, cuts=6
            )
            try:
                async with asyncio.timeout(_LONGEST_SECONDS):
                    await (cast.play_alone(storm, mortal=mortal) if alone else cast.play(storm))
            except TimeoutError:
                cast.problems.append(f"the history did not end within {_LONGEST_SECONDS:.0f} s")
            finally:
                await cast.leave()
        report = judge(seed, self.scopes, cast.lines())
        report.seconds = time.monotonic() - began
        report.faults.update(storm.done)
        report.broken += cast.problems
        if report.ok:
            shutil.rmtree(place)
        return report


class _Cast:
    """The clients of one history."""

    def __init__(self, hunt: Hunt, nest: Nest, place: Path, seed: int, first_n: int) -> None:
        self.hunt, self.nest, self.place, self.seed = hunt, nest, place, seed
        self.through = hunt.store
        """The store's URL by way of the proxy, if there is one."""
        self.problems: list[str] = []
        self._first_n = first_n
        self._started = 0
        self._logs: list[Path] = []
        self._sizes: dict[Path, int] = {}
        self._counts: dict[Path, int] = {}
        self._running: dict[int, tuple[Orders, Awaitable[int], Path]] = {}
        self._killed: set[int] = set()

    # -- the stage of a storm ------------------------------------------------------------------------------------------

    def progress(self) -> float:
        """Return which part of the operations is done."""
        return sum(map(self._count, self._logs)) / self.hunt.operations

    def over(self) -> bool:
        """Tell whether all clients have ended."""
        return not self._running

    def clients(self) -> list[int]:
        """Return those that run."""
        return list(self._running)

    def send(self, client: int, number: int) -> None:
        """Send a signal to one."""
        self.nest.send(client, number)

    async def replace(self, client: int) -> None:
        """Kill one and start another in its place, with what it had left to do."""
        orders, end, log = self._running[client]
        self._killed.add(client)
        self.nest.send(client, signal.SIGKILL)
        await asyncio.shield(asyncio.wait_for(_result(end), 30))
        left = orders.operations - self._count(log)
        self._running.pop(client, None)
        if left > 0:
            self._start(orders.store, left, orders.hands)

    # -- plays ---------------------------------------------------------------------------------------------------------

    async def play(self, storm: Storm) -> None:
        """Several processes at once; every other one by way of the proxy."""
        await self._finish(self._start(self.hunt.store, 0, [], look_first=True))
        share = -(-self.hunt.operations // _PROCESSES)
        for at in range(_PROCESSES):
            hands = [f"w{at}{hand}" for hand in range(MOST_AT_ONCE // _PROCESSES)]
            self._start(self.through if at % 2 else self.hunt.store, share, hands)
        raging = asyncio.ensure_future(storm.rage(self))
        try:
            while self._running or not raging.done():
                if self._running:
                    await self._finish(next(iter(self._running)))
                else:
                    await raging  # it may have killed the last one, and put another in its place
            await raging
        finally:
            raging.cancel()
        await storm.calm()
        await self._finish(self._start(self.hunt.store, 0, [], look_last=True, sweep=True))

    async def play_alone(self, storm: Storm, *, mortal: bool) -> None:
        """One process after another, with several tasks each; some are killed."""
        turns = _TURNS if mortal else 1
        hands = [f"w{hand}" for hand in range(MOST_AT_ONCE)]
        for turn in range(turns):
            left = self.hunt.operations - sum(map(self._count, self._logs))
            share = max(1, -(-left // (turns - turn)))
            last = turn == turns - 1
            client = self._start(self.hunt.store, share, hands, look_first=True, look_last=last, sweep=last)
            doomed = mortal and not last and turn % 2 == 0
            _, end, log = self._running[client]
            if doomed:
                at = storm.chance.randrange(share // 4, max(share // 4 + 1, share - 10))
                await reached(lambda end=end, log=log, at=at: _done(end) or self._count(log) >= at)  # type: ignore[misc]
                self._killed.add(client)
                self.nest.send(client, signal.SIGKILL)
                storm.done["kill"] += 1
            await self._finish(client)

    def _start(
        self, store: str, operations: int, hands: list[str], *, look_first: bool = False, look_last: bool = False,
        sweep: bool = False,
    ) -> int:  # fmt: skip
        self._started += 1
        log = self.place / f"client-{self._started}.lines"
        orders = Orders(
            store, str(log), self.hunt.scopes, operations, hands, self._first_n + self._started * _N_APART,
            self.seed * 1000 + self._started, _UNKNOWNS, self.hunt.opener, look_first, look_last, sweep,
        )  # fmt: skip
        client, end = self.nest.start(orders, str(log.with_suffix(".output")))
        self._logs.append(log)
        self._running[client] = (orders, end, log)
        return client

    async def _finish(self, client: int) -> None:
        """Wait until a client has ended; if it was not killed it must have ended well."""
        _, end, log = self._running[client]
        code = await asyncio.shield(_result(end))
        self._running.pop(client, None)
        if code and client not in self._killed:
            output = log.with_suffix(".output")
            said = output.read_text(errors="replace")[-2000:] if output.exists() else ""
            self.problems.append(f"a client ended with {code}: {said}")

    async def leave(self) -> None:
        """Kill what still runs."""
        for client, (_, end, _) in list(self._running.items()):
            self.nest.send(client, signal.SIGKILL)
            await _result(end)

    # -- lines ---------------------------------------------------------------------------------------------------------

    def _count(self, log: Path) -> int:
        """Return how many operations a log says were answered, reading only what is new."""
        try:
            with log.open("rb") as file:
                file.seek(self._sizes.get(log, 0))
                new = file.read()
        except FileNotFoundError:
            return 0
        whole = new.rfind(b"\n") + 1
        self._sizes[log] = self._sizes.get(log, 0) + whole
        found = self._counts[log] = self._counts.get(log, 0) + sum(new[:whole].count(word) for word in _OPERATIONS)
        return found

    def lines(self) -> list[Line]:
        """Return what all clients wrote, the first client's first."""
        raw = [line for log in self._logs if log.exists() for line in log.read_bytes().splitlines()]
        return [line for line in map(decode, raw) if line is not None]


async def _result(end: Awaitable[int]) -> int:
    return await end


def _done(end: Awaitable[int]) -> bool:
    return isinstance(end, asyncio.Future) and end.done()


def judge(seed: int, scopes: list[str], lines: list[Line]) -> Report:
    """Check what the clients wrote, scope by scope, and count it."""
    report = Report(seed)
    answered = {(line.writer, line.n) for line in lines if isinstance(line, Answered)}
    sent = [line for line in lines if isinstance(line, Sent)]
    report.operations = sum(isinstance(line, Read | Looked | Answered | Repeated) for line in lines)
    report.commits = sum(isinstance(line, Answered) and line.number > 0 for line in lines)
    report.refused = sum(isinstance(line, Answered) and line.clashes is not None for line in lines)
    report.unknown = len({(line.writer, line.n) for line in sent} - answered)
    report.resent = sum(line.again for line in sent)
    report.faults = dict(Counter(line.what for line in lines if isinstance(line, Troubled)))
    report.broken = [line.what for line in lines if isinstance(line, Broken)]
    for scope in scopes:
        history = Scribe(scope, lines).history()
        verdict = check(history.operations, history.start)
        report.tries += verdict.tries
        report.undecided = report.undecided or verdict.fits is None
        if verdict.fits is False:
            window = shortest_failure(history.operations, history.start)
            head = f"{scope} at commit {window.state.number}, after {window.before} operations that fit; these do not:"
            report.violations.append("\n".join([head, *window.lines()]))
    return report
