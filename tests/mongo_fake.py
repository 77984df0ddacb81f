"""A small fake that speaks MongoDB's OP_MSG, for what cannot be had for real: sets of several members, secondaries,
servers without a journal, users without rights. It is no MongoDB; it answers as MongoDB's manual says that one does.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable
from typing import Any

import bson
from bson.codec_options import CodecOptions

Document = dict[str, Any]
_OPTIONS: CodecOptions[Document] = CodecOptions(document_class=dict)


class FakeMongo:
    """One server on loopback: ``async with FakeMongo(…) as fake: … fake.url …``. Attributes may be changed meanwhile.

    Args:
        members: The set's configuration; none: it stands alone. The first one is this server.
        copies: How many members confirm a write; by default all with data.
        journal: It takes ``j: true``.
        secondary: It is no primary.
        forbidden: Commands that the user may not use.
        persistent: Its storage engine keeps data on a disk.
        journal_default: ``writeConcernMajorityJournalDefault``.
        honest: It refuses write concerns that it cannot keep.
        router: It calls itself a mongos.
        careless: It does not look at the filter of an update, but for the id.
    """

    def __init__(
        self,
        *members: Document,
        journal: bool = True,
        secondary: bool = False,
        forbidden: tuple[str, ...] = (),
        persistent: bool = True,
        journal_default: bool = True,
        honest: bool = True,
        router: bool = False,
        careless: bool = False,
        parsed: Document | None = None,
        confirms: bool = True,
    ) -> None:
        self.members = list(members)
        self.journal = journal
        self.secondary = secondary
        self.forbidden = forbidden
        self.persistent = persistent
        self.journal_default = journal_default
        self.honest = honest
        self.router = router
        self.careless = careless
        self.parsed = parsed or {}
        self.confirms = confirms
        self.documents: dict[str, Document] = {}
        self.seen: list[Document] = []
        """Every command but those by which the driver looks around."""
        self.refuse: Callable[[Document], Document | None] = lambda command: None
        """May answer a command in place of the server."""
        self.port = 0
        self._server: asyncio.Server | None = None
        self._links: set[asyncio.StreamWriter] = set()

    @property
    def url(self) -> str:
        """Where it listens; the members that it names are not looked for."""
        return f"mongodb://127.0.0.1:{self.port}/bots?directConnection=true&deadline_seconds=3"

    async def __aenter__(self) -> FakeMongo:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for link in list(self._links):
            link.transport.abort()
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._links.add(writer)
        try:
            while True:
                size, request, _, kind = struct.unpack("<iiii", await reader.readexactly(16))
                body = await reader.readexactly(size - 16)
                if kind == 2004:  # the old question by which a driver introduces itself
                    end = body.index(b"\0", 4) + 9
                    raw = bson.encode(self._answer(bson.decode(body[end:], _OPTIONS)))
                    payload, kind = struct.pack("<iqii", 8, 0, 0, 1) + raw, 1
                else:
                    payload = struct.pack("<iB", 0, 0) + bson.encode(self._answer(_command(body)))
                writer.write(struct.pack("<iiii", 16 + len(payload), 0, request, kind) + payload)
                await writer.drain()
        except (asyncio.IncompleteReadError, OSError):
            pass  # the driver has gone
        finally:
            self._links.discard(writer)
            writer.transport.abort()

    def _answer(self, command: Document) -> Document:
        name = next(iter(command))
        if name.lower() in ("hello", "ismaster"):
            return self._hello()
        self.seen.append(command)
        if (told := self.refuse(command)) is not None:
            return told
        if name in self.forbidden:
            return {"ok": 0.0, "code": 13, "codeName": "Unauthorized", "errmsg": "not authorized"}
        answer: Callable[[Document], Document] | None = getattr(self, f"_{name}", None)
        if answer is None:
            return {"ok": 0.0, "code": 59, "codeName": "CommandNotFound", "errmsg": "no such command"}
        return answer(command)

    def _hello(self) -> Document:
        told: Document = {
            "ok": 1.0, "isWritablePrimary": not self.secondary, "maxWireVersion": 21, "minWireVersion": 0,
            "maxBsonObjectSize": 16777216, "maxMessageSizeBytes": 48000000, "maxWriteBatchSize": 100000,
        }  # fmt: skip
        if self.router:
            told["msg"] = "isdbgrid"
        if self.members:
            told |= {"setName": "rs", "setVersion": 1, "secondary": self.secondary, "me": self.members[0]["host"]}
            told["hosts"] = [member["host"] for member in self.members if not member.get("arbiterOnly")]
            told["arbiters"] = [member["host"] for member in self.members if member.get("arbiterOnly")]
        return told

    def _serverStatus(self, command: Document) -> Document:
        return {"ok": 1.0, "storageEngine": {"name": "fake", "persistent": self.persistent}}

    def _getCmdLineOpts(self, command: Document) -> Document:
        return {"ok": 1.0, "argv": ["mongod"], "parsed": self.parsed}

    def _replSetGetConfig(self, command: Document) -> Document:
        return {
            "ok": 1.0,
            "config": {"writeConcernMajorityJournalDefault": self.journal_default, "members": self.members},
        }

    def _concern(self, command: Document) -> tuple[Document | None, Document]:
        """Return a refusal of the command, and what is added to its answer."""
        concern = command.get("writeConcern", {})
        holding = sum(not member.get("arbiterOnly") for member in self.members) or 1
        if concern.get("j") and not self.journal:
            told = "cannot use 'j' option when a host does not have journaling enabled"
            return {"ok": 0.0, "code": 2, "codeName": "BadValue", "errmsg": told}, {}
        if not self.honest:
            return None, {}
        if isinstance(concern.get("w"), int) and concern["w"] > holding:
            if not self.members:
                return {"ok": 0.0, "code": 2, "codeName": "BadValue", "errmsg": "a host is not replicated"}, {}
            return None, {"writeConcernError": {"code": 100, "codeName": "UnsatisfiableWriteConcern", "errmsg": "no"}}
        if concern.get("w") == "majority" and not self.confirms:
            return None, {"writeConcernError": {"code": 64, "codeName": "WriteConcernFailed", "errmsg": "timed out"}}
        return None, {}

    def _insert(self, command: Document) -> Document:
        refused, more = self._concern(command)
        if refused:
            return refused
        (document,) = command["documents"]
        if document["_id"] in self.documents:
            return {"ok": 1.0, "n": 0, "writeErrors": [{"index": 0, "code": 11000, "errmsg": "duplicate key"}]}
        self.documents[document["_id"]] = document
        return {"ok": 1.0, "n": 1, **more}

    def _update(self, command: Document) -> Document:
        refused, more = self._concern(command)
        if refused:
            return refused
        (update,) = command["updates"]
        asked, change = update["q"], update["u"]
        found = self.documents.get(asked["_id"])
        if found is None and update.get("upsert"):
            found = self.documents[asked["_id"]] = {"_id": asked["_id"]}
        if found is None or (not self.careless and any(found.get(name) != asked[name] for name in asked)):
            return {"ok": 1.0, "n": 0, "nModified": 0, **more}
        for path, value in change.get("$set", {}).items():
            _put(found, path, value)
        for path in change.get("$unset", {}):
            _put(found, path, None)
        for path, value in change.get("$inc", {}).items():
            found[path] = found.get(path, 0) + value
        return {"ok": 1.0, "n": 1, "nModified": 1, **more}

    def _delete(self, command: Document) -> Document:
        refused, more = self._concern(command)
        if refused:
            return refused
        (one,) = command["deletes"]
        return {"ok": 1.0, "n": int(self.documents.pop(one["q"]["_id"], None) is not None), **more}

    def _aggregate(self, command: Document) -> Document:
        """The one pipeline that commits use: a document with the versions of its rows."""
        found = self.documents.get(command["pipeline"][0]["$match"]["_id"])
        if found is not None:
            rows = [{"k": name, "v": row["version"], "b": row["bytes"]} for name, row in found["rows"].items()]
            found = {**found, "rows": rows}
        return {"ok": 1.0, "cursor": {"id": 0, "ns": "bots.x", "firstBatch": [found] if found else []}}

    def _find(self, command: Document) -> Document:
        found = self.documents.get(command["filter"]["_id"])
        return {"ok": 1.0, "cursor": {"id": 0, "ns": "bots.x", "firstBatch": [found] if found else []}}


def _command(body: bytes) -> Document:
    """Return the command of an OP_MSG, with the documents that came in sections of their own."""
    command: Document = {}
    at = 4
    while at < len(body):
        kind, size = struct.unpack_from("<Bi", body, at)
        section, at = body[at + 1 : at + 1 + size], at + 1 + size
        if kind == 0:
            command = bson.decode(section, _OPTIONS) | command
        else:
            name, _, documents = section[4:].partition(b"\0")
            command[name.decode()] = bson.decode_all(documents, _OPTIONS)
    first = next(name for name in command if name not in ("documents", "updates", "deletes"))
    return {first: command.pop(first), **command}


def _put(document: Document, path: str, value: object) -> None:
    *parents, name = path.split(".")
    for parent in parents:
        document = document.setdefault(parent, {})
    if value is None:
        document.pop(name, None)
    else:
        document[name] = value
