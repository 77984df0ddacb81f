"""The contract over MongoDB: commits go through a lane for each scope, reads beside it.

Invariants:

* A scope's number, as acknowledged to this process, is never followed by a lower one: a server that lost commits (a
  failover without a majority, a restore) is found out by every read and commit, and refused.
* What a read returns is as durable as a commit: on a set of several members by the read concern "linearizable";
  elsewhere by a write that is waited for, whenever something is ahead of what this process knows to be durable.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import msgspec

from ...bulk import without_collections
from ...contract import Guarantees, Head, How, Key, KeyPrefix, Op, Record
from ...errors import FailedError, UnavailableError, UnknownOutcomeError, UnsafeSettingError
from ..sql import Doorman
from ..state import require_scope
from .address import Address, parse
from .attest import Attestation, facts, judge
from .document import Asked, field_of, key_of, rows_asked
from .lane import Lane, barrier, foreign, known_of, require_format, taken_back
from .link import Link

_ROOM_BYTES = 64 * 1024
"""What is left free of the largest document, for the command around it."""
_RIVALS = 4
"""How many updates the probe lets race."""


class MongoBackend:
    """Keeps each scope as one document of a MongoDB collection. Several processes may share it.

    Args:
        url: Where, and with which options: ``mongodb://user@host:port/DATABASE?collection=holdfast``, or
            ``mongodb+srv://…``. See ``docs/backends/mongo.md``.

    Raises:
        InvalidInputError: The URL cannot be used; the message does not repeat it.
    """

    def __init__(self, url: str) -> None:
        self._address: Address = parse(url)
        self._shown = self._address.shown
        self._doorman = Doorman()
        self._link: Link | None = None
        self._attested: Attestation
        self._read_only = False
        self._lanes: dict[str, Lane] = {}
        self._floors: dict[str, int] = {}

    def __repr__(self) -> str:
        return f"MongoBackend({self._shown})"

    async def open(self, *, read_only: bool = False) -> Guarantees:
        """Connect, attest, and try that of several updates one wins; see :meth:`holdfast.contract.Backend.open`.

        Raises:
            UnsafeSettingError: What the server does voids the promise; the message names it.
            UnavailableError: No primary can be reached, or a majority does not confirm; the message says why.

        Crash: Leaves what was there, and at most one small document of the probe.
        """
        if self._link is not None:
            raise FailedError(f"{self._shown}: is open already: close it first", backend=self._shown)
        self._floors.clear()
        self._lanes.clear()
        link = self._link = Link(self._address)
        deadline = self._deadline()
        try:
            self._attested = judge(await facts(link, deadline), self._shown)
            self._read_only = read_only
            if not read_only:
                await self._probe(link, deadline)
        except BaseException:
            self._link = None
            await asyncio.shield(link.close())
            raise
        guarantees = self._attested.guarantees
        return guarantees if read_only else msgspec.structs.replace(guarantees, fenced_how=How.ATTESTED)

    async def _probe(self, link: Link, deadline: float) -> None:
        """Let updates that expect the same state race on a document of our own: exactly one may win."""
        name, collection = f"~probe:{secrets.token_hex(6)}", link.collection

        async def rival(at: int) -> int:
            update = {"q": {"_id": name, "number": 1}, "u": {"$set": {"number": 2, "winner": at}}}
            return await link.write({"update": collection, "updates": [update]}, deadline)

        try:
            await link.write({"insert": collection, "documents": [{"_id": name, "number": 1}]}, deadline)
            won = sum(await asyncio.gather(*map(rival, range(_RIVALS))))
            await link.write({"delete": collection, "deletes": [{"q": {"_id": name}, "limit": 1}]}, deadline)
        except UnknownOutcomeError as error:
            why = str(error).partition("then: ")[2].partition("; send")[0]
            raise UnavailableError(
                f"{self._shown}: {why} (at the probe that open makes)", backend=self._shown
            ) from None
        if won != 1:
            raise UnsafeSettingError(
                f"{self._shown} let {won} of {_RIVALS} updates win that expected the same state: it cannot keep "
                "writers apart; use a MongoDB server",
                backend=self._shown,
            )

    async def read(self, scope: str, keys: Sequence[Key]) -> dict[Key, Record]:
        """Return the records of ``keys`` as of one moment, in one round trip."""
        self._opened()
        require_scope(scope)
        wanted = dict.fromkeys(keys)
        if not wanted:
            return {}
        found = await self._find(scope, rows_asked(list(wanted)))
        rows = {} if found is None else found.get("rows", {})
        records: dict[Key, Record] = {}
        with without_collections():
            for key in wanted:
                row = rows.get(field_of(key)) if isinstance(rows, dict) else ()
                if row is not None:
                    records[key] = self._record(key, row)
        return records

    def _record(self, key: Key, row: Any) -> Record:
        try:
            return Record(row["row"].encode(), int(row["version"]), Op(row["writer"], int(row["n"])))
        except (KeyError, TypeError, ValueError, AttributeError):
            raise foreign(self._shown, f"the row of {key}", key) from None

    async def commit(
        self,
        scope: str,
        changes: Mapping[Key, bytes | None],
        expect: Mapping[Key, int],
        *,
        op: Op,
    ) -> int:
        """Apply ``changes`` if ``expect`` holds, in one update of the scope's document; see the contract.

        Raises:
            ConflictError: Some ``expect`` does not hold; nothing was changed.
            InvalidInputError: A key, payload, op or scope cannot be used; nothing was changed.
            UnavailableError: Nothing was written: no primary, no room in the document.
            UnknownOutcomeError: The answer was lost or late; send the same op again.
            FailedError: Not open, opened read-only, or the server lost commits.

        Crash: All of it or nothing: one update of one document.
        Cancellation: If it was sent, it goes on.
        """
        link = self._opened()
        if self._read_only:
            raise FailedError(f"{self._shown}: was opened read-only: nothing was written", backend=self._shown)
        op = Op(*op)
        texts, size = self._doorman.admit(scope, changes, expect, op)
        lane = self._lanes.get(scope)
        if lane is None:
            limit = self._attested.max_document_bytes - _ROOM_BYTES
            lane = Lane(scope, link, self._floors, limit, self._address.deadline_seconds)
            self._lanes[scope] = lane
        return await lane.commit(Asked(op, dict(expect), texts, size))

    async def head(self, scope: str) -> Head:
        """Return the scope's commit number and its writers' last ops."""
        self._opened()
        require_scope(scope)
        found = await self._find(scope, {"format": 1, "number": 1, "tip": 1, "bytes": 1, "writers": 1})
        known = known_of(found, (), scope, self._shown)
        return Head(known.number, known.writers)

    async def keys(self, scope: str, prefix: KeyPrefix = KeyPrefix()) -> AsyncIterator[Key]:
        """Yield the scope's keys under ``prefix`` in byte order, all as of one moment."""
        link = self._opened()
        require_scope(scope)
        names = {"$map": {"input": {"$objectToArray": "$rows"}, "in": "$$this.k"}}
        pipeline: list[dict[str, Any]] = [
            {"$match": {"_id": scope}},
            {"$project": {"format": 1, "number": 1, "names": names}},
        ]
        floor, deadline = self._floors.get(scope, 0), self._deadline()
        found = await link.aggregate(pipeline, deadline, level=self._attested.read_level)
        await self._confirm(scope, found[0] if found else None, floor, deadline)
        try:
            listed = sorted(key_of(name) for name in (found[0]["names"] if found else ()))
        except (KeyError, TypeError, ValueError, AttributeError):
            raise foreign(self._shown, f"a row's name in scope {scope}") from None
        for key in listed:
            if prefix.matches(key):
                yield key

    async def scopes(self) -> AsyncIterator[str]:
        """Yield the names of the scopes that have had a commit, in byte order."""
        link, deadline = self._opened(), self._deadline()
        pipeline: list[dict[str, Any]] = [
            {"$match": {"_id": {"$regex": r"^[A-Za-z0-9._\-]{1,64}$"}, "number": {"$gte": 1}}},
            {"$project": {"format": 1, "number": 1}},
        ]
        floors = self._floors.copy()  # as of before the question
        found = await link.aggregate(pipeline, deadline, level="majority" if self._distributed else "local")
        for document in found:
            name = str(document["_id"])
            await self._confirm(name, document, floors.get(name, 0), deadline)
        for name in sorted(str(document["_id"]) for document in found):
            yield name

    async def close(self) -> None:
        """Wait for the commits under way, then close the connections. Repeatable.

        Crash: As before the call: nothing acknowledged depends on close.
        """
        link, self._link = self._link, None
        if link is not None:
            await asyncio.shield(self._settle(link))

    async def _settle(self, link: Link) -> None:
        for lane in self._lanes.values():
            await lane.idle()
        self._lanes.clear()
        await link.close()

    # -- reading -------------------------------------------------------------------------------------------------------

    @property
    def _distributed(self) -> bool:
        return self._attested.read_level == "linearizable"

    def _opened(self) -> Link:
        if self._link is None:
            raise FailedError(f"{self._shown}: is not open: open it first", backend=self._shown)
        return self._link

    def _deadline(self) -> float:
        return asyncio.get_running_loop().time() + self._address.deadline_seconds

    async def _find(self, scope: str, projection: dict[str, int]) -> dict[str, Any] | None:
        """Return these parts of a scope's document, once they are as durable as a commit."""
        link, deadline = self._opened(), self._deadline()
        floor = self._floors.get(scope, 0)  # as of before the question: commits meanwhile may raise it
        level = self._attested.read_level
        found = await link.find(scope, {**projection, "format": 1, "number": 1}, deadline, level=level)
        await self._confirm(scope, found, floor, deadline)
        return found

    async def _confirm(self, scope: str, found: dict[str, Any] | None, floor: int, deadline: float) -> None:
        """Refuse what was taken back or is of a newer format; make durable what is ahead of what we know to be so."""
        number = 0 if found is None else found.get("number")
        if found is not None:
            require_format(found, scope, self._shown)
        if not isinstance(number, int):
            raise foreign(self._shown, f"the number of scope {scope}")
        if number < floor:
            raise taken_back(self._shown, scope, number, floor)
        # Read again: a commit of ours may have been acknowledged meanwhile.
        ahead = number > self._floors.get(scope, 0)
        if ahead and self._attested.confirms_reads and not self._read_only:
            try:
                await barrier(self._opened(), deadline)
            except UnknownOutcomeError as error:
                why = str(error).partition("then: ")[2].partition("; send")[0]
                raise UnavailableError(
                    f"{self._shown}: what was read is not safe yet: {why}", backend=self._shown
                ) from None
        if ahead and not self._read_only:
            self._floors[scope] = max(number, self._floors.get(scope, 0))
