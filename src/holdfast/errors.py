"""What can be raised. Each class answers one question: what may the caller do now?

Every error that leaves the library is a :class:`HoldfastError`. The key, the
backend and the cause ride along where they are known; messages never hold a
row, a password or key material.
"""

from __future__ import annotations

from collections.abc import Iterable


class HoldfastError(Exception):
    """Base of every error of the library.

    Args:
        message: One sentence that names the value and the remedy.
        key: The storage key concerned, if one is.
        backend: The backend concerned, such as ``"file:./dump/data"``.
    """

    def __init__(self, message: str, *, key: object = None, backend: str | None = None) -> None:
        super().__init__(message)
        self.key = key
        self.backend = backend


class InvalidInputError(HoldfastError, ValueError):
    """The caller passed a value that cannot be used; nothing was written. Mend the value."""


class NotFoundError(HoldfastError, LookupError):
    """There is no such row. Write one, or ask ``has_value`` first."""


class ConflictError(HoldfastError):
    """Another commit came first; nothing was written. Read again, then decide again.

    Args:
        keys: The keys whose version was not the expected one.
    """

    def __init__(self, message: str, *, keys: Iterable[object] = (), backend: str | None = None) -> None:
        self.keys = tuple(keys)
        super().__init__(message, key=self.keys[0] if self.keys else None, backend=backend)


class UnavailableError(HoldfastError):
    """The store cannot be used now and nothing was written. Try again later."""


class FullError(UnavailableError):
    """There is no room where the store writes, and nothing was written. Make room, then try again."""


class HeldError(UnavailableError):
    """Another live process holds the store. End that process (the message names it), then open again."""


class UnknownOutcomeError(HoldfastError):
    """The write may or may not have been applied. Send the same op with the same ``expect`` again."""


class CorruptedError(HoldfastError):
    """Stored bytes are damaged, foreign or of a newer format. Stop this key; its bytes were kept.

    Args:
        record: The record as it lies on the medium, where whoever found the damage has it: the store then keeps
            its exact bytes in quarantine. None where the backend keeps them itself.
        more: What else the same read found damaged, an error each.
    """

    def __init__(
        self,
        message: str,
        *,
        key: object = None,
        backend: str | None = None,
        record: object = None,
        more: Iterable[CorruptedError] = (),
    ) -> None:
        super().__init__(message, key=key, backend=backend)
        self.record = record
        self.more = tuple(more)


class NewerFormatError(CorruptedError):
    """The row is whole, but a newer version wrote it. Upgrade; it was left where it is."""


class LockedError(NewerFormatError):
    """The row needs another key, or is plain where encrypted rows belong (or the reverse). It was left where it is."""


class FencedError(HoldfastError):
    """Another owner has taken over this context. Stop trading it."""


class UndecidedError(HoldfastError):
    """Missed candles decide about a position, and its strategy wants to be asked. Decide as the message says."""


class UnsafeSettingError(HoldfastError):
    """The medium is set up so that the promise would be void. Change the setting that is named."""


class FailedError(HoldfastError):
    """The store was closed, or an earlier write failed part-way. Close it and open it again."""


class OrderError(HoldfastError):
    """A venue refused an order, or may hold one twice. The engine goes on; look at the account."""
