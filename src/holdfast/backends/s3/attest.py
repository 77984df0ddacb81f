"""What a service promises: conditional writes are tried, many at once; how long it keeps things, no protocol tells.

A service may refuse a second creator when asked in turn and still let several win when they come at once, so each
round lets several go at the same moment, on objects of the probe's own under the user's prefix.
"""

from __future__ import annotations

import asyncio
import math
import secrets
import time
from datetime import UTC, datetime, timedelta

from ...contract import Guarantees, How, Survives
from ...errors import HoldfastError, UnavailableError, UnsafeSettingError
from .address import Address
from .service import Answer, Kind, Service

ROUNDS = 6
RIVALS = 4
"""How many write at once in each round."""
FOLDER = "~probe"
"""No scope is named so."""
_LEFT_OVER = timedelta(hours=1)
_RACED_SECONDS = 600.0
_RACED: dict[tuple[str, str], float] = {}
"""When each bucket last passed its races in this process; within ten minutes it is spared them."""

_REMEDY = "do not run bots on it: take a service that keeps conditional writes (Amazon S3, Ceph), or another store"


async def attest(service: Service, address: Address, *, read_only: bool) -> Guarantees:
    """Return what the service promises; a probe has been made unless ``read_only``.

    Raises:
        UnsafeSettingError: Conditions are ignored, or do not hold when several write at once.
        HoldfastError: It cannot be reached or used.
    """
    deadline = asyncio.get_running_loop().time() + address.deadline_seconds
    left = await service.list(FOLDER, deadline=deadline)
    keeps_versions = False
    if not read_only:
        probe = _Probe(service, deadline)
        place = (address.endpoint, address.bucket)
        try:
            etag = await probe.in_turn()
            if time.monotonic() - _RACED.get(place, -math.inf) > _RACED_SECONDS:
                await probe.at_once(etag)
                _RACED[place] = time.monotonic()
            keeps_versions = probe.keeps_versions
        finally:
            old = datetime.now(UTC) - _LEFT_OVER
            await asyncio.shield(probe.clean([one.path for one in left if one.modified < old]))
    return _judge(address, probed=not read_only, keeps_versions=keeps_versions)


def _judge(address: Address, *, probed: bool, keeps_versions: bool) -> Guarantees:
    """Return the promise; what nobody can see from outside is never called attested."""
    warnings: list[str] = []
    if address.survives is not None:
        survives, how = address.survives, How.ASSUMED
    elif address.is_amazon:
        survives, how = Survives.SERVER, How.ASSUMED
    else:
        survives, how = Survives.PROCESS, How.UNKNOWN
        warnings.append(
            "nothing tells whether this service keeps what it was given when its machine goes down: ask who runs it, "
            "then say so by &survives=host or &survives=server"
        )
    if address.is_loopback and survives > Survives.HOST:
        survives = Survives.HOST
        warnings.append("the service runs on this machine, whose loss it cannot survive: name one elsewhere")
    if not address.is_encrypted and not address.is_loopback:
        warnings.append("rows travel unencrypted: use an https:// endpoint")
    if keeps_versions:
        warnings.append(
            "the bucket keeps every version, and each commit makes one: set a lifecycle rule that expires old versions"
        )
    return Guarantees(
        backend=address.shown,
        survives=survives,
        survives_how=how,
        atomic=True,
        atomic_how=How.ASSUMED,  # an object is replaced whole: as documented
        fenced=True,
        fenced_how=How.ATTESTED if probed else How.ASSUMED,
        shared=True,
        warnings=tuple(warnings),
    )


