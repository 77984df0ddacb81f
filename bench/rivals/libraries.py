"""Libraries from PyPI that keep rows, each used as its own documentation shows, with its defaults."""

from __future__ import annotations

import importlib
import json
from typing import Any

from .floors import LANES, _Blocking, _Plain

# By name: their packages lie in an environment of their own, which ruff and mypy do not look into.
_module = importlib.import_module


class DiskCache(_Blocking):
    """diskcache.Cache."""

    async def open(self) -> None:
        """Open the directory."""
        self._cache = _module("diskcache").Cache(str(self.place), timeout=60)

    def put(self, number: int, turn: int) -> None:
        """Set a key to JSON text."""
        self._cache.set(number, self.text(turn))

    async def read_all(self, count: int) -> int:
        """Get every key, parsed."""
        return len({key: json.loads(self._cache[key]) for key in self._cache})

    async def close(self) -> None:
        """Close it."""
        self._cache.close()


class SqliteDict(_Blocking):
    """sqlitedict with autocommit, JSON as its coding."""

    async def open(self) -> None:
        """Open the file."""
        self.place.mkdir(parents=True, exist_ok=True)
        self._rows = _module("sqlitedict").SqliteDict(
            str(self.place / "rows.db"), autocommit=True, encode=json.dumps, decode=json.loads
        )

    def put(self, number: int, turn: int) -> None:
        """Set a key."""
        self._rows[str(number)] = self.row(turn)

    async def read_all(self, count: int) -> int:
        """Get every item."""
        return len(dict(self._rows.items()))

    async def close(self) -> None:
        """Close it."""
        self._rows.close()


class SqlAlchemy(_Blocking):
    """SQLAlchemy's ORM over SQLite, a session and a commit each."""

    async def open(self) -> None:
        """Make the engine and the table."""
        self.place.mkdir(parents=True, exist_ok=True)
        sa, orm = _module("sqlalchemy"), _module("sqlalchemy.orm")

        class Base(orm.DeclarativeBase):  # type: ignore[misc]
            pass

        class Row(Base):
            __tablename__ = "rows"
            key = orm.mapped_column(sa.Integer, primary_key=True)
            row = orm.mapped_column(sa.JSON)

        self._row_type, self._sa = Row, sa
        # As many connections as writers, and a minute for the lock: its default, five seconds, gives up under 64.
        url, wait = f"sqlite:///{self.place / 'rows.db'}", {"timeout": 60}
        self._engine = sa.create_engine(url, pool_size=LANES, connect_args=wait)
        Base.metadata.create_all(self._engine)
        self._session = orm.sessionmaker(self._engine)

    def put(self, number: int, turn: int) -> None:
        """Merge a row and commit."""
        with self._session.begin() as session:
            session.merge(self._row_type(key=number, row=self.row(turn)))

    async def read_all(self, count: int) -> int:
        """Select all."""
        with self._session() as session:
            return len({row.key: row.row for row in session.scalars(self._sa.select(self._row_type))})

    async def close(self) -> None:
        """Close its connections."""
        self._engine.dispose()


class _KeyValue(_Plain):
    store: Any

    async def write(self, number: int, turn: int) -> None:
        """Put a key."""
        await self.store.put(f"row{number}", self.row(turn), collection="signal")

    async def read_all(self, count: int) -> int:
        """Get the keys, whose names the caller must know."""
        names = [f"row{number}" for number in range(count)]
        return sum(found is not None for found in await self.store.get_many(names, collection="signal"))


class KeyValueFiles(_KeyValue):
    """py-key-value's file tree."""

    async def open(self) -> None:
        """Open the directory."""
        self.place.mkdir(parents=True, exist_ok=True)
        self.store = _module("key_value.aio.stores.filetree").FileTreeStore(data_directory=self.place)
        await self.store.setup()


class KeyValueRedis(_KeyValue):
    """py-key-value's Redis store."""

    async def open(self) -> None:
        """Connect."""
        self.store = _module("key_value.aio.stores.redis").RedisStore(url=f"{self.url}/1")
        await self.store.setup()

    async def close(self) -> None:
        """Disconnect."""
        await self.store.close()
