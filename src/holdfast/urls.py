"""From a store's name to a backend: the only module that names every backend and every wrapper.

A name is a path or a URL; prefixes before it put wrappers around it, and several URLs separated by blanks are copies::

    traced+encrypted+redis://one postgresql://two/db s3://three/bot quorum=2

Messages never repeat a URL: it may hold a password.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

from .backends.file import FileBackend
from .backends.memory import MemoryBackend
from .contract import Backend
from .errors import InvalidInputError

_KNOWN = (
    "file:PATH, file:///PATH, sqlite:PATH, redis://HOST, postgresql://HOST/DATABASE, mongodb://HOST/DATABASE, "
    "s3://BUCKET/PREFIX, memory:"
)
_SCHEMES = ("memory", "file", "sqlite", "redis", "rediss", "postgresql", "postgres", "mongodb", "s3")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]+):")

WRAPPERS = ("traced", "cached", "encrypted", "retrying")
"""The prefixes that there are, outermost first; whoever writes them in another order gets this one."""

_PREFIX = re.compile(r"([A-Za-z]+)\+(?=[A-Za-z./~]|$)")
_BLANK = re.compile(r"\s+(?=quorum=|(?:file|sqlite|memory):|[A-Za-z][A-Za-z0-9+.\-]*://)")
_LOCAL = ("memory", "file", "sqlite")


class StoreName(NamedTuple):
    """What a store's name says."""

    wrappers: frozenset[str]
    """Of :data:`WRAPPERS`."""
    places: tuple[str, ...]
    """The path or URL of each copy, the one that decides first; mostly one."""
    quorum: int | None
    """How many copies a commit must reach, if the name says so."""

    @property
    def in_memory(self) -> bool:
        """Whether it keeps nothing, and was asked for by that name."""
        return all(_scheme(place) == "memory" for place in self.places)

    @property
    def folders(self) -> tuple[str | None, ...]:
        """For each place its folder, if it is a file store; else None."""
        return tuple(_folder(place) for place in self.places)


def parse_store(name: str) -> StoreName:
    """Return what a store's name says; nothing is opened, and no driver is imported.

    Raises:
        InvalidInputError: It cannot be read; the message names the part and the remedy, and repeats no URL.
    """
    if not name.strip():
        raise InvalidInputError(f"{name!r:.80} is not a store: give a path, or one of {_KNOWN}")
    first, *words = _BLANK.split(name.strip() if _SCHEME.match(name.strip()) else name)
    wrappers, first = _prefixes(first)
    if not first:
        raise InvalidInputError(f"no store stands behind {wrappers[-1]}+: give a path, or one of {_KNOWN}")
    quorums = [word for word in words if word.startswith("quorum=")]
    places = (first, *(word for word in words if not word.startswith("quorum=")))
    for place in places:
        _require_place(place, alone=len(places) == 1)
    for place in places[1:]:
        if _PREFIX.match(place) and _scheme(place).partition("+")[0] in WRAPPERS:
            raise InvalidInputError(
                f"{_scheme(place)!r}: prefixes stand before the first copy, where they wrap all of them together"
            )
    if len({_identity(place) for place in places}) < len(places):
        raise InvalidInputError("two of the copies are the same place: a copy must be a place of its own")
    return StoreName(frozenset(wrappers), places, _quorum(quorums, len(places)))


def open_backend(url_or_path: str) -> Backend:
    """Return the backend that a store's name stands for, with its wrappers. It is not opened yet.

    Args:
        url_or_path: ``memory:``, ``file:PATH``, ``file:///PATH`` (percent-encoded) or a plain path; ``sqlite:PATH``;
            ``redis://…`` (also ``rediss``, ``+sentinel``, ``+cluster``); ``postgresql://…``;
            ``mongodb://…`` (also ``mongodb+srv``). Each driver is imported only here, when it is asked for. Before it
            ``traced+``, ``cached+``, ``encrypted+``, ``retrying+``; behind it, after blanks, further URLs that are
            copies, and ``quorum=N``.

    Raises:
        InvalidInputError: It is empty or has a scheme or prefix that does not exist; the message lists those that do.
    """
    name = parse_store(url_or_path)
    copies = [_backend(place) for place in name.places]
    if not name.wrappers and len(copies) == 1:
        return copies[0]
    from .wrappers.stack import keys_from_environment, stack

    return stack(
        *copies,
        quorum=name.quorum,
        retrying="retrying" in name.wrappers,
        keys=keys_from_environment() if "encrypted" in name.wrappers else None,
        witness=(os.environ.get("HOLDFAST_WITNESS") or None) if "encrypted" in name.wrappers else None,
        cached="cached" in name.wrappers,
        traced="traced" in name.wrappers,
    )


