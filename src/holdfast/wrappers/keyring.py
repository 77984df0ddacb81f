"""The keys that encrypt rows: where they come from, and what is derived from them.

Key material is in no message, log or ``repr`` of ours; keys are spoken of by their ids. (Python cannot wipe memory: who
can read the process's memory, or its environment, has the keys.)
"""

from __future__ import annotations

import base64
import binascii
import hmac
import inspect
import os
import re
import secrets
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime

from ..cancellation import no_stray_cancellation
from ..errors import FailedError, HoldfastError, InvalidInputError, UnavailableError

KEY_BYTES = 32
ENVIRONMENT = "HOLDFAST_KEYS"
Given = Mapping[str, bytes] | str
"""Keys by id, the current one first; or the text ``id=base64,id=base64``."""
Source = Given | Callable[[], Given | Awaitable[Given]]

_ID = re.compile(r"[A-Za-z0-9._-]{1,32}")
_HOW = "`holdfast rekey --new-key` makes one"


class SecretKey:
    """One key: its id, and what is derived from its 32 bytes."""

    __slots__ = ("_material", "id")

    def __init__(self, key_id: str, material: bytes) -> None:
        self.id = key_id
        self._material = material

    def __repr__(self) -> str:
        return f"SecretKey({self.id})"

    def derive(self, purpose: bytes, data: bytes = b"") -> bytes:
        """Return 32 bytes that only the holder of the key can tell: HMAC-SHA256 of a purpose and ``data``."""
        return hmac.digest(self._material, purpose + b"\0" + data, "sha256")

    def same_as(self, other: SecretKey) -> bool:
        """Whether both have the same bytes."""
        return hmac.compare_digest(self._material, other._material)


class Keyring:
    """The keys of a store: the first one encrypts, each decrypts what it encrypted.

    Args:
        keys: 32 bytes for each key id, the current key first; or the text ``id=base64,id=base64``; or a function, sync
            or async, that returns either: it is called at each open. Ids are 1 to 32 characters from
            ``A-Z a-z 0-9 . _ -``; they can be read on the medium.

    Raises:
        InvalidInputError: An id or a key cannot be used; the message tells which, and shows no key.
    """

    def __init__(self, keys: Source) -> None:
        self._source = keys if callable(keys) else None
        self._keys: dict[str, SecretKey] = {}
        if not callable(keys):
            try:
                self._keys = _usable(keys, "the keyring")
            finally:
                del keys  # a traceback may show the locals of its frames

    @classmethod
    def from_env(cls, name: str = ENVIRONMENT) -> Keyring:
        """Return the keys of an environment variable, ``id=base64,id=base64``, the current one first.

        Raises:
            InvalidInputError: It is not set, or cannot be used; the message shows no key.
        """
        if not os.environ.get(name, "").strip():
            raise InvalidInputError(f"{name} is not set: an encrypted store needs id=base64[,id=base64]; {_HOW}")
        ring = cls({})
        ring._keys = _usable(os.environ[name], name)
        return ring

    def __repr__(self) -> str:
        if not self._keys:
            return "Keyring(not loaded)"
        return f"Keyring({', '.join(self._keys)}; current: {self.current.id})"

    async def load(self) -> None:
        """Ask the function for the keys, if they come from one.

        Raises:
            UnavailableError: It failed; its error is the cause.
            InvalidInputError: What it returned cannot be used.
        """
        if self._source is None:
            if not self._keys:
                raise InvalidInputError(f"the keyring is empty: give at least one key; {_HOW}")
            return
        try:
            with no_stray_cancellation:
                given = self._source()
                if inspect.isawaitable(given):
                    given = await given
        except HoldfastError:
            raise
        except Exception as error:
            raise UnavailableError(f"the function that returns the keys failed: {type(error).__name__}") from error
        try:
            self._keys = _usable(given, "what the function for the keys returned")
        finally:
            del given

    @property
    def current(self) -> SecretKey:
        """The key that encrypts."""
        if not self._keys:
            raise FailedError("the keys were not loaded yet: open the store first")
        return next(iter(self._keys.values()))

    @property
    def ids(self) -> tuple[str, ...]:
        """The key ids, the current one first."""
        return tuple(self._keys)

    def get(self, key_id: str) -> SecretKey | None:
        """Return the key with this id, or None."""
        return self._keys.get(key_id)


def new_entry() -> str:
    """Return a fresh random key as ``id=base64``, for :data:`ENVIRONMENT`; its id is the day and four random digits."""
    key_id = f"{datetime.now(UTC):%Y%m%d}-{secrets.token_hex(2)}"
    return f"{key_id}={base64.b64encode(secrets.token_bytes(KEY_BYTES)).decode()}"


def _usable(given: Given, where: str) -> dict[str, SecretKey]:
    """Return the keys, or refuse them. No frame that raises holds key material: tracebacks may show locals."""
    keys, complaint = _parsed(given) if isinstance(given, str) else _checked(given)
    if complaint:
        del given, keys
        raise InvalidInputError(f"{where}: {complaint}")
    return keys


def _parsed(text: str) -> tuple[dict[str, SecretKey], str]:
    found: dict[str, bytes] = {}
    for number, entry in enumerate(text.strip().strip(",").split(","), 1):
        key_id, _, value = entry.strip().partition("=")
        if not value or not _ID.fullmatch(key_id):
            # Not repeated: where the id was forgotten, what stands there is the key.
            return {}, f"entry {number} is not id=base64, with an id of 1 to 32 characters A-Z a-z 0-9 . _ -"
        if key_id in found:
            return {}, f"the key id {key_id!r} stands twice: give each key an id of its own"
        try:
            found[key_id] = base64.b64decode(value, validate=True)
        except binascii.Error:
            return {}, f"the key {key_id!r} is not base64: {_HOW}"
    return _checked(found)


def _checked(given: object) -> tuple[dict[str, SecretKey], str]:
    if not isinstance(given, Mapping):
        return {}, f"keys come as a mapping from id to {KEY_BYTES} bytes, or as text; not as {type(given).__name__}"
    keys: dict[str, SecretKey] = {}
    for number, (key_id, material) in enumerate(given.items(), 1):
        if not isinstance(key_id, str) or not _ID.fullmatch(key_id):
            return {}, f"the id of key {number} must be 1 to 32 characters from A-Z a-z 0-9 . _ -"
        if not isinstance(material, bytes) or len(material) != KEY_BYTES:
            size = f"{len(material)} bytes" if isinstance(material, bytes) else f"a {type(material).__name__}"
            return {}, f"the key {key_id!r} is {size}: AES-256 takes {KEY_BYTES} bytes; {_HOW}"
        key = SecretKey(key_id, material)
        for other in keys.values():
            if key.same_as(other):
                return {}, f"the keys {other.id!r} and {key_id!r} are the same: remove one"
        keys[key_id] = key
    return keys, ""
