"""From a URL to where the servers are, who we are, and what the user asks of them.

``redis://[user[:password]@]host[:port][/db]``, ``rediss://…`` (TLS), ``redis+sentinel://host:port,host:port/service[/db]``
and ``redis+cluster://host:port,host:port``; ``rediss+sentinel`` and ``rediss+cluster`` with TLS. Options follow after
``?``; :data:`OPTIONS` names them.
"""

from __future__ import annotations

import os
import re
from typing import Literal
from urllib.parse import parse_qsl, unquote

import msgspec

from ...errors import InvalidInputError

OPTIONS = (
    "prefix",
    "replicas",
    "deadline_seconds",
    "username",
    "password_env",
    "sentinel_username",
    "sentinel_password_env",
    "tls_ca_file",
    "tls_cert_file",
    "tls_key_file",
)
"""What may follow after ``?``; see ``docs/backends/redis.md``."""

_URL = re.compile(
    r"(redis|rediss)(\+sentinel|\+cluster)?://(?:([^@/?#]*)@)?([^/?#]*)(/[^?#]*)?(?:\?([^#]*))?", re.ASCII
)
_PREFIX = re.compile(r"[A-Za-z0-9._:\-]{1,64}")
_HOST = re.compile(r"[A-Za-z0-9._\-]+|\[[0-9A-Fa-f:.%]+\]")


class Address(msgspec.Struct, frozen=True, kw_only=True):
    """Where the servers are and how to talk to them."""

    kind: Literal["single", "sentinel", "cluster"]
    hosts: tuple[tuple[str, int], ...]
    service: str = ""
    """What the Sentinels call the group of servers."""
    db: int = 0
    username: str = ""
    password: str = ""
    sentinel_username: str = ""
    sentinel_password: str = ""
    tls: bool = False
    tls_ca_file: str = ""
    tls_cert_file: str = ""
    tls_key_file: str = ""
    prefix: str = "holdfast"
    replicas: int = 0
    deadline_seconds: float = 5.0

    def __repr__(self) -> str:
        return f"Address({self.shown})"

    @property
    def shown(self) -> str:
        """The address without credentials, for people, errors and logs."""
        scheme = ("rediss" if self.tls else "redis") + ("" if self.kind == "single" else f"+{self.kind}")
        hosts = ",".join(f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in self.hosts)
        path = "/".join(part for part in ("", self.service, str(self.db) if self.db else "") if part)
        return f"{scheme}://{hosts}/{path}?prefix={self.prefix}"


def parse(url: str) -> Address:
    """Return the address that a URL names.

    Raises:
        InvalidInputError: It cannot be used. The message never repeats it: it may hold a password.
    """
    found = _URL.fullmatch(url)
    if found is None:
        raise InvalidInputError("a Redis store is redis://[user:password@]host[:port][/db][?prefix=holdfast]")
    scheme, kind, user, hosts, path, query = found.groups()
    options = _options(query or "")
    name, _, password = (user or "").partition(":")
    service, db = _place(kind or "", path or "")
    return Address(
        kind={"+sentinel": "sentinel", "+cluster": "cluster"}.get(kind or "", "single"),  # type: ignore[arg-type]
        hosts=_hosts(hosts, 26379 if kind == "+sentinel" else 6379, many=bool(kind)),
        service=service,
        db=db,
        username=options.get("username") or unquote(name),
        password=_secret(options, "password_env") or unquote(password),
        sentinel_username=options.get("sentinel_username", ""),
        sentinel_password=_secret(options, "sentinel_password_env"),
        tls=scheme == "rediss",
        tls_ca_file=options.get("tls_ca_file", ""),
        tls_cert_file=options.get("tls_cert_file", ""),
        tls_key_file=options.get("tls_key_file", ""),
        prefix=_prefix(options.get("prefix", "holdfast")),
        replicas=int(_number(options, "replicas", 0, 0, 100)),
        deadline_seconds=_number(options, "deadline_seconds", 5.0, 0.05, 600),
    )


def _options(query: str) -> dict[str, str]:
    options = dict(parse_qsl(query, keep_blank_values=True))
    for name in options:
        if name not in OPTIONS:
            raise InvalidInputError(f"{name!r:.40} is no option of a Redis store: there are {', '.join(OPTIONS)}")
    return options


def _secret(options: dict[str, str], name: str) -> str:
    variable = options.get(name, "")
    if not variable:
        return ""
    value = os.environ.get(variable)
    if not value:
        raise InvalidInputError(f"{name}={variable[:60]!r}: the environment has no such variable: set it")
    return value


def _prefix(prefix: str) -> str:
    # Braces would move the hash tag, blanks and stars would make the keys hard to name.
    if not _PREFIX.fullmatch(prefix):
        raise InvalidInputError(f"prefix={prefix!r:.80}: use 1 to 64 characters from A-Z a-z 0-9 . _ : -")
    return prefix


def _number(options: dict[str, str], name: str, default: float, low: float, high: float) -> float:
    text = options.get(name)
    if text is None:
        return default
    try:
        value = int(text) if isinstance(default, int) else float(text)
    except ValueError:
        value = -1
    if not low <= value <= high:
        raise InvalidInputError(f"{name}={text!r:.40}: use a number from {low:g} to {high:g}")
    return value


def _place(kind: str, path: str) -> tuple[str, int]:
    """Return the Sentinels' service and the database number that the URL's path holds."""
    parts = [unquote(part) for part in path.split("/") if part]
    service = ""
    if kind == "+sentinel":
        if not parts:
            raise InvalidInputError("redis+sentinel:// needs the service's name: redis+sentinel://host:port/service")
        service = parts.pop(0)
    if not parts:
        return service, 0
    if len(parts) > 1 or not parts[0].isdecimal() or (kind == "+cluster" and parts[0] != "0"):
        raise InvalidInputError("after the host comes the number of the database, such as /0 (a cluster has only 0)")
    return service, int(parts[0])


def _hosts(text: str, default_port: int, *, many: bool) -> tuple[tuple[str, int], ...]:
    hosts = []
    for part in text.split(",") if text else ["localhost"]:
        host, colon, port = part.rpartition(":") if re.search(r":\d+$", part) else (part, "", "")
        if not _HOST.fullmatch(host) or (colon and not 0 < int(port) < 65536):
            raise InvalidInputError("the host of a Redis store is NAME or NAME:PORT (IPv6 in brackets)")
        hosts.append((host.strip("[]"), int(port) if colon else default_port))
    if len(hosts) > 1 and not many:
        raise InvalidInputError("several hosts need redis+sentinel:// or redis+cluster://")
    return tuple(hosts)
