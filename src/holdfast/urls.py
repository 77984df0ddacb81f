"""From a URL or a path to a backend: the only module that names every backend."""

from __future__ import annotations

import re
from urllib.parse import unquote

from .backends.file import FileBackend
from .backends.memory import MemoryBackend
from .contract import Backend
from .errors import InvalidInputError

_KNOWN = "file:PATH, file:///PATH, sqlite:PATH, redis://HOST, postgresql://HOST/DATABASE, memory:"
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]+):")


def open_backend(url_or_path: str) -> Backend:
    """Return the backend that a URL or a path names. It is not opened yet.

    Args:
        url_or_path: ``memory:``, ``file:PATH``, ``file:///PATH`` (percent-encoded) or a plain path; ``sqlite:PATH``;
            ``redis://…`` (also ``rediss``, ``+sentinel``, ``+cluster``); ``postgresql://…``. Each driver is imported
            only here, when it is asked for.

    Raises:
        InvalidInputError: It is empty or has a scheme that no backend has; the message lists those that exist.
    """
    if not url_or_path.strip():
        raise InvalidInputError(f"{url_or_path!r:.80} is not a store: give a path, or one of {_KNOWN}")
    found = _SCHEME.match(url_or_path)
    if found is None:
        return FileBackend(url_or_path)
    scheme, rest = found[1].lower(), url_or_path[found.end() :]
    if scheme == "memory" and not rest.strip("/"):
        return MemoryBackend()
    if scheme in ("file", "sqlite") and (path := _path(rest)):
        if scheme == "file":
            return FileBackend(path)
        from .backends.sqlite import SqliteBackend

        return SqliteBackend(path)
    if scheme.partition("+")[0] in ("redis", "rediss"):
        from .backends.redis import RedisBackend

        return RedisBackend(url_or_path)
    if scheme in ("postgresql", "postgres"):
        from .backends.postgres import PostgresBackend

        return PostgresBackend(url_or_path)
    # The rest may hold a password: only the scheme is repeated.
    raise InvalidInputError(
        f"{scheme!r} with what follows it names no store: give a path, or one of {_KNOWN} "
        "(write ./name:x for a relative path with a colon)"
    )


def _path(rest: str) -> str:
    """Return the path that follows ``file:`` or ``sqlite:``, or nothing where there is none on this machine."""
    if not rest.startswith("//"):
        return rest
    host, slash, path = rest[2:].partition("/")
    return "/" + unquote(path) if slash and path and host in ("", "localhost") else ""
