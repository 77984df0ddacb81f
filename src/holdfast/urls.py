"""From a URL or a path to a backend: the only module that names every backend."""

from __future__ import annotations

import re
from urllib.parse import unquote

from .backends.file import FileBackend
from .backends.memory import MemoryBackend
from .contract import Backend
from .errors import InvalidInputError

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]+):")


def open_backend(url_or_path: str) -> Backend:
    """Return the backend that a URL or a path names. It is not opened yet.

    Args:
        url_or_path: ``memory:``, ``file:PATH``, ``file:///PATH`` (percent-encoded) or a plain path.

    Raises:
        InvalidInputError: It is empty or has a scheme that no backend has; the message lists those that exist.
    """
    if not url_or_path.strip():
        raise InvalidInputError(f"{url_or_path!r:.80} is not a store: give a path, file:PATH or memory:")
    found = _SCHEME.match(url_or_path)
    if found is None:
        return FileBackend(url_or_path)
    scheme, rest = found[1].lower(), url_or_path[found.end() :]
    if scheme == "memory" and not rest.strip("/"):
        return MemoryBackend()
    if scheme == "file" and rest:
        if not rest.startswith("//"):
            return FileBackend(rest)
        host, slash, path = rest[2:].partition("/")
        if slash and path and host in ("", "localhost"):
            return FileBackend("/" + unquote(path))
    # The rest may hold a password: only the scheme is repeated.
    raise InvalidInputError(
        f"{scheme!r} with what follows it names no store: use a path, file:PATH, file:///PATH or memory: "
        "(write ./name:x for a relative path with a colon)"
    )
