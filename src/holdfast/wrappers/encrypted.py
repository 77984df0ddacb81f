"""Rows as ciphertext: whoever can read or write the medium learns no row, and cannot put one in another's place.

A row on the medium is one line of JSON::

    {"_encrypted":1,"key":"2026a","op":["main@9f3c",17],"nonce":"<40 characters>","data":"<base64>"}

``data`` is AES-256-GCM over the row's JSON, under a key derived from the named one and the first 18 bytes of
``nonce``; the last 12 are GCM's nonce. All 30 are an HMAC-SHA256, under a key of its own, of the associated data and
the row. So a nonce repeats only where the same op writes the same row again, which gives the same bytes again: no
counter to keep, no limit on messages that a bot could reach (2^120 of them are the birthday bound), nothing to go wrong
after a fork or on the copy of a virtual machine, and a commit that is sent again is byte for byte the same.

The associated data are format, scope, domain, entity name, entity id, key id and op, as a JSON list. The op is the one
that the medium says wrote the row, so a ciphertext under another key, in another scope or under another op is refused;
it also stands in the open, so that bytes that were moved to quarantine can still be decrypted. The row's own schema
number and checksum are inside.

What is found, and what is not
  * Found: every changed bit, truncation, a row under another key, scope or op, a plain row in an encrypted store.
  * Found with a witness only: an older state of the whole store or of a scope; an older row put back with its old op
    and version; an older row put back with a forged version, if the writer that wrote it wrote the row's newest
    state as well.
  * Not found: an older row with a version forged upwards in other cases (the version is not known when a row is
    encrypted, so the tag cannot cover it); rows that are deleted; what was put back before the witness first saw it,
    or within its lag.
  * Not hidden: keys (symbols, strategy names), sizes, times and numbers of commits, the writers' names.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import msgspec

from ..contract import MAX_PAYLOAD_BYTES, Backend, Guarantees, Head, Key, Op, Record
from ..errors import CorruptedError, InvalidInputError, LockedError, NewerFormatError
from .around import Around
from .keyring import Keyring, SecretKey
from .witness import Witness

try:
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM
except ImportError as _error:
    raise InvalidInputError("an encrypted store needs cryptography: pip install 'holdfast[encryption]'") from _error

FORMAT = 1
_SALT_BYTES = 18
_NONCE_BYTES = _SALT_BYTES + 12
_TAG_BYTES = 16
_ENVELOPE_BYTES = 2048
"""More than everything around ``data``: a writer's name has at most 250 characters, of at most 6 bytes in JSON."""
MAX_PLAIN_BYTES = (MAX_PAYLOAD_BYTES - _ENVELOPE_BYTES) // 4 * 3 - _TAG_BYTES
"""Largest payload that can be encrypted, in bytes: base64 makes it a third longer."""


class Sealed(msgspec.Struct, frozen=True):
    """A row as it lies on the medium."""

    format: int = msgspec.field(name="_encrypted")
    key: str
    op: tuple[str, int]
    nonce: bytes
    data: bytes


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Sealed).decode


