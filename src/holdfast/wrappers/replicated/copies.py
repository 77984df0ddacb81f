"""One copy of a replicated store: opening it, asking where its scopes stand, writing the wrapper's own rows."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Mapping

import msgspec

from ...contract import Backend, Guarantees, Key, Op
from ...errors import (
    ConflictError,
    CorruptedError,
    HoldfastError,
    InvalidInputError,
    UnavailableError,
    UnknownOutcomeError,
)
from .standing import (
    DOMAIN,
    FORMAT,
    NEVER,
    OWN_WRITERS,
    STORE_SCOPE,
    Charter,
    Promise,
    Standing,
    charter_key,
    decode,
    encode,
    newer,
    number_key,
)

ID_KEY = Key(DOMAIN, "store", "copy")
CONFIG_KEY = Key(DOMAIN, "store", "config")
_RESENDS = 3
"""How often a write of ours whose answer was lost is sent again, to learn what became of it."""


class Config(msgspec.Struct, frozen=True):
    """What the copies agreed on for the whole store; kept on each, the one with the highest generation holds."""

    generation: int
    first: str
    """Id of the copy that decides and numbers."""
    members: tuple[str, ...]
    """Ids of the copies that count."""
    quorum: int
    """How many of them, the first among them, hold a commit when it returns."""
    format: int = FORMAT

    @property
    def election(self) -> int:
        """How many members every quorum shares at least one with: so many must answer where a generation begins."""
        return len(self.members) - self.quorum + 1


class StaleGenerationError(Exception):
    """Somebody has promised or begun a newer generation: look again at what the copies agreed on. Never leaves us."""


class Copy:
    """One place that holds the whole store.

    Args:
        backend: The place.
        at: Its place among those that the user named, 0 being the first named.
    """

    def __init__(self, backend: Backend, at: int) -> None:
        self.backend = backend
        self.at = at
        self.name = f"copy {at + 1}"
        self.id = ""
        self.guarantees: Guarantees | None = None
        self.trouble: HoldfastError | None = None
        """Why it cannot be reached at the moment."""
        self.read_only = False
        self._writer = f"{OWN_WRITERS}{secrets.token_hex(4)}"
        self._n = 0
        self._turn = asyncio.Lock()
        self._opening = asyncio.Lock()

    def __repr__(self) -> str:
        return f"Copy({self.backend!r})"

    @property
    def is_open(self) -> bool:
        """Whether its backend is open."""
        return self.guarantees is not None

    async def open(self, *, read_only: bool) -> None:
        """Open its backend, unless it is open, and read its id."""
        async with self._opening:
            if self.guarantees is not None:
                return
            found = await self.backend.open(read_only=read_only)
            try:
                await self._read_id()
            except BaseException:
                await asyncio.shield(self.backend.close())
                raise
            self.read_only = read_only
            self.guarantees, self.trouble = found, None
            self.name = f"copy {self.at + 1} ({found.backend})"

    async def close(self) -> None:
        """Close its backend. Repeatable."""
        async with self._opening:
            self.guarantees = None
            await self.backend.close()

    # ------------------------------------------------------------------ what it knows of the store

    async def _read_id(self) -> None:
        record = (await self.backend.read(STORE_SCOPE, [ID_KEY])).get(ID_KEY)
        try:
            self.id = "" if record is None else msgspec.json.decode(record.payload, type=str)
        except msgspec.MsgspecError as error:
            raise CorruptedError(f"{ID_KEY} on copy {self.at + 1} is damaged: {error}", key=ID_KEY) from error

    async def name_itself(self, *, must_be_empty: bool) -> None:
        """Give a new copy an id that stays with its data.

        Raises:
            InvalidInputError: It holds rows, and must not.
        """
        # First the rows, then the id: rows of another process that is making it a copy come after its id.
        empty = not must_be_empty or not [scope async for scope in self.backend.scopes() if scope != STORE_SCOPE]
        await self._read_id()
        if self.id:
            return
        if not empty:
            raise InvalidInputError(f"{self.name} holds rows of its own: name it first, or give an empty copy")
        payload = msgspec.json.encode(secrets.token_hex(8))
        try:
            await self.write(STORE_SCOPE, {ID_KEY: payload}, {ID_KEY: 0})
        except ConflictError:
            pass  # another process was faster: its answer counts
        await self._read_id()

    async def config(self) -> tuple[Config | None, int]:
        """Return what this copy knows of the agreement, and the version of that row."""
        record = (await self.backend.read(STORE_SCOPE, [CONFIG_KEY])).get(CONFIG_KEY)
        if record is None:
            return None, 0
        try:
            found = msgspec.json.decode(record.payload, type=Config)
        except msgspec.MsgspecError as error:
            raise CorruptedError(f"{CONFIG_KEY} on {self.name} is damaged: {error}", key=CONFIG_KEY) from error
        if found.format > FORMAT:
            raise newer(CONFIG_KEY, found.format)
        return found, record.version

    async def agree(self, config: Config) -> bool:
        """Take on a newer agreement; False if this copy knows another one that is as new.

        Crash: It has taken it on or not.
        """
        while True:
            known, version = await self.config()
            if known == config:
                return True
            if known is not None and known.generation >= config.generation:
                return False
            try:
                await self.write(STORE_SCOPE, {CONFIG_KEY: msgspec.json.encode(config)}, {CONFIG_KEY: version})
            except ConflictError:
                continue
            return True

    # ------------------------------------------------------------------ what it holds of a scope

    async def standing(self, scope: str) -> Standing:
        """Return where this copy's scope stands, under whatever name it lies there now."""
        found = await self._stands(scope, scope)
        kept = 0
        while found.charter.moved_to:
            before = found
            kept += max(0, before.charter.kept)
            found = await self._stands(scope, before.charter.moved_to)
            if not found.charter_version:
                floor = before.promised
                torn = Charter(scope=scope, whole_from=NEVER, floor=floor, was=before.charter.was)
                found = found._replace(charter=torn)
            found = found._replace(moved_from=None if before.charter.cleared else before, kept=kept)
        return found

    async def _stands(self, scope: str, physical: str) -> Standing:
        charter, number = charter_key(physical), number_key(physical)
        found = await self.backend.read(physical, [charter, number])
        if charter not in found:
            # Written before it was a copy, or never.
            at = found[number].version if number in found else (await self.backend.head(physical)).number
            return Standing(physical, at, Charter(scope=scope), 0)
        record = found[charter]
        at = found[number].version if number in found else record.version
        return Standing(physical, at, decode(charter, record.payload), record.version)

    async def rewrite(
        self, standing: Standing, charter: Charter, changes: Mapping[Key, bytes | None] | None = None
    ) -> int:
        """Rewrite a scope's charter if nothing was committed there since ``standing``; return the new number.

        Crash: It was rewritten or not.
        """
        guard, number = charter_key(standing.physical), number_key(standing.physical)
        expect = {guard: standing.charter_version}
        if standing.charter_version:
            expect[number] = standing.number
        payload = {**(changes or {}), guard: encode(charter), number: b"{}"}
        return await self.write(standing.physical, payload, expect)

    async def promise(self, scope: str, generation: int) -> Standing:
        """Take no commit of an older generation any more; return where the scope stands with that.

        Raises:
            StaleGenerationError: It has promised a newer one.

        Crash: It has promised or not.
        """
        while True:
            found = await self.standing(scope)
            if found.promised >= generation:
                if found.promised > generation:
                    raise StaleGenerationError
                return found
            at, charter = found, found.charter
            if found.moved_from is not None:  # nothing is written under the new name before the old one is cleared
                at, charter = found.moved_from, found.moved_from.charter
            if found.is_whole:
                promises = (*charter.promises, Promise(generation, found.number + 1))
                charter = msgspec.structs.replace(charter, promises=promises)
            else:  # this number is none of the source's any more: the repair begins anew
                charter = msgspec.structs.replace(
                    charter, floor=generation, spoilt=True, whole_from=NEVER, was=found.rank
                )
            try:
                await self.rewrite(at, charter)
            except ConflictError:
                continue

    async def write(self, physical: str, changes: Mapping[Key, bytes | None], expect: Mapping[Key, int]) -> int:
        """Commit rows of the wrapper's own, and send again what was left unknown."""
        async with self._turn:  # a writer has one commit in flight
            self._n += 1
            op = Op(self._writer, self._n)
            for _ in range(_RESENDS):
                try:
                    return await self.backend.commit(physical, changes, expect, op=op)
                except UnknownOutcomeError as error:
                    unknown = error
            # Whoever comes next looks at what is there: each of these writes expects the state that it was made for.
            raise UnavailableError(f"{self.name}: a row of the copies' own may not be written: {unknown}") from unknown
