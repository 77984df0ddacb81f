"""A scope that does everything right, one call after another at chosen moments; and, if asked, one thing wrong."""

from __future__ import annotations

import enum
import heapq
import random

from holdfast.testing.histories.lines import KEYS, Answered, Line, Looked, Read, Seen, Sent

SCOPE = "s"


class Fault(enum.Enum):
    """What goes wrong once, half-way."""

    DROPPED = "a commit is acknowledged and not applied"
    STALE = "a read gives a row that was overwritten before it began"
    TWICE = "a commit that is sent again is applied again"
    TORN = "a read sees one row of a commit and not the other"
    UNGUARDED = "expect is not looked at"
    BACK = "what was acknowledged is taken back"
    LATE = "a refused commit is applied afterwards"


class _Client:
    def __init__(self, name: str) -> None:
        self.name = name
        self.n = 0
        self.free_at = 0
        self.known: dict[int, int] = {}


def ideal_history(
    chance: random.Random, *, operations: int, clients: int, unknowns: int = 12, fault: Fault | None = None
) -> list[Line]:
    """Return the lines that clients of an ideal scope would have written.

    Args:
        chance: Of everything.
        operations: How many, besides the first and the last look.
        clients: How many operations are in flight at once, at most.
        unknowns: How many commits get no answer; half of them are applied.
        fault: Happens once, as soon after the middle as it can.
    """
    return _Ideal(chance, unknowns, fault).run(operations, clients)


class _Ideal:
    def __init__(self, chance: random.Random, unknowns: int, fault: Fault | None) -> None:
        self.chance = chance
        self.number = 0
        self.rows: dict[int, Seen] = {}
        self.lasts: dict[str, tuple[int, int]] = {}
        self.lines: list[Line] = []
        self.before: list[dict[int, Seen]] = []
        """The rows before each commit."""
        self.unknowns = unknowns
        self.fault = fault
        self.due = False

    def run(self, operations: int, clients: int) -> list[Line]:
        self.look(0)
        waiting = []
        for at in range(clients):
            client = _Client(f"w{at}")
            waiting.append((self.chance.randrange(1, 100), at, client))
        heapq.heapify(waiting)
        moment = 0
        for turn in range(operations):
            self.due = self.fault is not None and turn > operations // 2
            moment, at, client = heapq.heappop(waiting)
            begun = self.chance.randint(client.free_at + 1, moment)
            ended = moment + self.chance.randrange(1, 200)
            self.one(client, begun, ended)
            client.free_at = ended
            heapq.heappush(waiting, (ended + self.chance.randrange(2, 200), at, client))
        assert not self.due or self.fault is None, "the fault never found its moment"
        self.look(moment + 1000)
        return self.lines

    def look(self, moment: int) -> None:
        """Note everything, as a client does that is alone."""
        self.lines.append(Looked(moment, moment + 1, "look", SCOPE, self.number, dict(self.lasts)))
        found = [self.rows[key] for key in sorted(self.rows)]
        self.lines.append(Read(moment + 2, moment + 3, "look", SCOPE, list(range(KEYS)), found))

    def one(self, client: _Client, begun: int, ended: int) -> None:
        roll = self.chance.random()
        if roll < 0.4:
            self.read(client, begun, ended)
        elif roll < 0.45:
            self.lines.append(Looked(begun, ended, client.name, SCOPE, self.number, dict(self.lasts)))
        else:
            self.commit(client, begun, ended)

    def some(self, most: int) -> list[int]:
        return sorted(self.chance.sample(range(KEYS), self.chance.randint(1, most)))

    def read(self, client: _Client, begun: int, ended: int) -> None:
        asked, rows = self.some(KEYS), dict(self.rows)
        if self.due and self.fault in (Fault.STALE, Fault.TORN):
            older = self.before[-30 if self.fault is Fault.STALE else -1]
            changed = [key for key in range(KEYS) if older.get(key) != rows.get(key)]
            if len(changed) > (self.fault is Fault.TORN):
                asked = list(range(KEYS))
                if self.fault is Fault.STALE:
                    rows = older
                else:
                    rows.pop(changed[0], None)
                    rows |= {key: older[key] for key in changed[:1] if key in older}
                self.happened()
        self.lines.append(Read(begun, ended, client.name, SCOPE, asked, [rows[key] for key in asked if key in rows]))
        client.known |= {key: rows[key].version if key in rows else 0 for key in asked}

    def happened(self) -> None:
        self.fault, self.due = None, False

    def commit(self, client: _Client, begun: int, ended: int) -> None:
        client.n += 1
        expect = {key: client.known[key] for key in self.some(2) if key in client.known}
        if self.chance.random() < 0.6:
            expect = {key: self.rows[key].version if key in self.rows else 0 for key in self.some(2)}
        changes = {
            key: None if self.chance.random() < 0.2 else f"{client.name}.{client.n}.{key}" for key in self.some(3)
        }
        sent = Sent(begun, SCOPE, client.name, client.n, changes, expect)
        self.lines.append(sent)
        clashes = self.clashes(expect)
        if self.due and self.fault is Fault.UNGUARDED and clashes:
            clashes = []
            self.happened()
        if clashes:
            self.lines.append(Answered(ended, client.name, client.n, clashes=clashes))
            if self.due and self.fault is Fault.LATE:
                self.apply(sent)
                self.happened()
            return
        if self.unknowns > 0 and self.chance.random() < 0.05:
            self.unknowns -= 1
            if self.unknowns % 2:
                self.apply(sent)
            return
        if self.due and self.fault is Fault.DROPPED:
            self.lines.append(Answered(ended, client.name, client.n, self.number + 1))
            self.happened()
            return
        number = self.apply(sent)
        if self.chance.random() < 0.1:
            again = Sent((begun + ended) // 2, SCOPE, client.name, client.n, changes, expect, again=True)
            self.lines.append(again)
            if self.due and self.fault is Fault.TWICE:
                number = self.apply(sent)
                self.happened()
        self.lines.append(Answered(ended, client.name, client.n, number))
        if self.due and self.fault is Fault.BACK:
            self.rows = self.before.pop()
            self.number -= 1
            self.happened()

    def clashes(self, expect: dict[int, int]) -> list[int]:
        held = {key: self.rows[key].version if key in self.rows else 0 for key in expect}
        return [key for key, version in expect.items() if held[key] != version]

    def apply(self, sent: Sent) -> int:
        self.before.append(dict(self.rows))
        self.number += 1
        for key, payload in sent.changes.items():
            if payload is None:
                self.rows.pop(key, None)
            else:
                self.rows[key] = Seen(key, self.number, sent.writer, sent.n, payload)
        self.lasts[sent.writer] = (sent.n, self.number)
        return self.number
