"""The few requests that are made, over obstore with its retries off; every answer is judged here, once.

obstore's blocking calls are used, in threads of our own: its asynchronous ones let the interpreter abort now and then
when a process ends soon after its last request (its worker threads still hold the request's result).

Nothing that obstore raises leaves this module: what it says may repeat an access key.
"""

from __future__ import annotations

import asyncio
import enum
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from typing import Any, NamedTuple

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, NotModifiedError, PreconditionError
from obstore.store import S3Store

from ...errors import FailedError, FullError, HoldfastError, InvalidInputError, UnavailableError
from .address import Address

MAX_REQUESTS = 16
"""How many requests are under way at once; others wait for a thread."""

_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r"<Code>([A-Za-z]{1,60})</Code>")
_NOT_CONNECTED = re.compile(r"\bkind: Connect\b")
"""No connection was made; ``kind: ConnectionReset`` is another matter: by then it may have been sent."""
_TELLS_OF_NO_CREDENTIALS = re.compile(r"169\.254\.\d+\.\d+|/latest/(api|meta-data)|fd00:ec2")
_RIGHTS = "GetObject, PutObject, DeleteObject and ListBucket under the prefix"
_REMEDIES = {
    "NoSuchBucket": "has no such bucket: make it first, or mend the URL",
    "InvalidAccessKeyId": "does not know the access key: mend AWS_ACCESS_KEY_ID",
    "SignatureDoesNotMatch": "refused the secret key: mend AWS_SECRET_ACCESS_KEY",
    "ExpiredToken": "says that the session token has expired: renew AWS_SESSION_TOKEN",
    "RequestTimeTooSkewed": "says that this machine's clock is wrong: set it",
    "AccessDenied": f"does not permit it: the user needs {_RIGHTS}",
    "AuthorizationHeaderMalformed": "expects another region: add &region=… to the URL",
    "PermanentRedirect": "keeps the bucket elsewhere: add &region=… to the URL",
    "SlowDown": "asks to slow down: try again",
    "TooManyRequests": "asks to slow down: try again",
    "QuotaExceeded": "has no room left under its quota: raise it",
}


class Kind(enum.Enum):
    """What became of a request."""

    DONE = "done"
    LOST = "its condition did not hold"
    ABSENT = "no such object"
    SAME = "not changed"
    NOT_SENT = "nothing was sent"
    REFUSED = "refused: nothing was done"
    CONFUSED = "the service failed: it may have been done"
    UNKNOWN = "no answer: it may have been done"


class Answer(NamedTuple):
    """What became of a request, and what it brought."""

    kind: Kind
    why: str = ""
    """In words, where it did not go through; holds nothing that the service said but its code."""
    etag: str = ""
    body: bytes = b""
    kept_version: bool = False
    """The bucket keeps old versions."""
    lasting: bool = False
    """Refused for a reason that does not pass by itself."""
    full: bool = False
    """Refused because there is no room."""


class Listed(NamedTuple):
    """One object of a listing."""

    path: str
    modified: datetime


