"""From a URL to a bucket: ``s3://BUCKET/PREFIX?endpoint=http://…&region=…``. Credentials come from the environment."""

from __future__ import annotations

import ipaddress
import math
import os
import re
from urllib.parse import parse_qsl, unquote, urlsplit

import msgspec

from ...contract import Survives
from ...errors import InvalidInputError

OPTIONS = ("endpoint", "region", "survives", "deadline_seconds")
"""What may follow after ``?``; see ``docs/backends/s3.md``."""

_FORM = "an S3 store is s3://BUCKET/PREFIX?endpoint=https://HOST&region=REGION, with credentials in the environment"
_URL = re.compile(r"[sS]3://([^/?#]*)(?:/([^?#]*))?(?:\?([^#]*))?")
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._\-]{1,62}", re.ASCII)
_PREFIX = re.compile(r"[A-Za-z0-9_\-=][A-Za-z0-9._\-=]{0,99}(?:/[A-Za-z0-9_\-=][A-Za-z0-9._\-=]{0,99}){0,7}", re.ASCII)
_REGION = re.compile(r"[A-Za-z0-9\-]{1,40}", re.ASCII)
_DECLARED = {"process": Survives.PROCESS, "host": Survives.HOST, "server": Survives.SERVER}


class Address(msgspec.Struct, frozen=True, kw_only=True):
    """Where the objects lie and what the user says of the service. Holds no credentials."""

    bucket: str
    prefix: str = "holdfast"
    endpoint: str = ""
    """Nothing for Amazon's own."""
    region: str = ""
    survives: Survives | None = None
    """What the user says that the service keeps; no protocol tells it."""
    deadline_seconds: float = 5.0

    @property
    def shown(self) -> str:
        """The address for people, errors and logs."""
        endpoint = f"?endpoint={self.endpoint}" if self.endpoint else ""
        return f"s3://{self.bucket}/{self.prefix}{endpoint}"

    @property
    def is_amazon(self) -> bool:
        """Whether it is Amazon's own service, whose durability is documented."""
        host = urlsplit(self.endpoint).hostname or ""
        return not self.endpoint or host.endswith((".amazonaws.com", ".amazonaws.com.cn"))

    @property
    def is_loopback(self) -> bool:
        """Whether the service runs on this machine."""
        host = urlsplit(self.endpoint).hostname or ""
        try:
            return ipaddress.ip_address(host).is_loopback
        except ValueError:
            return host == "localhost" or host.endswith(".localhost")

    @property
    def is_encrypted(self) -> bool:
        """Whether rows travel over TLS."""
        return not self.endpoint.startswith("http:")


def parse(url: str) -> Address:
    """Return the address that a URL names.

    Raises:
        InvalidInputError: It cannot be used. The message never repeats what may be a credential.
    """
    found = _URL.fullmatch(url)
    if found is None:
        raise InvalidInputError(_FORM)
    bucket, prefix, query = found[1], unquote(found[2] or "").strip("/"), found[3] or ""
    if "@" in bucket or ":" in bucket:
        raise InvalidInputError(
            "the URL of an S3 store holds no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    if not _BUCKET.fullmatch(bucket):
        raise InvalidInputError(f"{bucket!r:.80} is not a bucket: {_FORM}")
    if prefix and not _PREFIX.fullmatch(prefix):
        raise InvalidInputError(
            f"the prefix {prefix!r:.80} cannot be used: up to 8 parts of A-Z a-z 0-9 . _ - = with / between them, "
            "none beginning with a dot"
        )
    options = dict(parse_qsl(query, keep_blank_values=True))
    for name in options:
        if name not in OPTIONS:
            raise InvalidInputError(f"{name!r:.40} is no option of an S3 store: there are {', '.join(OPTIONS)}")
    region = options.get("region", "")
    if region and not _REGION.fullmatch(region):
        raise InvalidInputError(f"region={region!r:.60}: use a region's name, such as eu-central-1")
    return Address(
        bucket=bucket,
        prefix=prefix or "holdfast",
        endpoint=_endpoint(options.get("endpoint", "")),
        region=region,
        survives=_survives(options.get("survives", "")),
        deadline_seconds=_deadline(options.get("deadline_seconds", "5")),
    )


def _endpoint(given: str) -> str:
    """Return where the service is; what the URL leaves open is told by the environment."""
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"):
        given = given or os.environ.get(name, "")
    if not given:
        return ""
    try:
        parts = urlsplit(given)
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), None
    plain = not (parts.username or parts.password or parts.query or parts.fragment or "@" in parts.netloc)
    if parts.scheme not in ("http", "https") or not parts.hostname or not plain or port == 0:
        # Not repeated: it may hold a password.
        raise InvalidInputError("the endpoint of an S3 store is http://HOST:PORT or https://HOST, without credentials")
    return given.rstrip("/")


def _survives(given: str) -> Survives | None:
    if given and given not in _DECLARED:
        raise InvalidInputError(f"survives={given!r:.40}: say what the service keeps: {', '.join(_DECLARED)}")
    return _DECLARED.get(given)


def _deadline(given: str) -> float:
    try:
        seconds = float(given)
    except ValueError:
        seconds = math.nan
    if not 0.2 <= seconds <= 600:
        raise InvalidInputError(f"deadline_seconds={given!r:.40}: use a number from 0.2 to 600")
    return seconds
