"""PostgreSQL: a schema of a database, which several processes may share; see ``docs/backends/postgres.md``."""

from __future__ import annotations

from ...errors import InvalidInputError

try:
    import psycopg as _driver
except ImportError as _error:
    raise InvalidInputError("a postgresql: store needs psycopg: pip install 'holdfast[postgres]'") from _error

from .backend import PostgresBackend

del _driver

__all__ = ["PostgresBackend"]
