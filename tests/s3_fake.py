"""A service that speaks S3 as badly as it is told to: ``async with FakeS3("looks-then-makes") as fake: … fake.port …``.

A stand-in, in memory, for what no server that can be had here does on demand. ``looks-then-makes`` looks for
the object and makes it in two steps: in turn it refuses a second creator, at once it lets several win.
"""

from __future__ import annotations

import asyncio
import hashlib
from typing import Literal, NamedTuple
from urllib.parse import parse_qs, unquote

Quirk = Literal[
    "ignores-if-match",
    "ignores-if-none-match",
    "ignores-all-conditions",
    "looks-then-makes",
    "looks-then-replaces",
    "wants-etags-unquoted",
    "refuses-if-match",
    "shows-old-objects",
    "gives-no-etag",
    "has-no-conditions",
    "keeps-versions",
    "says-409-to-losers",
    "says-500-to-rivals",
    "forbids",
    "has-no-bucket",
    "is-down",
]
_LOOK_SECONDS = 0.01


class Stored(NamedTuple):
    """One object."""

    etag: str
    body: bytes


class FakeS3:
    """Holds objects of one bucket, whatever its name.

    Args:
        quirks: What is wrong with it; nothing, by default.
    """

    def __init__(self, *quirks: Quirk) -> None:
        self.quirks: set[Quirk] = set(quirks)
        self.objects: dict[str, Stored] = {}
        self.before: dict[str, Stored] = {}
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        """Method, path within the bucket and headers of each."""
        self.port = 0
        self._listener: asyncio.Server | None = None
        self._links: dict[asyncio.Task[None], asyncio.StreamWriter] = {}
        self._busy: set[str] = set()
        """Objects whose new state is stored and not answered for yet."""

    async def __aenter__(self) -> FakeS3:
        self._listener = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._listener.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._listener is not None
        self._listener.close()
        for writer in self._links.values():
            writer.transport.abort()
        await asyncio.gather(*self._links, return_exceptions=True)
        await self._listener.wait_closed()

    def url(self, prefix: str = "holdfast", *more: str) -> str:
        """Return a store on it."""
        return f"s3://bucket/{prefix}?{'&'.join((f'endpoint=http://127.0.0.1:{self.port}', 'region=us-east-1', *more))}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._links[task] = writer
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                first, *lines = head.decode().split("\r\n")[:-2]
                headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
                body = await reader.readexactly(int(headers.get("content-length", "0")))
                method, target, _ = first.split(" ")
                status, more, content = await self._answer(method, target, headers, body)
                lines = [f"HTTP/1.1 {status} X", f"content-length: {len(content)}", *more]
                lines.append("last-modified: Wed, 21 Oct 2015 07:28:00 GMT")
                writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + (b"" if method == "HEAD" else content))
                await writer.drain()
        except (asyncio.IncompleteReadError, OSError):
            pass  # the client has gone
        finally:
            del self._links[task]
            writer.transport.abort()

    async def _answer(
        self, method: str, target: str, headers: dict[str, str], body: bytes
    ) -> tuple[int, list[str], bytes]:
        place, _, query = target.partition("?")
        path = unquote(place).partition("bucket/")[2] if "bucket/" in place else ""
        self.requests.append((method, path, headers))
        if "forbids" in self.quirks:
            return 403, [], _error("AccessDenied", f"<AWSAccessKeyId>{headers.get('authorization')}</AWSAccessKeyId>")
        if "has-no-bucket" in self.quirks:
            return 404, [], _error("NoSuchBucket")
        if "is-down" in self.quirks:
            return 503, [], _error("ServiceUnavailable")
        match method:
            case "PUT":
                return await self._put(path, headers, body)
            case "DELETE":
                self.objects.pop(path, None)
                return 204, [], b""
            case _ if path:
                return self._get(path, headers)
            case _:
                return 200, [], self._list(parse_qs(query).get("prefix", [""])[0])

    def _get(self, path: str, headers: dict[str, str]) -> tuple[int, list[str], bytes]:
        found = self.objects.get(path)
        if "shows-old-objects" in self.quirks:
            found = self.before.get(path, found)
        if found is None:
            return 404, [], _error("NoSuchKey")
        if headers.get("if-none-match") == found.etag:
            return 304, [f"etag: {found.etag}"], b""
        return 200, [f"etag: {found.etag}"], found.body

    async def _put(self, path: str, headers: dict[str, str], body: bytes) -> tuple[int, list[str], bytes]:
        match, none_match = headers.get("if-match"), headers.get("if-none-match")
        if (match or none_match) and "has-no-conditions" in self.quirks:
            return 501, [], _error("NotImplemented")
        found = self.objects.get(path)
        etag = found.etag if found else ""
        if "wants-etags-unquoted" in self.quirks:
            etag = etag.strip('"')
        lost = (match is not None and (match != etag or "refuses-if-match" in self.quirks)) or (
            none_match is not None and found is not None
        )
        ignored = "ignores-if-none-match" if none_match else "ignores-if-match"
        if lost and not self.quirks & {ignored, "ignores-all-conditions"}:
            if "says-500-to-rivals" in self.quirks and path in self._busy:
                return 500, [], _error("UnknownError")
            if "says-409-to-losers" in self.quirks:
                return 409, [], _error("ConditionalRequestConflict")
            return 412, [], _error("PreconditionFailed")
        if ("looks-then-makes" if none_match else "looks-then-replaces") in self.quirks:
            await asyncio.sleep(_LOOK_SECONDS)  # the others look meanwhile
        if path in self.objects:
            self.before[path] = self.objects[path]
        stored = self.objects[path] = Stored(f'"{hashlib.md5(body).hexdigest()}"', body)
        if "says-500-to-rivals" in self.quirks:
            self._busy.add(path)
            await asyncio.sleep(_LOOK_SECONDS)
            self._busy.discard(path)
        more = [] if "gives-no-etag" in self.quirks else [f"etag: {stored.etag}"]
        if "keeps-versions" in self.quirks:
            more.append("x-amz-version-id: v1")
        return 200, more, b""

    def _list(self, prefix: str) -> bytes:
        names = [path for path in sorted(self.objects) if path.startswith(prefix) and "/" not in path[len(prefix) :]]
        entries = "".join(
            f"<Contents><Key>{name}</Key><LastModified>2015-10-21T07:28:00.000Z</LastModified>"
            f'<ETag>"x"</ETag><Size>{len(self.objects[name].body)}</Size></Contents>'
            for name in names
        )
        return f"<ListBucketResult><IsTruncated>false</IsTruncated>{entries}</ListBucketResult>".encode()


def _error(code: str, more: str = "") -> bytes:
    return f"<Error><Code>{code}</Code><Message>canary-in-the-answer</Message>{more}</Error>".encode()
