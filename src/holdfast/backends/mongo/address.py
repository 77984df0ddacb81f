"""From a URL to where the servers are, who we are, and what the user asks of them.

``mongodb://[user[:password]@]host[:port][,host…]/DATABASE[?collection=holdfast]`` and ``mongodb+srv://…``. What else
follows after ``?`` is the driver's own (``replicaSet``, ``authSource``, ``tls``, …), but for what every call of ours
sets itself, such as ``w``: that is left out, so that a service's URL can be used as it was copied.
"""

from __future__ import annotations

import os
import re
from typing import Any
from urllib.parse import unquote

import msgspec
from pymongo.errors import PyMongoError
from pymongo.uri_parser import split_options

from ...errors import InvalidInputError

_FORM = "mongodb://user@host:port/DATABASE?collection=holdfast"
_URL = re.compile(r"(mongodb(?:\+srv)?)://(?:([^@/?#]*)@)?([^@/?#]+)/([^@/?#]+)(?:\?([^#]*))?", re.ASCII)
_HOST = re.compile(r"[A-Za-z0-9._\-]+(?::\d{1,5})?|\[[0-9A-Fa-f:.%]+\](?::\d{1,5})?")
_DATABASE = re.compile(r"[A-Za-z0-9_\-]{1,63}")
_COLLECTION = re.compile(r"(?!system\.)[A-Za-z_][A-Za-z0-9_.\-]{0,99}")
_OWN = ("collection", "deadline_seconds", "password_env")
_OURS = frozenset(
    (
        "w", "wtimeout", "wtimeoutms", "journal", "j", "fsync", "retrywrites", "retryreads", "readconcernlevel",
        "readpreference", "readpreferencetags", "maxstalenessseconds", "timeoutms", "sockettimeoutms", "appname",
        "connecttimeoutms", "serverselectiontimeoutms", "waitqueuetimeoutms", "unicode_decode_error_handler",
        "tz_aware", "uuidrepresentation", "datetime_conversion",
    )
)  # fmt: skip
"""Options of the driver that each call of ours, or each connection, sets itself."""


class Address(msgspec.Struct, frozen=True, kw_only=True):
    """Where the servers are and how to talk to them."""

    uri: str
    """For the driver, without credentials; it may hold the options' secrets."""
    hosts: str
    scheme: str
    database: str
    collection: str
    username: str = ""
    password: str = ""
    deadline_seconds: float = 5.0

    def __repr__(self) -> str:
        return f"Address({self.shown})"

    @property
    def shown(self) -> str:
        """The address without credentials, for people, errors and logs."""
        return f"{self.scheme}://{self.hosts}/{self.database}?collection={self.collection}"

    def credentials(self) -> dict[str, Any]:
        """Return what the driver is given beside the URI."""
        given = {"username": self.username, "password": self.password}
        return {name: value for name, value in given.items() if value}


def parse(url: str) -> Address:
    """Return the address that a URL names.

    Raises:
        InvalidInputError: It cannot be used. The message never repeats it: it may hold a password.
    """
    found = _URL.fullmatch(url)
    if found is None:
        raise InvalidInputError(f"a MongoDB store is {_FORM} (in a password, write %40 for @ and the like)")
    scheme, user, hosts, database, query = found.groups()
    words = [word.partition("=") for word in (query or "").split("&") if word]
    own = {name: unquote(value) for name, _, value in words if name in _OWN}
    rest = ["".join(word) for word in words if word[0] not in _OWN and word[0].lower() not in _OURS]
    name, _, password = (user or "").partition(":")
    _require_hosts(hosts, scheme)
    _require_options(rest)
    if not _DATABASE.fullmatch(database):
        raise InvalidInputError(f"the database of a MongoDB store is 1 to 63 characters from A-Z a-z 0-9 _ -: {_FORM}")
    collection = own.get("collection", "holdfast")
    if not _COLLECTION.fullmatch(collection):
        raise InvalidInputError(
            f"collection={collection!r:.80}: use 1 to 100 characters from A-Z a-z 0-9 _ . -, beginning with a letter "
            "or _, and not with system."
        )
    return Address(
        uri=f"{scheme}://{hosts}/{database}" + ("?" + "&".join(rest) if rest else ""),
        hosts=hosts,
        scheme=scheme,
        database=database,
        collection=collection,
        username=unquote(name),
        password=_secret(own.get("password_env", "")) or unquote(password),
        deadline_seconds=_deadline(own.get("deadline_seconds", "5")),
    )


def _require_hosts(hosts: str, scheme: str) -> None:
    for host in hosts.split(","):
        port = re.search(r":(\d+)$", host) if not host.endswith("]") else None
        if not _HOST.fullmatch(host) or (port is not None and not 0 < int(port[1]) < 65536):
            raise InvalidInputError("the host of a MongoDB store is NAME or NAME:PORT (IPv6 in brackets)")
    if scheme == "mongodb+srv" and not re.fullmatch(r"[A-Za-z0-9_\-]+(\.[A-Za-z0-9_\-]+)+", hosts):
        raise InvalidInputError("mongodb+srv:// takes one host name with its domain, and no port")


def _require_options(words: list[str]) -> None:
    """Refuse what the driver does not take, one option at a time, so that the message can name it."""
    for word in words:
        name = word.partition("=")[0]
        try:
            split_options(word, validate=True, warn=False)
        except (PyMongoError, ValueError, TypeError, OSError):
            # Without the cause, which may repeat a value.
            raise InvalidInputError(
                f"{name!r:.40} is no option of a MongoDB store, or its value cannot be used: there are "
                f"{', '.join(_OWN)}, and what the driver takes in a URL"
            ) from None
    try:
        split_options("&".join(words), validate=True, warn=False) if words else None
    except (PyMongoError, ValueError):
        raise InvalidInputError("the options after ? contradict each other") from None


def _secret(variable: str) -> str:
    if not variable:
        return ""
    value = os.environ.get(variable)
    if not value:
        raise InvalidInputError(f"password_env={variable[:60]!r}: the environment has no such variable: set it")
    return value


def _deadline(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0.2 <= seconds <= 60:
        raise InvalidInputError(f"deadline_seconds={text!r:.40}: use a number from 0.2 to 60")
    return seconds