class Encrypted(Around):
    """Encrypts every payload on its way down, and checks and decrypts it on its way up.

    Args:
        backend: Where the ciphertext lies. Keys and entity names stay readable there.
        keys: The first one encrypts; each decrypts what it encrypted.
        witness: A small file on this machine, out of reach of whoever can write to the store: by it, an older state
            that was put back is found. Without one it is not, and the warnings of the guarantees say so.
    """

    def __init__(self, backend: Backend, keys: Keyring, *, witness: str | os.PathLike[str] | None = None) -> None:
        super().__init__(backend)
        if not isinstance(keys, Keyring):
            raise InvalidInputError(f"the keys come as a {type(keys).__name__}: pass a Keyring")
        self.keyring = keys
        self.witness = None if witness is None else Witness(witness)
        self._shown = ""

    def __repr__(self) -> str:
        return f"Encrypted({self.backend!r}, {self.keyring!r})"

    # ------------------------------------------------------------------ the contract

    async def open(self, *, read_only: bool = False) -> Guarantees:
        """Get the keys, open what is wrapped, and compare it with the witness.

        Raises:
            InvalidInputError: The keys or the witness cannot be used.
            CorruptedError: The store stands before what the witness has seen. (Read-only this is a warning.)

        Crash: Leaves what was there; opening again finishes.
        """
        await self.keyring.load()
        promised = await self.backend.open(read_only=read_only)
        self._shown = promised.backend
        try:
            warnings = await self._open_witness(read_only=read_only)
        except BaseException:
            await self.close()
            raise
        return msgspec.structs.replace(promised, warnings=(*promised.warnings, *warnings))

    async def _open_witness(self, *, read_only: bool) -> list[str]:
        witness = self.witness
        if witness is None:
            return [
                "encrypted without a witness: an older row, or an older state of the whole store, put back by another "
                "hand is not noticed: name a local file (witness=, or HOLDFAST_WITNESS)"
            ]
        warnings = []
        if not await witness.open(self._shown, read_only=read_only):
            warnings.append(f"{witness.path} has not seen this store before: from now on, older states are noticed")
        for scope, floor in witness.scopes.items():
            head = await self.backend.head(scope)
            try:
                witness.require_head(scope, head.number, floor)
            except CorruptedError as error:
                if not read_only:
                    raise
                warnings.append(str(error))
        async for scope in self.backend.scopes():
            witness.note_head(scope, await self.backend.head(scope))
        return warnings

    async def read(self, scope: str, keys: Sequence[Key]) -> dict[Key, Record]:
        """Return the records of ``keys``, decrypted.

        Raises:
            CorruptedError: A row was changed, moved from elsewhere, or is older than one seen before; ``error.record``
                holds it as it lies on the medium, where it was left. ``error.more`` has further ones.
            LockedError: A row is encrypted under a key that the keyring lacks, or is not encrypted.
        """
        found, wrong = await self.examine(scope, keys)
        if wrong:
            wrong[0].more = tuple(wrong[1:])
            raise wrong[0]
        return {key: plain for key, (_, plain) in found.items()}

    async def examine(
        self, scope: str, keys: Sequence[Key]
    ) -> tuple[dict[Key, tuple[Record, Record]], list[CorruptedError]]:
        """Read ``keys``; return each record as it lies on the medium and decrypted, and what is wrong with the others.

        Raises:
            CorruptedError: What is wrapped found a row damaged.
        """
        witness = self.witness
        seen = {} if witness is None else witness.known(scope, keys)  # before the read: others may commit meanwhile
        good: dict[Key, tuple[Record, Record]] = {}
        wrong: list[CorruptedError] = []
        for key, record in (await self.backend.read(scope, keys)).items():
            try:
                payload = self.opened(scope, key, record)
                if key in seen and (why := Witness.why_not(record, seen[key])):
                    raise CorruptedError(f"{key}: an older row was put back: {why}", key=key)
            except CorruptedError as error:
                error.record, error.backend = record, self._shown
                wrong.append(error)
            else:
                good[key] = record, Record(payload, record.version, record.op)
        if witness is not None:
            witness.note_read(scope, {key: record for key, (record, _) in good.items()})
        return good, wrong

    async def commit(
        self, scope: str, changes: Mapping[Key, bytes | None], expect: Mapping[Key, int], *, op: Op
    ) -> int:  # fmt: skip
        """Encrypt ``changes`` and commit them; see :meth:`holdfast.contract.Backend.commit`.

        Raises:
            InvalidInputError: A payload has over :data:`MAX_PLAIN_BYTES`; nothing was changed.

        Crash: As what is wrapped.
        """
        op = Op(*op)
        sealed = {
            key: None if payload is None else self.sealed(scope, key, op, payload) for key, payload in changes.items()
        }
        number = await self.backend.commit(scope, sealed, expect, op=op)
        if self.witness is not None:
            self.witness.note_commit(scope, number, changes, op)
        return number

    async def head(self, scope: str) -> Head:
        """Return where the scope stands.

        Raises:
            CorruptedError: It stands before what the witness has seen.
        """
        if self.witness is None:
            return await self.backend.head(scope)
        floor = self.witness.floor(scope)
        head = await self.backend.head(scope)
        self.witness.require_head(scope, head.number, floor)
        self.witness.note_head(scope, head)
        return head

    async def close(self) -> None:
        """Write what the witness has seen, and close what is wrapped. Repeatable.

        Crash: As before the call: nothing acknowledged depends on close.
        """
        try:
            if self.witness is not None:
                await self.witness.close()
        finally:
            await self.backend.close()

    # ------------------------------------------------------------------ one row

    def sealed(self, scope: str, key: Key, op: Op, payload: bytes) -> bytes:
        """Return the row as it goes to the medium, under the current key. The same arguments give the same bytes.

        Raises:
            InvalidInputError: The payload is no bytes or too long, or the op cannot be used.
        """
        if type(payload) is not bytes:
            raise InvalidInputError(f"the payload of {key} is a {type(payload).__name__}: give bytes, or None")
        if len(payload) > MAX_PLAIN_BYTES:
            raise InvalidInputError(
                f"the payload of {key} has {len(payload)} bytes; at most {MAX_PLAIN_BYTES} can be stored encrypted "
                "(base64 makes it a third longer): split it"
            )
        secret = self.keyring.current
        try:
            bound = _bound(scope, key, secret.id, op)
        except (UnicodeEncodeError, OverflowError, TypeError) as error:
            raise InvalidInputError(
                f"{key!r:.200} in {scope!r:.80} under {op!r:.80} cannot be stored: {error}"
            ) from None
        nonce = secret.derive(_NONCE, bound + payload)[:_NONCE_BYTES]
        data = _cipher(secret, nonce).encrypt(nonce[_SALT_BYTES:], payload, bound)
        return _encode(Sealed(FORMAT, secret.id, (op.writer, op.n), nonce, data))

    def opened(self, scope: str, key: Key, record: Record) -> bytes:
        """Return the payload of a record of the medium.

        Raises:
            CorruptedError: It was changed, or belongs to another key, scope or op.
            LockedError: The keyring lacks its key, or it is not encrypted.
        """
        row = sealed_row(key, record.payload)
        secret = self.keyring.get(row.key)
        if secret is None:
            raise LockedError(
                f"{key}: encrypted under the key id {row.key!r:.40}, which is not among the keys "
                f"({', '.join(self.keyring.ids)}): add that key; it may follow the current one",
                key=key,
            )
        if Op(*row.op) != record.op:
            raise CorruptedError(
                f"{key}: it was encrypted for op {row.op}, but {record.op} is said to have written it: "
                "an older row, or one of another place",
                key=key,
            )
        try:
            bound = _bound(scope, key, secret.id, record.op)
            return _cipher(secret, row.nonce).decrypt(row.nonce[_SALT_BYTES:], row.data, bound)
        except InvalidTag:
            raise CorruptedError(
                f"{key}: its encryption does not verify: changed, or the row of another key, scope or op", key=key
            ) from None


