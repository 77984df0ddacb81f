"""SQLite: a file that the processes of one host may share."""

from __future__ import annotations

from .backend import SqliteBackend

__all__ = ["SqliteBackend"]
