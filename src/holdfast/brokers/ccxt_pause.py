"""Keeping quiet when a venue says that it was asked too often: whoever goes on asking is shut out for longer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..errors import UnavailableError

_TOO_OFTEN = frozenset(("RateLimitExceeded", "DDoSProtection"))
_FIRST_SECONDS, _LONGEST_SECONDS = 1.0, 60.0
"""Where the venue does not say how long: doubled with each refusal in a row."""
_LONGEST_TOLD_SECONDS = 3 * 86_400.0


class Pause:
    """What all contexts of one broker share: until when nothing is asked of the venue.

    Args:
        client: ccxt's exchange, whose answers are looked at from now on.
        elapsed: Seconds by a clock that never goes back.
    """

    def __init__(self, client: Any, elapsed: Callable[[], float]) -> None:
        self._elapsed = elapsed
        self._until_s = self._forgiven_s = 0.0
        self._row = 0
        self._told_seconds: float | None = None
        handle = client.handle_errors

        def noted(code: int, reason: str, url: str, method: str, headers: Any, *more: Any) -> Any:
            if code in (418, 429):
                self._told_seconds = _seconds(headers)
            return handle(code, reason, url, method, headers, *more)

        client.handle_errors = noted

    def require_over(self) -> None:
        """Raise UnavailableError while the venue wants no request; nothing was sent then."""
        left = self._until_s - self._elapsed()
        if left > 0:
            raise UnavailableError(f"the venue was asked too often, and is left alone for {left:.0f} more seconds")

    def note(self, error: BaseException) -> None:
        """Take note of an error: if it says that the venue was asked too often, the pause begins."""
        if not _TOO_OFTEN & {kind.__name__ for kind in type(error).__mro__}:
            return
        now_s, told = self._elapsed(), self._told_seconds
        self._told_seconds = None
        self._row = 0 if now_s > self._forgiven_s else self._row + 1
        seconds = min(_FIRST_SECONDS * 2 ** min(self._row, 10), _LONGEST_SECONDS) if told is None else told
        self._until_s = max(self._until_s, now_s + seconds)
        self._forgiven_s = self._until_s + _LONGEST_SECONDS


def _seconds(headers: Any) -> float | None:
    """Return what the answer says; None where it does not, or not in seconds."""
    for name, value in dict(headers or {}).items():
        if str(name).lower() == "retry-after":
            text = str(value).strip()
            return min(float(text), _LONGEST_TOLD_SECONDS) if text.isdigit() else None
    return None
