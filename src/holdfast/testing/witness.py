"""A witness outside the process that is killed: which commits did it acknowledge, and are they all still there?

The process under test puts :class:`Reporting` around its backend, which writes one line to a file before each
commit and one after it. Lines that were written survive the death of the process, so nothing that it was told
is forgotten. :class:`Witness` reads them and later looks into the store, read-only.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from zlib import crc32

import msgspec

from ..contract import Backend, Key, Op, Record
from ..wrappers.around import Around

_OTHER = "other"


class _Line(msgspec.Struct, omit_defaults=True):
    """``ready``: recovered, from here on it serves. ``begin``: a commit is sent. ``done``: it was acknowledged."""

    what: str
    pid: int = 0
    phase: str = ""
    scope: str = ""
    number: int = 0
    rows: list[tuple[Key, int]] = []
    """Each row that was written, with the checksum of its payload; -1 where it was deleted."""
    events: list[str] = []
    """Ids of the events that were told to a listener."""


_ENCODER = msgspec.json.Encoder()
_DECODER = msgspec.json.Decoder(_Line)


class Reporter:
    """Appends lines to the witness's open file or pipe; each is one write, so a kill leaves whole lines."""

    def __init__(self, fd: int | None) -> None:
        self._fd = fd
        self._pid = os.getpid()
        self._ready = False

    def tell(self, line: _Line) -> None:
        """Append a line."""
        line.pid = self._pid
        if self._fd is not None:
            os.write(self._fd, _ENCODER.encode(line) + b"\n")

    def ready(self) -> None:
        """Tell, once, that recovery is over."""
        if not self._ready:
            self._ready = True
            self.tell(_Line("ready"))

    def told(self, event_id: str) -> None:
        """Tell that the listeners are being given this event."""
        self.tell(_Line("told", events=[event_id]))


def phase_of(changes: Mapping[Key, bytes | None]) -> str:
    """Name what a commit does, by the events that it carries: opening, activating, closing, partial, …"""
    for key, payload in changes.items():
        if key.domain == "outbox" and payload is not None:
            event = msgspec.json.decode(payload)
            kind = str(event["kind"])
            if kind == "opened":
                return "activating" if event.get("activated") else "opening"
            return (
                "partial"
                if kind.startswith("partial")
                else {"closed": "closing", "scheduled": "scheduling"}.get(kind, kind)
            )
    domains = {key.domain for key in changes}
    if not domains.isdisjoint(("owner", "outage", "plan")):
        return "recovering"
    if domains == {"ledger"} or domains <= {"outbox", "ledger"}:
        return "delivering"
    if "order" in domains:
        return "ordering"
    return _OTHER


class Reporting(Around):
    """A backend that reports each commit before it is sent and after it was acknowledged."""

    def __init__(self, backend: Backend, reporter: Reporter, begun: Callable[[str], None] = lambda phase: None) -> None:
        super().__init__(backend)
        self.reporter = reporter
        self.begun = begun

    async def commit(
        self, scope: str, changes: Mapping[Key, bytes | None], expect: Mapping[Key, int], *, op: Op
    ) -> int:  # fmt: skip
        """Commit, and report before and after."""
        phase = phase_of(changes)
        self.reporter.tell(_Line("begin", phase=phase, scope=scope))
        self.begun(phase)
        number = await self.backend.commit(scope, changes, expect, op=op)
        rows = [(key, -1 if payload is None else crc32(payload)) for key, payload in changes.items()]
        self.reporter.tell(_Line("done", phase=phase, scope=scope, number=number, rows=rows))
        return number


class Witness:
    """Knows what was acknowledged, from the lines of all the processes that wrote to one file."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.acknowledged = 0
        self.repeated_events = 0
        self._at = 0
        self._heads: dict[str, int] = {}
        self._rows: dict[tuple[str, Key], tuple[int, int]] = {}
        self._events: set[str] = set()
        self._phases: dict[int, list[str]] = {}
        self.ready: set[int] = set()
        """Processes that finished their recovery."""

    def read(self) -> None:
        """Take in the lines written since the last call."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self._at)
            text = file.read()
        whole = text.rfind(b"\n") + 1
        self._at += whole
        for raw in text[:whole].splitlines():
            try:
                line = _DECODER.decode(raw)
            except msgspec.DecodeError:
                continue  # torn by a kill: its process had not gone on to act on it
            self._take(line)

    def _take(self, line: _Line) -> None:
        under_way = self._phases.setdefault(line.pid, [])
        match line.what:
            case "ready":
                self.ready.add(line.pid)
            case "begin":
                under_way.append(line.phase)
            case "told":
                self.repeated_events += sum(event in self._events for event in line.events)
                self._events.update(line.events)
            case "done":
                if line.phase in under_way:
                    under_way.remove(line.phase)
                self.acknowledged += 1
                self._heads[line.scope] = max(self._heads.get(line.scope, 0), line.number)
                for key, crc in line.rows:
                    if line.number >= self._rows.get((line.scope, key), (0, 0))[0]:
                        self._rows[line.scope, key] = (line.number, crc)

    def died_during(self, pid: int) -> str:
        """Name what a process that is gone was doing: by its last lines."""
        under_way = self._phases.get(pid) or []
        named = [phase for phase in under_way if phase != _OTHER]
        if pid not in self.ready:
            return "recovering"
        return named[-1] if named else "committing" if under_way else "idle"

    async def losses(self, backend: Backend) -> list[str]:
        """Look into an open backend; return one sentence for each acknowledged change that is not there."""
        lost = []
        for scope, number in self._heads.items():
            head = await backend.head(scope)
            if head.number < number:
                lost.append(f"{scope}: commit {number} was acknowledged, the scope stands at {head.number}")
        by_scope: dict[str, list[Key]] = {}
        for scope, key in self._rows:
            by_scope.setdefault(scope, []).append(key)
        for scope, keys in by_scope.items():
            found = await backend.read(scope, keys)
            for key in keys:
                number, crc = self._rows[scope, key]
                wrong = _difference(number, crc, found.get(key))
                if wrong:
                    lost.append(f"{scope}: {key} of commit {number}: {wrong}")
        return lost


def _difference(number: int, crc: int, record: Record | None) -> str:
    if record is None:
        return ""  # deleted by it or by a later commit: the scope's number, checked above, tells if it was lost
    if record.version < number:
        return f"is back at commit {record.version}"
    if record.version == number and crc32(record.payload) != crc:
        return "has other bytes" if crc != -1 else "was deleted, and is there"
    return ""