def _backend(place: str) -> Backend:
    found = _SCHEME.match(place)
    if found is None:
        return FileBackend(place)
    scheme, rest = found[1].lower(), place[found.end() :]
    if scheme == "memory" and not rest.strip("/"):
        return MemoryBackend()
    if scheme in ("file", "sqlite") and (path := _path(rest)):
        if scheme == "file":
            return FileBackend(path)
        from .backends.sqlite import SqliteBackend

        return SqliteBackend(path)
    if scheme.partition("+")[0] in ("redis", "rediss"):
        from .backends.redis import RedisBackend

        return RedisBackend(place)
    if scheme in ("postgresql", "postgres"):
        from .backends.postgres import PostgresBackend

        return PostgresBackend(place)
    if scheme in ("mongodb", "mongodb+srv"):
        from .backends.mongo import MongoBackend

        return MongoBackend(place)
    if scheme == "s3":
        from .backends.s3 import S3Backend

        return S3Backend(place)
    # The rest may hold a password: only the scheme is repeated.
    raise InvalidInputError(
        f"{scheme!r} with what follows it names no store: give a path, or one of {_KNOWN} "
        "(write ./name:x for a relative path with a colon)"
    )


def _prefixes(text: str) -> tuple[list[str], str]:
    """Split a name's first word into its prefixes and the path or URL behind them."""
    found: list[str] = []
    while (prefix := _PREFIX.match(text)) and (word := prefix[1].lower()) not in _SCHEMES:
        if word not in WRAPPERS:
            if _SCHEME.match(text) is None and text[prefix.end() : prefix.end() + 1] not in ("", ".", "/", "~"):
                break  # a folder whose name holds a plus sign
            raise InvalidInputError(
                f"there is no wrapper {word!r:.40}: there are {', '.join(f'{one}+' for one in WRAPPERS)} "
                "(write ./name+x for a relative path with a plus sign)"
            )
        if word in found:
            raise InvalidInputError(f"the prefix {word}+ stands twice: once is enough")
        found.append(word)
        text = text[prefix.end() :]
    return found, text


def _require_place(place: str, *, alone: bool) -> None:
    scheme = _scheme(place)
    if scheme and scheme not in _LOCAL and re.search(r"\s", place):
        raise InvalidInputError(
            f"there is a blank in the {scheme!r} URL: write %20 for it, or file:PATH for a copy that is a folder"
        )
    if scheme == "memory" and not alone:
        raise InvalidInputError("memory: cannot be a copy: it is gone with the process, and a copy must outlive it")


def _quorum(words: list[str], copies: int) -> int | None:
    if not words:
        return None
    number = words[0].removeprefix("quorum=")
    if len(words) > 1:
        raise InvalidInputError("quorum= stands twice: give one number")
    if copies == 1:
        raise InvalidInputError("quorum= has no meaning without copies: name them, separated by blanks")
    if not (number.isascii() and number.isdecimal()) or not 1 <= int(number[:9]) <= copies:
        raise InvalidInputError(f"quorum={number:.20} is out of range: there are {copies} copies, give 1 to {copies}")
    return int(number)


def _scheme(place: str) -> str:
    found = _SCHEME.match(place)
    return found[1].lower() if found else ""


def _folder(place: str) -> str | None:
    scheme = _scheme(place)
    if scheme not in ("", "file"):
        return None
    return (_path(place[5:]) if scheme else place) or None


def _identity(place: str) -> str:
    """Return what tells two places apart: an absolute path, or the URL without user and password."""
    scheme = _scheme(place)
    if scheme in ("", "file", "sqlite"):
        path = _path(place[len(scheme) + 1 :]) if scheme else place
        return f"{scheme or 'file'}:{Path(path).absolute()}"
    _, _, rest = place.partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}://{host.rpartition('@')[2].lower()}{slash}{path}"


def _path(rest: str) -> str:
    """Return the path that follows ``file:`` or ``sqlite:``, or nothing where there is none on this machine."""
    if not rest.startswith("//"):
        return rest
    host, slash, path = rest[2:].partition("/")
    return "/" + unquote(path) if slash and path and host in ("", "localhost") else ""
