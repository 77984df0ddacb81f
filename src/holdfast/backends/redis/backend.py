"""The contract over Redis: commits go through a lane (group commit), reads through a few connections beside it.

Invariants:

* A scope's number, as acknowledged to this process, is never followed by a lower one: a server that lost commits (a
  failover, a restore, a restart without its file) is found out by the script and by every read, and refused.
* What a read returns is as durable as a commit: where replicas are waited for, a read that is ahead of what they
  confirmed waits for them too.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import msgspec

from ...contract import Guarantees, Head, How, Key, KeyPrefix, Op, Record, WriterOp
from ...errors import (
    ConflictError,
    CorruptedError,
    FailedError,
    HoldfastError,
    UnavailableError,
    UnknownOutcomeError,
    UnsafeSettingError,
)
from ..limits import require_commit
from ..state import require_scope
from . import script
from .address import Address, parse
from .attest import Attestation, attest
from .lane import Lane, Plain
from .link import Link, LinkLostError, Refusal, UnreachableError, packed
from .readers import Readers
from .script import CommitCommand, ScopeKeys
from .topology import Topology, topology

_GONE = ("the connection was lost", "no answer in time")
"""What a lane says of a commit whose server is not there any more."""

_PAGE_KEYS = 1000
"""How many keys one round trip of a listing brings."""


class RedisBackend:
    """Keeps rows on a Redis or Valkey server. Several processes may share it.

    Args:
        url: Where, and with which options: ``redis://[user:password@]host[:port][/db][?prefix=holdfast]``; also
            ``rediss://``, ``redis+sentinel://`` and ``redis+cluster://``. See ``docs/backends/redis.md``.

    Raises:
        InvalidInputError: The URL cannot be used; the message does not repeat it.
    """

    def __init__(self, url: str) -> None:
        self._address: Address = parse(url)
        self._topology: Topology = topology(self._address)
        self._shown = self._address.shown
        self._opened: Attestation | None = None
        self._read_only = False
        self._lanes: dict[str, Lane] = {}
        self._readers: Readers | None = None
        self._names: dict[str, ScopeKeys] = {}
        self._floors: dict[str, int] = {}
        self._listed: set[str] = set()

    def __repr__(self) -> str:
        return f"RedisBackend({self._shown})"

    async def open(self, *, read_only: bool = False) -> Guarantees:
        """Connect, attest the settings of every primary, and try the commit script; see the contract.

        Crash: Leaves what was there, and at most the three small keys of the probe.
        """
        if self._opened is not None:
            raise FailedError(f"{self._shown}: is open already: close it first", backend=self._shown)
        self._floors.clear()
        self._listed.clear()
        deadline = self._deadline()
        try:
            found = await self._attest_all(deadline)
        except (UnreachableError, LinkLostError) as error:
            self._topology.forget()
            raise UnavailableError(f"{self._shown}: {error}", backend=self._shown) from None
        except Refusal as refused:
            raise refused.mapped(self._shown) from None
        self._opened, self._read_only = found, read_only
        self._readers = Readers(self._address, self._topology, self._connect)
        if read_only:
            return found.guarantees
        try:
            await self._probe(deadline)
        except BaseException:
            await self.close()
            raise
        return msgspec.structs.replace(found.guarantees, fenced_how=How.ATTESTED)

    async def read(self, scope: str, keys: Sequence[Key]) -> dict[Key, Record]:
        """Return the records of ``keys`` as of one moment, in one round trip."""
        self._require_open()
        wanted = list(dict.fromkeys(keys))
        if not wanted:
            return {}
        names = self._keys_of(scope)
        answers = await self._read_moment(names, script.read_commands(names, wanted, role=self._role_allowed))
        versions, payloads = answers
        found = {}
        for key, meta, payload in zip(wanted, versions, payloads, strict=True):
            if meta is not None and payload is not None:
                try:
                    version, n, writer = meta.split(b" ", 2)
                    found[key] = Record(payload, int(version), Op(writer.decode(), int(n)))
                except ValueError:
                    raise self._foreign(f"the version of {key}", key) from None
            elif meta is not payload:
                raise CorruptedError(
                    f"{key}: its row or its version is gone, by another hand or by eviction",
                    key=key,
                    backend=self._shown,
                )
        return found

    async def commit(
        self,
        scope: str,
        changes: Mapping[Key, bytes | None],
        expect: Mapping[Key, int],
        *,
        op: Op,
    ) -> int:
        """Apply ``changes`` if ``expect`` holds, in one script; return when the barrier has confirmed it.

        Crash: All of it or nothing: the server writes a script's effects to its file as one transaction.
        """
        self._require_open()
        if self._read_only:
            raise FailedError(f"{self._shown}: was opened read-only: nothing was written", backend=self._shown)
        names = self._keys_of(scope)
        require_commit(scope, changes, expect, op, known=names.spelled)
        deadline = self._deadline()
        if scope not in self._listed:
            await self._list_scope(scope, deadline)
        command = CommitCommand(names, changes, expect, op, floor=self._floors.get(scope, 0))
        status, answer = await self._lane(scope).submit(command, deadline)
        if status in (script.APPLIED, script.REPEATED):
            self._floors[scope] = max(self._floors.get(scope, 0), answer if status == script.APPLIED else 0)
            return int(answer)
        raise self._refused(scope, status, answer, list(expect), op)

    async def head(self, scope: str) -> Head:
        """Return the scope's commit number and its writers' last ops."""
        self._require_open()
        names = self._keys_of(scope)
        commands = [packed("MULTI"), packed("GET", names.number)]
        commands += [packed("ROLE")] if self._role_allowed else []
        commands += [packed("HGETALL", names.writers), packed("EXEC")]
        number, writers = await self._read_moment(names, commands, with_number=True)
        pairs = zip(writers[::2], writers[1::2], strict=True)
        try:
            return Head(number, {writer.decode(): WriterOp(*map(int, last.split())) for writer, last in pairs})
        except (ValueError, TypeError):
            raise self._foreign(f"a writer of scope {scope}") from None

    async def keys(self, scope: str, prefix: KeyPrefix = KeyPrefix()) -> AsyncIterator[Key]:
        """Yield the scope's keys under ``prefix`` in byte order; a page at a time, each as of its own moment."""
        self._require_open()
        names = self._keys_of(scope)
        low, high = script.lex_range(prefix)
        while True:
            command = packed("ZRANGEBYLEX", names.index, low, high, "LIMIT", 0, _PAGE_KEYS)
            (page,) = await self._ask(names.tag, [command])
            for member in page:
                try:
                    key = Key(*member.decode().split(" "))
                except (ValueError, TypeError):
                    raise self._foreign(f"the index of scope {scope}") from None
                if prefix.matches(key):
                    yield key
            if len(page) < _PAGE_KEYS:
                return
            low = b"(" + page[-1]

    async def scopes(self) -> AsyncIterator[str]:
        """Yield the names of the scopes that have had a commit, in byte order."""
        self._require_open()
        index = script.scopes_key(self._address.prefix)
        (members,) = await self._ask(index.decode(), [packed("SMEMBERS", index)])
        for scope in sorted(member.decode() for member in members):
            (number,) = await self._ask(scope, [packed("GET", self._keys_of(scope).number)])
            if number is not None:
                yield scope

    async def close(self) -> None:
        """Finish what is under way and disconnect; repeatable.

        Crash: As before the call.
        """
        self._opened = None
        lanes, self._lanes = self._lanes, {}
        readers, self._readers = self._readers, None
        for lane in lanes.values():
            await lane.close()
        if readers is not None:
            await readers.close()

    # -- opening ---------------------------------------------------------------------------------------------------

    async def _attest_all(self, deadline: float) -> Attestation:
        """Attest every primary; what holds is what holds on the weakest."""
        found = []
        for host, port in await self._topology.primaries(deadline):
            link = Link(self._address, host, port)
            try:
                await link.connect(deadline)
                found.append(await attest(link, self._address, deadline))
            finally:
                await link.close()
        weakest = min(found, key=lambda one: one.guarantees.survives)
        barrier = min((one.barrier for one in found), key=lambda one: (one.by_fsync, one.local))
        return Attestation(
            msgspec.structs.replace(Guarantees.weakest([one.guarantees for one in found]), backend=self._shown),
            barrier,
            weakest.role_allowed and all(one.role_allowed for one in found),
        )

    async def _probe(self, deadline: float) -> None:
        """Try all commands of the script on keys of its own, so that a missing right is found now and not half-way."""
        names = ScopeKeys(self._address.prefix, script.PROBE_SCOPE)
        key = Key("probe", "probe", secrets.token_hex(4))
        writer = f"probe@{key.entity_id}"
        lane = self._lane(script.PROBE_SCOPE)

        async def send(op: Op, payload: bytes | None, expect: Mapping[Key, int]) -> Any:
            command = CommitCommand(names, {key: payload}, expect, op, max_writers=1)
            return await lane.submit(command, deadline)

        try:
            wrote = await send(Op(writer, 1), b"{}", {key: 0})
            refused = await send(Op(writer, 2), b"{}", {key: wrote[1] + 1})
            deleted = await send(
                Op(f"{writer}-2", 1), None, {key: wrote[1]}
            )  # a second writer: the first one is dropped
        except UnknownOutcomeError as error:
            why = str(error).replace("; send the same op again", "")
            # A server that went away says nothing of its settings; one that stays and does not confirm does.
            kind = UnavailableError if any(text in why for text in _GONE) else UnsafeSettingError
            raise kind(f"{why} (at the probe that open makes)", backend=self._shown) from None
        if (wrote[0], refused[0], deleted[0]) != (script.APPLIED, script.CLASHED, script.APPLIED):
            raise UnsafeSettingError(f"{self._shown} did not refuse a commit with a wrong version", backend=self._shown)

    async def _connect(self, tag: str, deadline: float) -> Link:
        """Connect to the tag's primary of this moment; it must still hold what was promised at open."""
        host, port = await self._topology.find(tag, deadline)
        link = Link(self._address, host, port)
        await link.connect(deadline)
        try:
            now = (await attest(link, self._address, deadline)).guarantees
            opened = self._opened
            if opened is not None and now.survives < opened.guarantees.survives:
                raise UnsafeSettingError(
                    f"{self._shown}: {host}:{port} promises less than at open: {'; '.join(now.warnings)}",
                    backend=self._shown,
                )
        except BaseException:
            await link.close()
            raise
        return link

    # -- sending ---------------------------------------------------------------------------------------------------

    @property
    def _role_allowed(self) -> bool:
        return self._opened is not None and self._opened.role_allowed

    def _deadline(self) -> float:
        return asyncio.get_running_loop().time() + self._address.deadline_seconds

    def _require_open(self) -> Attestation:
        if self._opened is None:
            raise FailedError(f"{self._shown}: is not open: open it first", backend=self._shown)
        return self._opened

    def _keys_of(self, scope: str) -> ScopeKeys:
        names = self._names.get(scope)
        if names is None:
            require_scope(scope)
            names = self._names[scope] = ScopeKeys(self._address.prefix, scope)
        return names

    def _lane(self, tag: str) -> Lane:
        """Return the queue for a hash tag: in a cluster each scope has its own, as each may lie on another node."""
        name = tag if self._address.kind == "cluster" else ""
        lane = self._lanes.get(name)
        if lane is None:
            barrier = self._require_open().barrier

            async def connect(deadline: float) -> Link:
                return await self._connect(tag, deadline)

            lane = self._lanes[name] = Lane(connect, self._topology.forget, barrier, self._shown)
        return lane

    async def _list_scope(self, scope: str, deadline: float) -> None:
        """Enter a scope into the list of scopes before its first commit: a scope that is not listed is not found."""
        index = script.scopes_key(self._address.prefix)
        try:
            await self._lane(index.decode()).submit(Plain(packed("SADD", index, scope)), deadline)
        except UnknownOutcomeError as error:
            raise UnavailableError(
                f"{self._shown}: no answer in time; nothing was written", backend=self._shown
            ) from error
        self._require_open()
        self._listed.add(scope)

    async def _ask(self, tag: str, commands: list[bytes]) -> list[Any]:
        self._require_open()
        assert self._readers is not None
        return await self._readers.ask(tag, commands, self._deadline())

    async def _read_moment(self, names: ScopeKeys, commands: list[bytes], *, with_number: bool = False) -> list[Any]:
        """Return a transaction's answers without those that tell the number and role, after these were checked."""
        scope = names.tag
        floor = self._floors.get(scope, 0)  # as of before the question: commits meanwhile may raise it
        answers = await self._ask(scope, commands)
        number_text, *rest = answers[-1]
        try:
            number = int(number_text or 0)
        except ValueError:
            raise self._foreign(f"the number of scope {scope}") from None
        if self._role_allowed and rest.pop(0)[0] != b"master":
            assert self._readers is not None
            await self._readers.look_anew()
            raise UnavailableError(f"{self._shown} is a replica now: it will be looked for anew", backend=self._shown)
        if number < floor:
            raise self._taken_back(scope, number)
        if self._require_open().barrier.replicas and number > floor and not self._read_only:
            await self._confirm(names, number)
        elif not self._require_open().barrier.replicas:
            self._floors[scope] = max(number, self._floors.get(scope, 0))
        return [number, *rest] if with_number else rest

    async def _confirm(self, names: ScopeKeys, number: int) -> None:
        """Wait until the replicas have what was read: another process wrote it, and it may not be acknowledged yet."""
        touch = Plain(packed("INCR", names.base + b"reads"))
        try:
            await self._lane(names.tag).submit(touch, self._deadline())
        except UnknownOutcomeError as error:
            why = str(error).partition("then: ")[2].partition(";")[0]
            raise UnavailableError(
                f"{self._shown}: what was read is not safe yet: {why}", backend=self._shown
            ) from None
        self._floors[names.tag] = max(number, self._floors.get(names.tag, 0))

    def _refused(self, scope: str, status: int, answer: Any, expected: list[Key], op: Op) -> HoldfastError:
        if status == script.CLASHED:
            clashes = [expected[at - 1] for at in answer]
            return ConflictError(
                f"{', '.join(map(str, clashes[:3]))}: not at the expected version: read again, then decide again",
                keys=clashes,
                backend=self._shown,
            )
        if status == script.MOVED_ON:
            return ConflictError(
                f"op {op.n} of writer {op.writer} comes after its op {answer.decode()}: that writer has moved on",
                backend=self._shown,
            )
        return self._taken_back(scope, answer)

    def _foreign(self, what: str, key: Key | None = None) -> CorruptedError:
        return CorruptedError(f"{self._shown}: {what} was written by another hand", key=key, backend=self._shown)

    def _taken_back(self, scope: str, number: int) -> FailedError:
        return FailedError(
            f"{self._shown}: scope {scope} stands at commit {number}, though commit {self._floors[scope]} was "
            "acknowledged: the server lost commits (a failover, a restore, or a restart without its file); "
            "stop, look into it, then open again",
            backend=self._shown,
        )
