"""Many seeds, on several cores, resumable: a file of what was done, and the seeds that failed."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple, cast

import msgspec

from ...errors import InvalidInputError
from .world import play

CHUNK = 50
"""How many seeds are played between two lines of the file."""
_FILE = "simulation.jsonl"
_COLLECTED = 10
"""How many histories are played between two collections of what they left."""
_MOST_DEATHS = 5
"""How often a worker may end, all of them together, before the hunt takes it for more than bad luck."""


class Chunk(msgspec.Struct, frozen=True, kw_only=True):
    """What some seeds in a row came to."""

    first: int
    count: int
    commits: int
    events: int
    failed: tuple[int, ...] = ()
    seconds: float = 0.0
    """Of one core."""


def play_chunk(first: int, count: int) -> Chunk:
    """Play ``count`` seeds from ``first`` on."""
    began, commits, events, failed = time.process_time(), 0, 0, []
    was_enabled = gc.isenabled()
    gc.freeze()  # what is there already has nothing to do with what a history leaves behind
    gc.disable()  # a history makes cycles by the thousand, and is gone as a whole a moment later
    try:
        for seed in range(first, first + count):
            outcome = play(seed, told=False)
            commits, events = commits + outcome.commits, events + outcome.events
            if not outcome.ok:
                failed.append(seed)
            if seed % _COLLECTED == 0:
                gc.collect()
    finally:
        gc.collect()
        gc.unfreeze()
        if was_enabled:
            gc.enable()
    return Chunk(
        first=first, count=count, commits=commits, events=events, failed=tuple(failed),
        seconds=time.process_time() - began,
    )  # fmt: skip


class Hunt:
    """Plays seeds until all are done, one fails, or the time is up.

    Args:
        first: The first seed.
        count: How many.
        jobs: On how many processes at once.
        time_cap_seconds: Begin nothing after so long; 0: no cap.
        resume: Keep results in this directory, and go on where an earlier hunt stopped.
        stops: At the first chunk in which a seed failed; else all are played, and all that failed are known.
    """

    def __init__(
        self, first: int, count: int, *, jobs: int = 1, time_cap_seconds: float = 0.0, resume: Path | None = None,
        stops: bool = True,
    ) -> None:  # fmt: skip
        if count < 1 or jobs < 1 or time_cap_seconds < 0 or first < 0:
            raise InvalidInputError(
                f"seeds {count}, jobs {jobs}, first {first}, time cap {time_cap_seconds:g}: "
                "use 1 or more seeds and jobs, 0 or more of the others"
            )
        self.first, self.count, self.jobs, self._stops = first, count, jobs, stops
        self._ends = time.monotonic() + time_cap_seconds if time_cap_seconds else float("inf")
        self._file = None if resume is None else resume / _FILE
        self.chunks: list[Chunk] = []
        if self._file is not None:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            self.chunks = _known(self._file, first, count)

    @property
    def failed(self) -> list[int]:
        """The seeds whose history violated something, ascending."""
        return sorted(seed for chunk in self.chunks for seed in chunk.failed)

    @property
    def done(self) -> int:
        """How many seeds were played."""
        return sum(chunk.count for chunk in self.chunks)

    @property
    def per_second(self) -> float:
        """How many histories one core plays in a second."""
        seconds = sum(chunk.seconds for chunk in self.chunks)
        return self.done / seconds if seconds else 0.0

    def run(self) -> None:
        """Play what was not played yet; by default it stops after a chunk in which a seed failed.

        Crash: What was played and written stays; running again goes on.
        """
        todo = self._todo()
        if self.jobs == 1:
            for first, count in todo:
                if time.monotonic() >= self._ends:
                    return
                self._keep(play_chunk(first, count))
                if self._stops and self.failed:
                    return
            return
        with _Workers(self.jobs) as workers:
            for chunk in workers.play(todo, self._ends):
                self._keep(chunk)
                if self._stops and self.failed:
                    return

    def _todo(self) -> Iterator[tuple[int, int]]:
        played = {chunk.first: chunk.count for chunk in self.chunks}
        at = self.first
        while at < self.first + self.count:
            count = played.get(at)
            if count is None:
                following = min((one for one in played if one > at), default=self.first + self.count)
                count = min(CHUNK, following - at)
                yield at, count
            at += count

    def _keep(self, chunk: Chunk) -> None:
        self.chunks.append(chunk)
        if self._file is not None:
            with self._file.open("ab") as file:
                file.write(msgspec.json.encode(chunk) + b"\n")


def _known(file: Path, first: int, count: int) -> list[Chunk]:
    """Return what an earlier hunt has written, each seed once; a line that was cut short is taken out of the file."""
    if not file.exists():
        return []
    text = file.read_bytes()
    whole = text.rfind(b"\n") + 1
    if whole < len(text):
        os.truncate(file, whole)  # else the next line would be written behind it
    known = [msgspec.json.decode(line, type=Chunk) for line in text[:whole].splitlines()]
    kept: list[Chunk] = []
    at = first
    for one in sorted(known, key=lambda chunk: (chunk.first, chunk.count)):
        # What failed is played again: the code may have been mended since.
        if not one.failed and one.first >= at and one.first + one.count <= first + count:
            kept.append(one)
            at = one.first + one.count
    return kept


class _Worker(NamedTuple):
    process: BaseProcess
    line: Connection
    job: tuple[int, int]


class _Workers:
    """Processes that play chunks. One that dies is replaced, and its chunk given to another; they end with this one."""

    def __init__(self, jobs: int) -> None:
        self._jobs = jobs
        self._context = multiprocessing.get_context("spawn")
        self._busy: dict[Connection, _Worker] = {}
        self._deaths = 0

    def __enter__(self) -> _Workers:
        return self

    def __exit__(self, *why: object) -> None:
        for worker in self._busy.values():
            worker.process.kill()
            worker.process.join()
            worker.line.close()

    def play(self, todo: Iterator[tuple[int, int]], ends: float) -> Iterator[Chunk]:
        """Play all that is to do, unless the time ends before; yields each chunk as soon as it was played.

        Raises:
            OSError: Workers keep dying.
        """
        for _ in range(self._jobs):
            self._start(next(todo, None))
        while self._busy:
            for line in cast("list[Connection]", wait(list(self._busy))):
                worker = self._busy[line]
                try:
                    chunk = line.recv()
                except (EOFError, OSError):
                    self._replace(worker)
                    continue
                job = None if time.monotonic() >= ends else next(todo, None)
                self._go_on(worker, job)
                yield chunk

    def _start(self, job: tuple[int, int] | None) -> None:
        if job is None:
            return
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(theirs,), daemon=True)
        process.start()
        theirs.close()  # so that its end is seen here
        self._busy[ours] = _Worker(process, ours, job)
        with contextlib.suppress(OSError):
            ours.send(job)

    def _go_on(self, worker: _Worker, job: tuple[int, int] | None) -> None:
        del self._busy[worker.line]
        if job is None:
            worker.line.close()  # which ends it
            worker.process.join()
            return
        self._busy[worker.line] = worker._replace(job=job)
        with contextlib.suppress(OSError):  # it died meanwhile, which the next look at the line shows
            worker.line.send(job)

    def _replace(self, worker: _Worker) -> None:
        del self._busy[worker.line]
        worker.line.close()
        worker.process.join()
        self._deaths += 1
        if self._deaths > _MOST_DEATHS:
            raise OSError(f"{self._deaths} workers ended, the last with {worker.process.exitcode}: is there memory?")
        self._start(worker.job)


def _serve(line: Connection) -> None:
    """Play what the line asks for, until it ends, or whoever holds its other end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a keyboard's goes to all; the hunt ends its workers
    with contextlib.suppress(EOFError, OSError):
        while True:
            line.send(play_chunk(*line.recv()))