class _Probe:
    """Objects of one opening, written under conditions and deleted afterwards."""

    def __init__(self, service: Service, deadline: float) -> None:
        self._service = service
        self._deadline = deadline
        self._name = secrets.token_hex(6)
        self._paths: list[str] = []
        self._number = 0
        self.keeps_versions = False

    async def in_turn(self) -> str:
        """Write under conditions that hold and that do not, and find out how ETags are given; return the object's ETag.

        Raises:
            UnsafeSettingError: Conditions are ignored; the message says which.
            HoldfastError: The service cannot be reached or used, or lacks a right.
        """
        path = self._path()
        first = await self._certain(path, "")
        if first.kind is not Kind.DONE or not first.etag:
            raise self._unsafe("gave no ETag to a new object" if first.kind is Kind.DONE else "refused a new object")
        again = await self._certain(path, "")
        if again.kind is Kind.DONE:
            raise self._unsafe("ignores If-None-Match: it replaced an object that was to be made new")
        second = await self._certain(path, first.etag)
        if second.kind is not Kind.DONE:
            self._service.quotes_etags = False
            second = await self._certain(path, first.etag)
        if second.kind is not Kind.DONE:
            raise self._unsafe("refuses If-Match with the very ETag that it gave")
        if (await self._certain(path, first.etag)).kind is Kind.DONE:
            raise self._unsafe("ignores If-Match: it replaced an object that had changed")
        if (await self._certain(self._path(), first.etag)).kind is Kind.DONE:
            raise self._unsafe("ignores If-Match: it made an object that was to be replaced")
        return second.etag

    async def at_once(self, etag: str) -> None:
        """Let rivals race, for new objects and for the one whose ETag this is.

        Raises:
            UnsafeSettingError: Several won; the message says how.
            HoldfastError: It cannot be reached or used.
        """
        path = self._paths[0]
        for _ in range(ROUNDS):
            # Both kinds at once: on a far service the rounds are what takes the time.
            created, etag = await asyncio.gather(self._race(self._path(), ""), self._race(path, etag))
            del created

    async def clean(self, left_over: list[str]) -> None:
        """Delete the probe's objects, and those that a killed process left; what cannot be deleted is left to later."""
        deadline = asyncio.get_running_loop().time() + max(1.0, self._deadline - asyncio.get_running_loop().time())
        await asyncio.gather(
            *(self._service.delete(path, deadline=deadline) for path in (*self._paths, *left_over[:100]))
        )

    def _path(self) -> str:
        self._paths.append(f"{FOLDER}/{self._name}-{len(self._paths)}.json")
        return self._paths[-1]

    async def _race(self, path: str, etag: str) -> str:
        """Let rivals write at once under one condition, which holds for the first of them; return the ETag after it."""
        bodies = [self._body() for _ in range(RIVALS)]
        answers = await asyncio.gather(*(self._put(path, etag, body) for body in bodies))
        pairs = list(zip(bodies, answers, strict=True))
        won = [body for body, answer in pairs if answer.kind is Kind.DONE]
        if len(won) > 1:
            what = "replaced one object" if etag else "made one object"
            raise self._unsafe(f"let {len(won)} of {RIVALS} win that {what} at once")
        found = await self._service.get(path, deadline=self._deadline)
        if found.kind not in (Kind.DONE, Kind.ABSENT):
            raise self._unavailable(found)
        # None may have won: each can be told that another came at the same moment.
        lost = [body for body, answer in pairs if answer.kind is Kind.LOST]
        if found.body in lost or (won and found.body != won[0]):
            raise self._unsafe("shows an object other than the one that was written last")
        return found.etag

    async def _certain(self, path: str, etag: str) -> Answer:
        """Write, with nobody else doing so: a service that fails now is of no use."""
        answer = await self._put(path, etag)
        if answer.kind is Kind.CONFUSED:
            raise self._unavailable(answer)
        return answer

    async def _put(self, path: str, etag: str, body: bytes = b"") -> Answer:
        """Write; an answer that is neither done nor lost ends the probe."""
        answer = await self._service.put(path, body or self._body(), etag=etag, deadline=self._deadline)
        self.keeps_versions = self.keeps_versions or answer.kept_version
        if answer.kind in (Kind.DONE, Kind.LOST, Kind.CONFUSED):
            return answer
        if answer.kind is Kind.ABSENT:
            return Answer(Kind.LOST)
        if answer.kind is Kind.REFUSED and answer.lasting:
            raise self._unsafe("refuses conditional writes")
        raise self._unavailable(answer)

    def _body(self) -> bytes:
        self._number += 1
        return b'{"holdfast":"probe","number":%d}\n' % self._number

    def _unavailable(self, answer: Answer) -> HoldfastError:
        if answer.kind is Kind.REFUSED:
            return self._service.mapped(answer)
        return UnavailableError(f"{self._service.shown} {answer.why}", backend=self._service.shown)

    def _unsafe(self, what: str) -> UnsafeSettingError:
        shown = self._service.shown
        return UnsafeSettingError(f"{shown} {what}, so it cannot keep a second bot out: {_REMEDY}", backend=shown)
