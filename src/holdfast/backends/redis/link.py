"""One connection to one server, over redis-py's asyncio connection with its retries off.

Nothing here sends anything twice. A link that failed is closed and never used again.
"""

from __future__ import annotations

import asyncio
import re
import select
from collections.abc import Iterable
from typing import Any

from redis.asyncio import Connection, SSLConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, AuthorizationError, BusyLoadingError, RedisError, ResponseError

from ...errors import CorruptedError, FailedError, FullError, HoldfastError, UnavailableError
from .address import Address

Word = bytes | str | int

_REFUSALS = (ResponseError, BusyLoadingError, AuthenticationError, AuthorizationError)
"""The server's own answers "no"; some of redis-py's are connection errors though the connection is whole."""

_CODES: dict[str, str] = {
    "LOADING": "is loading its data: try again",
    "READONLY": "is a replica now and takes no writes: it will be looked for anew",
    "MASTERDOWN": "is a replica without its primary: try again",
    "CLUSTERDOWN": "says that the cluster is down: bring its nodes back",
    "TRYAGAIN": "is moving these keys to another node: try again",
    "MOVED": "says that these keys lie on another node: use redis+cluster://",
    "ASK": "is moving these keys to another node: try again",
    "BUSY": "is busy with somebody's long script: end it with SCRIPT KILL",
    "OOM": "is out of memory: raise maxmemory",
    "MISCONF": "cannot write its snapshots to disk and refuses writes: look into its log",
    "NOREPLICAS": "has fewer replicas than its min-replicas-to-write: bring them back",
    "NOAUTH": "wants a password: give one in the URL or by password_env",
    "WRONGPASS": "refused the user or password: mend the URL or password_env",
    "NOPERM": "does not permit this user a command or key that is needed: see docs/backends/redis.md",
    "UNKILLABLE": "is busy with somebody's long script: try again",
}
_CODE = re.compile(rf"\b({'|'.join((*_CODES, 'NOSCRIPT', 'WRONGTYPE', 'EXECABORT'))})\b")
_FORBIDDEN_IN_SCRIPT = re.compile(r"ACL failure in script|user executing the script can't (run|access)")
_BY_CLASS = {
    "OutOfMemoryError": "OOM",
    "BusyLoadingError": "LOADING",
    "NoScriptError": "NOSCRIPT",
    "ReadOnlyError": "READONLY",
    "AuthenticationError": "WRONGPASS",
    "AuthorizationError": "NOPERM",
    "NoPermissionError": "NOPERM",
    "AskError": "ASK",
    "TryAgainError": "TRYAGAIN",
    "MovedError": "MOVED",
    "ClusterDownError": "CLUSTERDOWN",
    "MasterDownError": "MASTERDOWN",
    "ExecAbortError": "EXECABORT",
}


class LinkLostError(Exception):
    """The connection is gone; what was sent on it may or may not have been done."""


class UnreachableError(Exception):
    """No connection could be made; nothing was sent. Its message holds no credentials."""


class Refusal(Exception):
    """The server's answer "no": the command was not executed.

    Args:
        code: Its first word, such as ``READONLY``; ``ERR`` for anything else.
        text: All of it. May repeat the command's arguments: never to be shown.
    """

    def __init__(self, code: str, text: str) -> None:
        super().__init__(code)
        self.code = code
        self.text = text

    def mapped(self, shown: str) -> HoldfastError:
        """Return the error that the caller gets; the only place where codes become errors."""
        if self.code in _CODES:
            full = self.code == "OOM" or (self.code == "MISCONF" and "No space left" in self.text)
            kind = FullError if full else UnavailableError
            return kind(f"{shown} {_CODES[self.code]}; nothing was written", backend=shown)
        if self.code == "SCRIPTPERM":
            return FailedError(
                f"{shown} does not permit this user a command of the commit script, which may have stopped half-way: "
                "permit what docs/backends/redis.md lists, then open again",
                backend=shown,
            )
        if self.code == "WRONGTYPE":
            return CorruptedError(f"{shown}: a key under our prefix holds another type; who wrote it?", backend=shown)
        # The text may repeat arguments, rows among them: only the kind of error is told.
        return FailedError(f"{shown} refused a command it should know ({self.code}): is it a Redis?", backend=shown)


def refusal(error: BaseException) -> Refusal:
    """Return the server's answer that redis-py made an exception of."""
    text = str(error)
    if _FORBIDDEN_IN_SCRIPT.search(text):
        return Refusal("SCRIPTPERM", text)
    by_class = _BY_CLASS.get(type(error).__name__, "")
    if by_class in ("", "WRONGPASS") and (found := _CODE.search(text)):
        return Refusal(found[1], text)  # older servers put the code in the middle of a script's error
    if by_class == "WRONGPASS" and getattr(error, "status_code", "") == "NOAUTH":
        return Refusal("NOAUTH", text)
    return Refusal(by_class or "ERR", text)


