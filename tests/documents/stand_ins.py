"""In-memory stand-ins for the servers that the documents' examples talk to. They keep nothing and check nothing."""

from __future__ import annotations

import fnmatch
from typing import Any


class Redis:
    """``set get exists delete keys`` of a Redis client, with text values only, as on the wire."""

    def __init__(self, db: int = 0) -> None:
        self.db = db
        self.values: dict[str, str] = {}
        self.connections = 0

    async def connect(self) -> None:
        self.connections += 1

    async def set(self, key: str, value: str) -> None:
        assert isinstance(value, str)
        self.values[key] = value

    async def get(self, key: str) -> str | None:
        return self.values.get(key)

    async def exists(self, key: str) -> int:
        return int(key in self.values)

    async def delete(self, *keys: str) -> int:
        return sum(self.values.pop(key, None) is not None for key in keys)

    async def keys(self, pattern: str) -> list[str]:
        return [key for key in self.values if fnmatch.fnmatchcase(key, pattern)]


class Collection:
    """What the documents' Mongo example asks of a collection."""

    def __init__(self) -> None:
        self.documents: dict[str | int, dict[str, Any]] = {}

    async def create_index(self, field: str, *, unique: bool) -> None:
        assert field == "entityId" and unique

    async def find_one(self, query: dict[str, Any]) -> dict[str, Any] | None:
        return self.documents.get(query["entityId"])

    async def count_documents(self, query: dict[str, Any]) -> int:
        return int(query["entityId"] in self.documents)

    async def update_one(self, query: dict[str, Any], update: dict[str, Any], *, upsert: bool) -> None:
        assert upsert
        self.documents.setdefault(query["entityId"], {}).update(update["$set"])

    async def delete_one(self, query: dict[str, Any]) -> int:
        return int(self.documents.pop(query["entityId"], None) is not None)

    async def delete_many(self) -> None:
        self.documents.clear()

    async def find_sorted(self) -> list[dict[str, Any]]:
        return [self.documents[entity_id] for entity_id in sorted(self.documents, key=str)]