_NONCE, _CIPHER = b"holdfast row nonce 1", b"holdfast row cipher 1"


def sealed_row(key: Key, payload: bytes) -> Sealed:
    """Return the parts of an encrypted row, not yet verified.

    Raises:
        LockedError: It is a plain row.
        CorruptedError: It is neither that nor an encrypted one.
        NewerFormatError: A newer version encrypted it.
    """
    try:
        row = _decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        if is_plain(payload):
            raise LockedError(
                f"{key}: not encrypted: it was put there by another hand, or `holdfast rekey --from-plain` has not "
                "reached it yet",
                key=key,
            ) from None
        raise CorruptedError(f"{key}: neither an encrypted row nor a plain one", key=key) from None
    if row.format != FORMAT:
        raise NewerFormatError(
            f"{key}: encrypted in format {row.format}; this version knows {FORMAT}: upgrade", key=key
        )
    # There is one way to write a row: what base64 and JSON leave open (blanks, spare bits, names twice) is refused too.
    if len(row.nonce) != _NONCE_BYTES or len(row.data) < _TAG_BYTES or _encode(row) != payload:
        raise CorruptedError(f"{key}: an encrypted row that was changed", key=key)
    return row


def is_plain(payload: bytes) -> bool:
    """Whether ``payload`` is JSON, but no encrypted row: a plain row, most likely."""
    try:
        msgspec.json.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False
    return b'"_encrypted"' not in payload[:64]


def _cipher(secret: SecretKey, nonce: bytes) -> AESGCM:
    return AESGCM(secret.derive(_CIPHER, nonce[:_SALT_BYTES]))


def _bound(scope: str, key: Key, key_id: str, op: Op) -> bytes:
    """Return the associated data: a JSON list, so that no two lists of parts look alike."""
    return _encode(("holdfast", FORMAT, scope, *key, key_id, *op))


__all__ = ["MAX_PLAIN_BYTES", "Encrypted", "Keyring", "Sealed", "Witness", "is_plain", "sealed_row"]