class Service:
    """One bucket. Closed after use.

    Args:
        address: Where it is.
    """

    def __init__(self, address: Address) -> None:
        self.shown = address.shown
        self.quotes_etags = True
        """Whether ``If-Match`` wants the ETag in quotes, as the standard says; Ceph 16 wants it without."""
        self._threads = ThreadPoolExecutor(MAX_REQUESTS, thread_name_prefix="holdfast-s3")
        limit = timedelta(seconds=address.deadline_seconds)
        options: dict[str, Any] = {"conditional_put": "etag", "disable_bulk_delete": True}
        if address.endpoint:
            options["endpoint"] = address.endpoint
        if address.region:
            options["region"] = address.region
        try:
            self._store = S3Store(
                address.bucket,
                prefix=address.prefix,
                client_options={"allow_http": not address.is_encrypted, "timeout": limit, "connect_timeout": limit},
                retry_config={"max_retries": 0, "retry_timeout": limit},
                **options,
            )
        except (BaseError, ValueError) as error:
            self._threads.shutdown(wait=False)
            why = type(error).__name__  # its text may repeat a variable of the environment
        else:
            return
        raise InvalidInputError(f"{self.shown}: the AWS_… variables of the environment cannot be used ({why})")

    async def put(self, path: str, body: bytes, *, etag: str, deadline: float) -> Answer:
        """Write an object if its ETag is still this one; with no ETag, if there is no such object.

        Args:
            deadline: Of the event loop's clock.
        """
        mode: Any = {"e_tag": etag if self.quotes_etags else etag.strip('"')} if etag else "create"

        def send() -> Answer:
            done = obstore.put(
                self._store,
                path,
                body,
                mode=mode,
                use_multipart=False,
                attributes={"Content-Type": "application/json"},
            )
            return Answer(Kind.DONE, etag=done["e_tag"] or "", kept_version=bool(done["version"]))

        return await self._call(send, deadline)

    async def get(self, path: str, *, etag: str = "", deadline: float) -> Answer:
        """Return an object; ``Kind.SAME`` if its ETag is still this one."""

        def send() -> Answer:
            found = obstore.get(self._store, path, options={"if_none_match": etag} if etag else None)
            return Answer(Kind.DONE, etag=found.meta["e_tag"] or "", body=found.bytes().to_bytes())

        return await self._call(send, deadline)

    async def delete(self, path: str, *, deadline: float) -> Answer:
        """Delete an object; it may be absent."""

        def send() -> Answer:
            obstore.delete(self._store, path)
            return Answer(Kind.DONE)

        return await self._call(send, deadline)

    async def list(self, folder: str, *, deadline: float) -> list[Listed]:
        """Return the objects that lie right under a folder.

        Raises:
            HoldfastError: They could not be listed.
        """
        found: list[Listed] = []

        def send() -> Answer:
            listed = obstore.list_with_delimiter(self._store, folder or None)
            found.extend(Listed(one["path"], one["last_modified"]) for one in listed["objects"])
            return Answer(Kind.DONE)

        answer = await self._call(send, deadline)
        if answer.kind is not Kind.DONE:
            raise self.mapped(answer)
        return found

    def mapped(self, answer: Answer) -> HoldfastError:
        """Return the error of a request that wrote nothing for sure."""
        kind = FailedError if answer.lasting else FullError if answer.full else UnavailableError
        return kind(f"{self.shown} {answer.why}; nothing was written", backend=self.shown)

    async def close(self) -> None:
        """Wait for the threads, each of which ends by its deadline."""
        await asyncio.to_thread(self._threads.shutdown)

    async def _call(self, send: Callable[[], Answer], deadline: float) -> Answer:
        """Run a request in a thread; at the deadline it is left to itself."""
        seconds = deadline - asyncio.get_running_loop().time()
        if seconds <= 0:
            return Answer(Kind.NOT_SENT, "did not answer in time")
        running = self._threads.submit(_judged, send)
        waiting = asyncio.wrap_future(running)
        try:
            await asyncio.wait({waiting}, timeout=seconds)
        finally:
            withdrawn = not waiting.done() and running.cancel()
        if waiting.done() and not waiting.cancelled():
            return waiting.result()
        return Answer(Kind.NOT_SENT if withdrawn else Kind.UNKNOWN, "did not answer in time")


def _judged(send: Callable[[], Answer]) -> Answer:
    """Send, and judge what obstore raises; its text is looked into and never passed on."""
    try:
        return send()
    except NotModifiedError:
        return Answer(Kind.SAME)
    except FileNotFoundError as error:
        text = str(error)
        return _refused(text, 404) if "NoSuchBucket" in text else Answer(Kind.ABSENT)
    except (AlreadyExistsError, PreconditionError) as error:
        # 412, and 409 where two came at once; 404 where the object to be replaced is gone.
        text = str(error)
        return _refused(text, 404) if "NoSuchBucket" in text else Answer(Kind.LOST)
    except BaseError as error:
        return _by_status(str(error))
    except Exception as error:  # such as a header that cannot be read; the cause may hold anything
        return Answer(Kind.UNKNOWN, f"gave an answer that cannot be read ({type(error).__name__})")


def _by_status(text: str) -> Answer:
    if _TELLS_OF_NO_CREDENTIALS.search(text):
        return Answer(
            Kind.NOT_SENT,
            "was not asked, for there are no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
        )
    found = _STATUS.search(text)
    if found is None and "MissingEtag" in text:  # written, and the answer does not say under which ETag
        return Answer(Kind.DONE)
    if found is None:
        if _NOT_CONNECTED.search(text):
            return Answer(Kind.NOT_SENT, "cannot be reached")
        return Answer(Kind.UNKNOWN, "did not answer in time" if "kind: Timeout" in text else "broke the connection off")
    return _refused(text, int(found[1]))


def _refused(text: str, status: int) -> Answer:
    """Judge an answer by its status and code."""
    code = found[1] if (found := _CODE.search(text)) else ""
    if status == 409:
        return Answer(Kind.LOST)
    if status >= 500 and status != 501:
        # Who answers may be a gateway that does not know what became of it; Ceph 16 says 500 to some who came second.
        return Answer(Kind.CONFUSED, f"answered {status} {code}".rstrip())
    if code in _REMEDIES:
        return Answer(Kind.REFUSED, _REMEDIES[code], full=code == "QuotaExceeded")
    if status in (401, 403):
        return Answer(Kind.REFUSED, f"refused the credentials ({code or status}): mend them, or permit {_RIGHTS}")
    if status in (408, 429):
        return Answer(Kind.REFUSED, "asks to slow down: try again")
    if status in (301, 307, 400) and "egion" in text:
        return Answer(Kind.REFUSED, "expects another region: add &region=… to the URL")
    return Answer(Kind.REFUSED, f"refused a request it should know ({status} {code}): is it S3?", lasting=True)
