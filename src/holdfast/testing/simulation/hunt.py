"""Many seeds, on several cores, resumable: a file of what was done, and the seeds that failed."""

from __future__ import annotations

import gc
import multiprocessing
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from ...errors import InvalidInputError
from .world import play

CHUNK = 200
"""How many seeds are played between two lines of the file."""
_FILE = "simulation.jsonl"


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
    gc.disable()  # a history makes cycles by the thousand, and is gone as a whole a moment later
    try:
        for seed in range(first, first + count):
            outcome = play(seed)
            commits, events = commits + outcome.commits, events + outcome.events
            if not outcome.ok:
                failed.append(seed)
            if seed % 20 == 0:
                gc.collect(1)
    finally:
        if was_enabled:
            gc.enable()
        gc.collect()
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
    """

    def __init__(
        self, first: int, count: int, *, jobs: int = 1, time_cap_seconds: float = 0.0, resume: Path | None = None
    ) -> None:
        if count < 1 or jobs < 1 or time_cap_seconds < 0 or first < 0:
            raise InvalidInputError(
                f"seeds {count}, jobs {jobs}, first {first}, time cap {time_cap_seconds:g}: "
                "use 1 or more seeds and jobs, 0 or more of the others"
            )
        self.first, self.count, self.jobs = first, count, jobs
        self._ends = time.monotonic() + time_cap_seconds if time_cap_seconds else float("inf")
        self._file = None if resume is None else resume / _FILE
        self.chunks: list[Chunk] = []
        if self._file is not None:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            if self._file.exists():
                lines = [line for line in self._file.read_bytes().split(b"\n")[:-1] if line]  # the last may be torn
                known = [msgspec.json.decode(line, type=Chunk) for line in lines]
                # What failed is played again: the code may have been mended since.
                inside = [one for one in known if first <= one.first and one.first + one.count <= first + count]
                self.chunks = list({one.first: one for one in inside if not one.failed}.values())

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
        """Play what was not played yet; stops after a chunk in which a seed failed.

        Crash: What was played and written stays; running again goes on.
        """
        todo = self._todo()
        if self.jobs == 1:
            for first, count in todo:
                if time.monotonic() >= self._ends:
                    return
                self._keep(play_chunk(first, count))
                if self.failed:
                    return
            return
        with multiprocessing.get_context("spawn").Pool(self.jobs) as pool:
            for chunk in pool.imap_unordered(_play, self._timed(todo)):
                if chunk is not None:
                    self._keep(chunk)
                if self.failed:
                    return  # the pool ends its processes

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

    def _timed(self, todo: Iterator[tuple[int, int]]) -> Iterator[tuple[int, int, float]]:
        left = self._ends - time.monotonic()
        for first, count in todo:
            yield first, count, time.time() + left

    def _keep(self, chunk: Chunk) -> None:
        self.chunks.append(chunk)
        if self._file is not None:
            with self._file.open("ab") as file:
                file.write(msgspec.json.encode(chunk) + b"\n")


def _play(job: tuple[int, int, float]) -> Chunk | None:
    first, count, ends = job
    return None if time.time() >= ends else play_chunk(first, count)