def packed(*words: Word) -> bytes:
    """Return a command as it goes over the wire."""
    parts = [b"*%d\r\n" % len(words)]
    for word in words:
        raw = word if isinstance(word, bytes) else str(word).encode()
        parts.append(b"$%d\r\n%b\r\n" % (len(raw), raw))
    return b"".join(parts)


class Link:
    """One connection. One exchange at a time: the caller sees to that."""

    def __init__(self, address: Address, host: str, port: int, *, sentinel: bool = False) -> None:
        options: dict[str, Any] = {
            "host": host,
            "port": port,
            "db": 0 if sentinel else address.db,
            "username": (address.sentinel_username if sentinel else address.username) or None,
            "password": (address.sentinel_password if sentinel else address.password) or None,
            "protocol": 2,  # its replies are the same on every version
            "retry": Retry(NoBackoff(), 0),
            "socket_timeout": None,  # each exchange has a deadline of its own
        }
        kind: type[Connection] = Connection
        if address.tls:
            kind = SSLConnection
            options["ssl_ca_certs"] = address.tls_ca_file or None
            options["ssl_certfile"] = address.tls_cert_file or None
            options["ssl_keyfile"] = address.tls_key_file or None
        self.host, self.port = host, port
        self.promised = False
        self.knows_script = False
        """Whether the script was sent on this connection in full."""
        self._connection = kind(**options)

    async def connect(self, deadline: float) -> None:
        """Connect and log in.

        Raises:
            UnreachableError: Not reached, or not within the deadline (the loop's clock); nothing was sent.
            Refusal: The server does not let us in.
        """
        try:
            async with asyncio.timeout_at(deadline):
                await self._connection.connect()  # type: ignore[no-untyped-call]
        except _REFUSALS as error:
            await self.close()
            raise refusal(error) from None
        except (RedisError, OSError, TimeoutError, ValueError) as error:
            await self.close()
            why = "no answer in time" if isinstance(error, TimeoutError) else type(error).__name__
            # Not chained: what redis-py raised may hold the login.
            raise UnreachableError(f"{self.host}:{self.port} cannot be reached ({why})") from None
        except BaseException:
            await self.close()
            raise

    @property
    def stale(self) -> bool:
        """Whether the server has closed its side: found out before anything is sent on it."""
        reader, writer = self._connection._reader, self._connection._writer
        if reader is None or writer is None or reader.at_eof() or writer.is_closing():
            return True
        # The loop may not have come round to it yet: the kernel knows, and saves an unknown outcome after a restart.
        poll = select.poll()
        poll.register(writer.get_extra_info("socket").fileno(), select.POLLRDHUP)
        return bool(poll.poll(0))

    async def send(self, commands: Iterable[bytes]) -> None:
        """Send commands.

        Raises:
            LinkLostError: They may have been sent in part; the link is closed.
        """
        try:
            await self._connection.send_packed_command(list(commands), check_health=False)
        except (RedisError, OSError) as error:
            await self.close()
            raise LinkLostError(type(error).__name__) from None

    async def answer(self) -> Any:
        """Return the next answer; a :class:`Refusal` is returned, not raised.

        Raises:
            LinkLostError: There will be none; the link is closed.
        """
        try:
            return await self._connection.read_response(disconnect_on_error=False)
        except _REFUSALS as error:
            return refusal(error)
        except (RedisError, OSError) as error:
            await self.close()
            raise LinkLostError(type(error).__name__) from None

    async def ask(self, *commands: bytes, deadline: float) -> list[Any]:
        """Send commands and return their answers.

        Raises:
            LinkLostError: Lost, or no answer in time; the link is closed.
        """
        try:
            async with asyncio.timeout_at(deadline):
                await self.send(commands)
                return [await self.answer() for _ in commands]
        except TimeoutError:
            await self.close()
            raise LinkLostError("no answer in time") from None
        except BaseException:
            await self.close()  # answers that nobody reads any more must not be taken for others
            raise

    async def close(self) -> None:
        """Close it without waiting for the other side; repeatable."""
        writer = self._connection._writer
        try:
            await self._connection.disconnect(nowait=True)
        except (RedisError, OSError):
            pass
        if writer is not None:
            writer.transport.abort()  # a black hole would keep what is unsent, and the socket, for minutes
