"""Commands to the server: each bounded by a deadline, each error mapped once, none repeated by the driver.

Invariants:

* "Nothing was written" is said of a write only when no byte of it was sent, or when the server itself refused it.
* A write is acknowledged by a majority of the members, from their journals, or its outcome is unknown.
* What the driver says is never repeated: only class names, and the server's code and its name.
"""

from __future__ import annotations

import asyncio
import logging
from contextvars import ContextVar
from typing import Any

from bson.errors import BSONError, InvalidDocument
from pymongo import AsyncMongoClient, monitoring
from pymongo.errors import (
    ConfigurationError,
    DocumentTooLarge,
    NotPrimaryError,
    OperationFailure,
    PyMongoError,
    ServerSelectionTimeoutError,
)

from ...errors import (
    CorruptedError,
    FailedError,
    FullError,
    HoldfastError,
    InvalidInputError,
    UnavailableError,
    UnknownOutcomeError,
    UnsafeSettingError,
)
from .address import Address

_log = logging.getLogger(__name__)
_WRITES = ("insert", "update", "delete")
DUPLICATE = 11000
_TOO_LARGE = frozenset((10334, 17280, 17419, 17420))
UNAUTHORIZED, _FULL = 13, 14031
_REFUSALS = {
    UNAUTHORIZED: "the user may not do that: grant it readWrite on this database",
    18: "user or password is wrong",
    8000: "the service refused the user or the command",
    10107: "it is not the primary any more",
    13435: "it is not the primary any more",
    10058: "it is not the primary any more",
    13436: "it is neither a primary nor a secondary now",
    112: "another write was under way there (WriteConflict)",
    24: "it waited too long for a lock",
    46: "it waited too long for a lock",
    _FULL: "its disk is full: make room",
    462: "it is overloaded and refuses requests",
}
"""Codes that a server sends instead of executing a command, and what they mean."""
_NEVER_EXECUTED = frozenset((2, 9, 14, 26, 59, 72, 73, 166, *_REFUSALS))
"""Codes after which it is certain that nothing was written, now or later."""


class RefusedError(Exception):
    """The server answered a command with an error; ``code`` is its number."""

    def __init__(self, code: int, name: str) -> None:
        super().__init__(f"{code} {name}")
        self.code = code
        self.name = name


class _Sending:
    """Whether the command of the running task has gone out."""

    __slots__ = ("begun",)

    def __init__(self) -> None:
        self.begun = False


_SENDING: ContextVar[_Sending | None] = ContextVar("holdfast_mongo_sending", default=None)


class _Watch(monitoring.CommandListener):
    """Told by the driver just before it sends: from then on a write may be executed."""

    def started(self, event: monitoring.CommandStartedEvent) -> None:
        sending = _SENDING.get()
        if sending is not None and event.command_name in _WRITES:
            sending.begun = True

    def succeeded(self, event: monitoring.CommandSucceededEvent) -> None:
        """Nothing to note."""

    def failed(self, event: monitoring.CommandFailedEvent) -> None:
        """Nothing to note: the error itself arrives."""


