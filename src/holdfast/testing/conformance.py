"""The conformance suite: does a backend keep every promise of :mod:`holdfast.contract`?

Run it over your own storage, with or without pytest::

    report = await certify(lambda place: MyBackend(place / "data"))
    print(report)                                   # a table; report.ok tells whether all passed

    @pytest.mark.parametrize("check", conformance_cases())
    async def test_my_backend(check, tmp_path):
        await check.run_on(Bench(lambda place: MyBackend(place / "data"), tmp_path))

A *factory* takes a directory of its own and makes a backend. Called twice with
the same directory it must give two backends over the same stored data; a
backend that keeps its data elsewhere may use the directory's name as a prefix.
"""

from __future__ import annotations

import enum
import tempfile
import traceback
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ..contract import MAX_PAYLOAD_BYTES, Backend, Guarantees, Key, Op, Record, Survives
from ..errors import HoldfastError

if TYPE_CHECKING:
    from _pytest.mark.structures import ParameterSet

Factory = Callable[[Path], Backend]


class Need(enum.Enum):
    """What a backend must promise for a check to apply to it."""

    ATOMIC = "a commit of several rows is atomic"
    PERSISTENT = "it survives the death of the process"
    EXCLUSIVE = "it is persistent and belongs to one process at a time"
    LISTS = "it can list what it holds"


class Material(NamedTuple):
    """What the checks write: keys in byte order, at least six of them, and a payload for a key and a number.

    The payloads of a key must differ for different numbers from 0 to 9999.
    """

    keys: tuple[Key, ...]
    payload: Callable[[Key, int], bytes]
    odd_payloads: tuple[bytes, ...] = ()
    """Payloads that must come back byte for byte under the first key."""
    free: bool = True
    """Any other key and any other JSON text can be written too; otherwise only the above."""
    most_bytes: int = MAX_PAYLOAD_BYTES
    """The largest payload that a commit must take."""


def _plain_payload(key: Key, number: int) -> bytes:
    return b'{"id":"%b","number":%d}' % (key.entity_id.encode(), number)


PLAIN = Material(
    keys=tuple(
        sorted(
            Key(*parts)
            for parts in (
                ("partial", "BTCUSDT_a_x", "levels"),
                ("risk", "limits", "BTCUSDT_a_x"),
                ("risk", "limits", "ETHUSDT_a_x"),
                ("schedule", "BTCUSDT_a_x", "BTCUSDT"),
                ("signal", "BTCUSDT_a_x", "BTCUSDT"),
                ("signal", "BTCUSDT_a_x-b", "BTCUSDT"),
                ("signal", "BTC%2FUSDT%3AUSDT_a_x", "BTC%2FUSDT%3AUSDT"),
            )
        )
    ),
    payload=_plain_payload,
    odd_payloads=(
        b"{}",
        b"null",
        b'""',
        b"[]",
        b" { \"a\" : 1 }\n",
        b'{"b":1,"a":2,"a":3}',
        b"[0.1,-0.0,1e-7,5e-324,1.7976931348623157e308,1E400]",
        b"[9007199254740993,18446744073709551615,123456789012345678901234567890]",
        '{"näme":"e\u0301 \u00e9 \u202e \U0001f600 \u2028"}'.encode(),
        b'"\\u0000\\ud800 \\/ \\""',
        b"[" * 200 + b"]" * 200,
        b'"' + b"x" * 70_000 + b'"',
    ),
)  # fmt: skip
"""Material for any backend that keeps arbitrary keys and payloads."""


class Bench:
    """The ground of one check: makes backends over one place, and closes what was opened.

    Args:
        factory: Makes a backend over a directory.
        place: An empty directory, of this check alone.
        material: What to write.
        can_list: The backend's ``keys``, ``scopes`` and ``head`` tell what is stored.
    """

    scope = "main"

    def __init__(self, factory: Factory, place: Path, material: Material = PLAIN, *, can_list: bool = True) -> None:
        self.factory = factory
        self.place = place
        self.material = material
        self.can_list = can_list
        self.keys = material.keys
        self._opened: list[Backend] = []
        self._n: dict[str, int] = {}

    def make(self) -> Backend:
        """Return a backend that is not open yet; it is closed at the end."""
        backend = self.factory(self.place)
        self._opened.append(backend)
        return backend

    async def open(self) -> Backend:
        """Make and open a backend over the place."""
        backend = self.make()
        await backend.open()
        return backend

    async def lacks(self, needs: Collection[Need]) -> Need | None:
        """Return the first of ``needs`` that this backend does not promise, or None."""
        if not needs:
            return None
        with tempfile.TemporaryDirectory(prefix="holdfast-probe-") as elsewhere:
            probe = self.factory(Path(elsewhere))
            promised = await probe.open()
            await probe.close()
        return next((need for need in needs if not self._has(need, promised)), None)

    def _has(self, need: Need, promised: Guarantees) -> bool:
        match need:
            case Need.ATOMIC:
                return promised.atomic
            case Need.PERSISTENT:
                return promised.survives >= Survives.PROCESS and self.can_list
            case Need.EXCLUSIVE:
                return promised.survives >= Survives.PROCESS and self.can_list and not promised.shared
            case Need.LISTS:
                return self.can_list

    def op(self, writer: str = "w") -> Op:
        """Return the writer's next op."""
        self._n[writer] = self._n.get(writer, 0) + 1
        return Op(writer, self._n[writer])

    def payload(self, at: int, number: int) -> bytes:
        """Return payload ``number`` for the key at index ``at``."""
        return self.material.payload(self.keys[at], number)

    async def put(
        self,
        backend: Backend,
        numbers: Mapping[int, int | None],
        expect: Mapping[int, int] | None = None,
        op: Op | None = None,
    ) -> int:
        """Commit payload numbers (None deletes) for keys named by their index."""
        changes = {
            self.keys[at]: None if number is None else self.payload(at, number) for at, number in numbers.items()
        }
        guards = {self.keys[at]: version for at, version in (expect or {}).items()}
        return await backend.commit(self.scope, changes, guards, op=op or self.op())

    async def get(self, backend: Backend, at: int) -> Record | None:
        """Read the key at index ``at``."""
        return (await backend.read(self.scope, [self.keys[at]])).get(self.keys[at])

    async def close(self) -> None:
        """Close every backend that was made."""
        while self._opened:
            try:
                await self._opened.pop().close()
            except HoldfastError:
                continue  # a check may leave a backend that refuses everything; what counts was asserted before


