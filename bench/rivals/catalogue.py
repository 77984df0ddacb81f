"""Which sides take part, and under which interpreter each runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal, NamedTuple

ROOT = Path(__file__).resolve().parent.parent.parent
BUILD = ROOT / "build" / "rivals"
Server = Literal["", "redis", "postgres"]


class Entry(NamedTuple):
    """One side."""

    label: str
    runtime: Literal["ours", "python", "node"]
    module: str
    side: str
    server: Server = ""
    url: str = ""
    """For a server ``{server}`` is its URL; ``{phase}`` and ``{place}`` keep the phases' data apart."""
    kind: Literal["bare", "rival", "reference", "holdfast"] = "rival"

    def argv(self, place: Path, phase: str, row_file: Path, servers: dict[str, str]) -> list[str]:
        """Return the command of its process."""
        if self.runtime == "node":
            return ["node", str(BUILD / "node" / "worker.mjs"), self.side, str(place), str(row_file)]
        python = sys.executable if self.runtime == "ours" else str(BUILD / "venv" / "bin" / "python")
        url = self.url.format(server=servers.get(self.server, ""), phase=phase, place=place)
        return [python, "-m", "bench.rivals.worker", f"bench.rivals.{self.module}", self.side, str(place),
                str(row_file), url]  # fmt: skip


ENTRIES = (
    Entry("append + fdatasync, one log", "ours", "floors", "Append", kind="bare"),
    Entry("sqlite3, WAL + FULL", "ours", "floors", "Sqlite", kind="bare"),
    Entry("redis-py SET", "ours", "floors", "RedisPy", "redis", "{server}/0", kind="bare"),
    Entry("psycopg 3 upsert", "ours", "floors", "Psycopg", "postgres", "{server}", kind="bare"),
    Entry("npm write-file-atomic", "node", "", "writeFileAtomic"),
    Entry("npm backtest-kit: PersistBase", "node", "", "persistBase", kind="reference"),
    Entry("npm backtest-kit: signal adapter", "node", "", "persistSignal", kind="reference"),
    Entry("diskcache", "python", "libraries", "DiskCache"),
    Entry("sqlitedict (autocommit)", "python", "libraries", "SqliteDict"),
    Entry("SQLAlchemy ORM + SQLite", "python", "libraries", "SqlAlchemy"),
    Entry("py-key-value, file tree", "python", "libraries", "KeyValueFiles"),
    Entry("py-key-value, Redis", "python", "libraries", "KeyValueRedis", "redis", "{server}"),
    Entry("Holdfast, file", "ours", "ours", "Ours", "", "file:{place}", kind="holdfast"),
    Entry("Holdfast, SQLite", "ours", "ours", "Ours", "", "sqlite:{place}.db", kind="holdfast"),
    Entry("Holdfast, Redis", "ours", "ours", "Ours", "redis", "{server}/2?prefix={phase}", kind="holdfast"),
    Entry("Holdfast, PostgreSQL", "ours", "ours", "Ours", "postgres", "{server}?schema={phase}", kind="holdfast"),
)
