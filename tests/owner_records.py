"""What processes that shared a store did, from their records (:mod:`fleet_bot`), and the rules that it must keep."""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import fleet_bot


class Commit(NamedTuple):
    """An acknowledged commit of a context."""

    number: int
    pid: int
    epoch: int
    """Under which it was sent."""
    taking: bool
    """It took the context over."""
    releasing: bool
    at: float
    events: tuple[int, ...]


class Told(NamedTuple):
    """An event that a process told its listeners."""

    number: int
    pid: int
    epoch: int
    """Under which the process owned the context then."""
    at: float


class Sending(NamedTuple):
    """An order that a process was about to send."""

    at: float
    pid: int
    epoch: int
    """Under which the process owned the context then."""
    order: str
    held_at: float
    """When it saw last, before that, that its lease was held; a process may be stopped, or wait, in between."""
    after_refusal: bool
    """It had been told before that it no longer owns the context."""


class Records:
    """The records of a directory, merged.

    Args:
        directory: Holds a file for each process that ran.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.commits: defaultdict[str, list[Commit]] = defaultdict(list)
        """Of each context, by its entity name, in the order of their numbers."""
        self.told: defaultdict[str, list[Told]] = defaultdict(list)
        self.sendings: defaultdict[str, list[Sending]] = defaultdict(list)
        """Of each context; those of one process in the order in which it sent them."""
        self.refusals: defaultdict[str, list[tuple[float, int]]] = defaultdict(list)
        """Of each context: when a commit under its owner row was refused, and whose."""
        self.homes: dict[int, dict[str, Any]] = {}
        """Where each process believed to live, and what its clocks showed there."""
        self.slow: list[tuple[float, float, int]] = []
        """Commits that took long, or were given up: from when to when, and whose."""
        self.fenced: list[dict[str, Any]] = []
        self.failed: list[dict[str, Any]] = []
        self.slots: list[tuple[int, str, bool]] = []
        """(commit number, slot, taken or given back) of every risk profile, in the order of the numbers."""
        self._read_to: dict[Path, int] = {}
        self._epochs: defaultdict[int, dict[str, int]] = defaultdict(dict)
        self._refused: defaultdict[int, set[str]] = defaultdict(set)
        self.refresh()

    def refresh(self) -> Records:
        """Read what was written since the last time."""
        for path in sorted(self.directory.glob("*.jsonl")):
            with path.open("rb") as file:
                file.seek(self._read_to.get(path, 0))
                whole, newline, _ = file.read().rpartition(b"\n")  # a process that was killed may have left half a line
            self._read_to[path] = self._read_to.get(path, 0) + len(whole) + len(newline)
            self._read(int(path.stem), [json.loads(line) for line in whole.splitlines()])
        for commits in self.commits.values():
            commits.sort()
        self.slots.sort()
        return self

    def _read(self, pid: int, lines: Iterable[dict[str, Any]]) -> None:
        epochs, refused = self._epochs[pid], self._refused[pid]
        for line in lines:
            match line["kind"]:
                case "commit" if line["context"]:
                    name, owner = line["context"], line["owner"]
                    releasing = bool(owner and owner["released"])
                    # Its own row, written anew after a lapse of the lease, is no takeover.
                    taking = bool(owner) and not releasing and owner["epoch"] != epochs.get(name)
                    if taking:
                        refused.discard(name)
                        epochs[name] = owner["epoch"]
                    self.commits[name].append(
                        Commit(line["n"], pid, epochs.get(name, 0), taking, releasing,
                               line["t"], tuple(line["events"]))
                    )  # fmt: skip
                case "told":
                    name = entity_of(line["event"].rpartition("#")[0])
                    self.told[name].append(Told(line["number"], pid, epochs.get(name, 0), line["t"]))
                case "sending":
                    name = entity_of(f"{fleet_bot.EXCHANGE}/{line['symbol']}/{fleet_bot.STRATEGY}")
                    self.sendings[name].append(
                        Sending(
                            line["t"],
                            pid,
                            epochs.get(name, 0),
                            line["order"],
                            line["held_at"] or line["t"],
                            name in refused,
                        )
                    )
                case "refused":
                    name = entity_of(line["context"])
                    refused.add(name)
                    self.refusals[name].append((line["t"], pid))
                case "slow":
                    self.slow.append((line["t"] - line["seconds"], line["t"], pid))
                case "home":
                    self.homes[pid] = line
                case "fenced":
                    refused.add(entity_of(line["context"]))
                    self.fenced.append({**line, "pid": pid})
                case "failed":
                    self.failed.append({**line, "pid": pid})
            if line["kind"] == "commit":
                self.slots += [(line["n"], slot, taken) for slot, taken in line["slots"].items()]

    def owner(self, name: str) -> Commit | None:
        """Return the newest takeover of a context."""
        return next((one for one in reversed(self.commits[name]) if one.taking), None)

    def has_decided(self, name: str, epoch: int) -> bool:
        """Whether the newest owner of a context, under this epoch, has committed an event."""
        newest = itertools.takewhile(lambda one: one.epoch >= epoch, reversed(self.commits[name]))
        return any(one.events for one in newest)

    def wrong(self) -> list[str]:
        """Return how the records contradict that a context has one owner at a time; empty if they do not."""
        return [
            text
            for name in self.commits
            for text in (*self._late_writes(name), *self._events_of_others(name))
        ]  # fmt: skip

    def _late_writes(self, name: str) -> Iterable[str]:
        """An epoch's commits come after those of every lower one, are one process's, and lie between its takeover and
        the commit that lets go of the context."""
        epoch, pid, let_go = 0, 0, 0
        for one in self.commits[name]:
            if one.epoch == let_go:
                yield f"{name}: commit {one.number} of epoch {one.epoch} (process {one.pid}) after it was let go of"
            let_go = one.epoch if one.releasing else let_go
            if one.epoch < epoch:
                yield f"{name}: commit {one.number} of epoch {one.epoch} (process {one.pid}) was accepted in {epoch}"
            elif one.epoch > epoch and not one.taking:
                yield f"{name}: commit {one.number} of epoch {one.epoch} (process {one.pid}) before its takeover"
            elif one.epoch == epoch and (one.pid != pid or one.taking):
                yield f"{name}: epoch {epoch} belongs to the processes {pid} and {one.pid} (commit {one.number})"
            epoch, pid = max(epoch, one.epoch), one.pid if one.epoch >= epoch else pid

    def _events_of_others(self, name: str) -> Iterable[str]:
        """Nobody tells an event that a later owner wrote; each number is written once."""
        written: dict[int, Commit] = {}
        for one in self.commits[name]:
            for number in one.events:
                if number in written:
                    yield f"{name}: event {number} was written by the commits {written[number].number} and {one.number}"
                written[number] = one
        for told in self.told[name]:
            by = written.get(told.number)
            if by is None:
                continue  # committed, and killed before it could say so
            if by.epoch > told.epoch:
                yield f"{name}: process {told.pid} (epoch {told.epoch}) told event {told.number} of epoch {by.epoch}"

    def most_open(self) -> int:
        """Return how many slots were taken at once, over all commits."""
        taken: set[str] = set()
        most = 0
        for _, slot, begins in self.slots:
            (taken.add if begins else taken.discard)(slot)
            most = max(most, len(taken))
        return most


def entity_of(context: str) -> str:
    """Return a context's entity name from ``exchange/symbol/strategy``; the tests' names need no quoting."""
    exchange, symbol, strategy = context.split("/")
    return f"{symbol}_{strategy}_{exchange}"