class Check(NamedTuple):
    """One independent check: a sentence, what it takes to apply, and the coroutine that asserts it."""

    name: str
    run: Callable[[Bench], Awaitable[None]]
    needs: tuple[Need, ...]

    async def run_on(self, bench: Bench) -> Need | None:
        """Run the check, or return what the backend does not promise (then nothing was run).

        Raises:
            AssertionError: The backend breaks the contract; the message says where.
        """
        lacking = await bench.lacks(self.needs)
        if lacking is not None:
            return lacking
        try:
            await self.run(bench)
        finally:
            await bench.close()
        return None


CHECKS: list[Check] = []


def check(*needs: Need) -> Callable[[Callable[[Bench], Awaitable[None]]], Callable[[Bench], Awaitable[None]]]:
    """Enter a coroutine function into the suite; its name, with spaces, is the sentence it asserts."""

    def enter(run: Callable[[Bench], Awaitable[None]]) -> Callable[[Bench], Awaitable[None]]:
        CHECKS.append(Check(getattr(run, "__name__", "check").replace("_", " "), run, needs))
        return run

    return enter


class Line(NamedTuple):
    """One line of a report: the check, ``"passed"``, ``"failed"`` or ``"not promised"``, and why."""

    name: str
    outcome: str
    why: str = ""


class Report(NamedTuple):
    """What :func:`certify` found."""

    backend: str
    guarantees: Guarantees | None
    lines: tuple[Line, ...]

    @property
    def ok(self) -> bool:
        """Whether no check failed."""
        return all(line.outcome != "failed" for line in self.lines)

    def count(self, outcome: str) -> int:
        """How many lines have this outcome."""
        return sum(line.outcome == outcome for line in self.lines)

    def __str__(self) -> str:
        width = max((len(line.name) for line in self.lines), default=0)
        rows = [f"  {line.name:<{width}}  {line.outcome}{': ' + line.why if line.why else ''}" for line in self.lines]
        tally = ", ".join(f"{self.count(what)} {what}" for what in ("passed", "failed", "not promised"))
        return "\n".join([self.backend, *rows, tally])


async def certify(
    factory: Factory, *, material: Material = PLAIN, can_list: bool = True, only: Sequence[str] = ()
) -> Report:
    """Run the whole suite over a backend, each check in an empty directory of its own.

    Args:
        factory: Makes a backend over a directory (see the module's text).
        material: What to write, where the backend does not take any key and payload.
        can_list: Whether the backend can tell which keys it holds.
        only: Names of checks to run; empty runs all.

    Returns:
        One line for each check; ``report.ok`` is False if any failed.
    """
    lines: list[Line] = []
    named = "?"
    promised: Guarantees | None = None
    with tempfile.TemporaryDirectory(prefix="holdfast-certify-") as root:
        first = Path(root) / "probe"
        first.mkdir()
        probe = factory(first)
        try:
            promised = await probe.open()
            named = promised.backend
        except Exception as error:
            lines.append(Line("opens over an empty place", "failed", f"{type(error).__name__}: {error}"))
        finally:
            await probe.close()
        for at, one in enumerate(_all_checks() if promised is not None else ()):
            if only and one.name not in only:
                continue
            place = Path(root) / f"check-{at}"
            place.mkdir()
            lines.append(await _outcome(one, Bench(factory, place, material, can_list=can_list)))
    return Report(named, promised, tuple(lines))


async def _outcome(one: Check, bench: Bench) -> Line:
    try:
        lacking = await one.run_on(bench)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return Line(one.name, "failed", f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})")
    return (
        Line(one.name, "passed") if lacking is None else Line(one.name, "not promised", f"needs that {lacking.value}")
    )


def _all_checks() -> list[Check]:
    from . import (
        checks,
        races,  # they enter themselves into CHECKS
    )

    del checks, races
    return list(CHECKS)


def conformance_cases() -> list[ParameterSet]:
    """Return the suite for ``pytest.mark.parametrize("check", conformance_cases())``."""
    import pytest

    return [pytest.param(one, id=one.name.replace(" ", "-")) for one in _all_checks()]