class Link:
    """One client of the driver, for one opened backend.

    Args:
        address: Where, and as whom.

    Raises:
        InvalidInputError: The driver does not take the URL.
    """

    def __init__(self, address: Address) -> None:
        self.shown = address.shown
        self.collection = address.collection
        # A little less than the deadline: so the driver says what failed, and ends its attempt by itself.
        milliseconds = int(address.deadline_seconds * 900)
        try:
            self._client: AsyncMongoClient[dict[str, Any]] = AsyncMongoClient(
                address.uri,
                **address.credentials(),
                appname="holdfast",
                retryWrites=False,
                retryReads=False,
                connectTimeoutMS=milliseconds,
                serverSelectionTimeoutMS=milliseconds,
                waitQueueTimeoutMS=milliseconds,
                event_listeners=[_Watch()],
            )
        except (PyMongoError, ValueError, TypeError) as error:
            raise InvalidInputError(f"{self.shown}: the driver does not take it: {type(error).__name__}") from None
        self._database = self._client[address.database]

    async def close(self) -> None:
        """Close the connections. Repeatable."""
        try:
            await self._client.close()
        except (PyMongoError, OSError) as error:
            # Nothing depends on it: whatever was under way has been answered.
            _log.debug("closing %s: %s", self.shown, type(error).__name__)

    async def ask(self, command: dict[str, Any], deadline: float, *, admin: bool = False) -> dict[str, Any]:
        """Send a command that changes nothing, and return the answer.

        Raises:
            RefusedError: The server answered with an error.
            UnavailableError: No answer in time.
            CorruptedError: What lies there is not BSON.
        """
        database = self._client["admin"] if admin else self._database
        try:
            async with asyncio.timeout_at(deadline):
                return await database.command(command)
        except TimeoutError:
            raise UnavailableError(f"{self.shown}: no answer in time", backend=self.shown) from None
        except (PyMongoError, BSONError, OSError) as error:
            raise self._told(error) from None

    async def find(
        self, scope: str, projection: dict[str, int], deadline: float, *, level: str = "local"
    ) -> dict[str, Any] | None:
        """Return a scope's document, or these parts of it; None where there is none."""
        left = deadline - asyncio.get_running_loop().time()
        command = {
            "find": self.collection,
            "filter": {"_id": scope},
            "projection": projection,
            "limit": 1,
            "singleBatch": True,
            "maxTimeMS": max(1, int(left * 1000)),
            "readConcern": {"level": level},
        }
        found = (await self._answered(command, deadline))["cursor"]["firstBatch"]
        return found[0] if found else None

    async def aggregate(self, pipeline: list[dict[str, Any]], deadline: float, *, level: str) -> list[dict[str, Any]]:
        """Return what a pipeline yields; it must fit one answer."""
        command = {
            "aggregate": self.collection,
            "pipeline": pipeline,
            "cursor": {"batchSize": 1_000_000},
            "readConcern": {"level": level},
        }
        found: list[dict[str, Any]] = (await self._answered(command, deadline))["cursor"]["firstBatch"]
        return found

    async def _answered(self, command: dict[str, Any], deadline: float) -> dict[str, Any]:
        try:
            return await self.ask(command, deadline)
        except RefusedError as refused:
            raise self.mapped(refused) from None

    async def write(self, command: dict[str, Any], deadline: float) -> int:
        """Send a write, and return how many documents it matched, once a majority has it in its journals.

        Args:
            command: ``insert``, ``update`` or ``delete``, of one statement; its write concern is set here.

        Raises:
            RefusedError: A duplicate key; nothing was written.
            UnavailableError, UnsafeSettingError, FailedError: Nothing was written.
            UnknownOutcomeError: It was sent, and may be executed or lost yet.
        """
        sending = _Sending()
        token = _SENDING.set(sending)
        left = deadline - asyncio.get_running_loop().time()
        # The server gives up waiting for its members a little before we do, so that it can say so.
        concern = {"w": "majority", "j": True, "wtimeout": max(1, int(left * 900))}
        try:
            async with asyncio.timeout_at(deadline):
                answer = await self._database.command({**command, "writeConcern": concern})
        except TimeoutError:
            raise self._lost("no answer in time", sent=sending.begun) from None
        except DocumentTooLarge:
            raise self._too_large() from None
        except (PyMongoError, InvalidDocument, OSError) as error:
            told = self._told(error)
            if isinstance(told, RefusedError):
                raise self._write_refused(told) from None
            raise self._lost(_why(error), sent=sending.begun) from None
        finally:
            _SENDING.reset(token)
        return self._outcome(answer)

    def _outcome(self, answer: dict[str, Any]) -> int:
        for failed in answer.get("writeErrors") or ():
            code = failed.get("code", 0)
            if code == DUPLICATE:
                raise RefusedError(code, "DuplicateKey")
            raise self._write_refused(RefusedError(code, failed.get("codeName", "")))
        unconfirmed = answer.get("writeConcernError")
        if unconfirmed:
            why = unconfirmed.get("codeName") or unconfirmed.get("code")
            raise self._lost(f"a majority has not confirmed it ({why})", sent=True)
        return int(answer["n"])

    def _write_refused(self, refused: RefusedError) -> HoldfastError:
        if refused.code in _TOO_LARGE:
            return self._too_large()
        if refused.code in _NEVER_EXECUTED:
            return self.mapped(refused)
        return self._lost(f"the server answered with {refused}", sent=True)

    def _too_large(self) -> FullError:
        return FullError(
            f"{self.shown}: the scope's document would be larger than MongoDB takes: nothing was written; spread the "
            "strategies over several scopes",
            backend=self.shown,
        )

    def _lost(self, why: str, *, sent: bool) -> HoldfastError:
        if sent:
            return UnknownOutcomeError(
                f"{self.shown}: the commit was sent, then: {why}; send the same op again", backend=self.shown
            )
        return UnavailableError(f"{self.shown}: {why}; nothing was written", backend=self.shown)

    def mapped(self, refused: RefusedError) -> HoldfastError:
        """Return what a server's refusal means for the caller."""
        code = refused.code
        if code == 2:
            return UnsafeSettingError(
                f"{self.shown} refuses w:majority with j:true or a read concern (BadValue): it needs journaling and a "
                "server of version 4.2 or newer",
                backend=self.shown,
            )
        if code in _REFUSALS:
            kind = FullError if code == _FULL else UnavailableError
            return kind(f"{self.shown}: {_REFUSALS[code]}; nothing was written", backend=self.shown)
        if code in _NEVER_EXECUTED:
            return FailedError(
                f"{self.shown} does not know a command of ours ({refused}): is it MongoDB 4.2 or newer?",
                backend=self.shown,
            )
        return UnavailableError(f"{self.shown}: the server answered with {refused}", backend=self.shown)

    def _told(self, error: Exception) -> HoldfastError | RefusedError:
        """Return what the driver's error says, without its text."""
        if isinstance(error, NotPrimaryError):
            details = error.details if isinstance(error.details, dict) else {}
            return RefusedError(int(details.get("code", 91)), str(details.get("codeName", "not primary"))[:60])
        if isinstance(error, OperationFailure):
            told = error.details or {}
            return RefusedError(error.code or 0, str(told.get("codeName", ""))[:60])
        if isinstance(error, BSONError):
            return CorruptedError(f"{self.shown}: what lies there is not BSON", backend=self.shown)
        return UnavailableError(f"{self.shown}: {_why(error)}", backend=self.shown)


def _why(error: Exception) -> str:
    if isinstance(error, ServerSelectionTimeoutError):
        return "no primary can be reached"
    if isinstance(error, ConfigurationError):
        return "the driver cannot use this server or this configuration (MongoDB 4.2 or newer is needed)"
    return f"the connection failed ({type(error).__name__})"
