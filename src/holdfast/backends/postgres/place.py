"""Where a PostgreSQL store lies: its URL, taken apart for libpq, the schema, and a name without secrets."""

from __future__ import annotations

import os
import re
from typing import Any
from urllib.parse import unquote

from psycopg import ProgrammingError
from psycopg.conninfo import conninfo_to_dict

from ...errors import InvalidInputError

_SCHEMA = re.compile(r"[a-z_][a-z0-9_]{0,62}")
_DEFAULT_SCHEMA = "holdfast"


class Place:
    """A schema in a database.

    Args:
        url: See :class:`holdfast.backends.postgres.PostgresBackend`.
        deadline_seconds: No statement, lock or connection attempt takes longer. The URL's own goes first.

    Raises:
        InvalidInputError: The URL cannot be read; the message does not repeat it, since it may hold a password.
    """

    def __init__(self, url: str, deadline_seconds: float) -> None:
        if not re.match(r"postgres(ql)?://", str(url)):
            raise InvalidInputError("give the store as postgresql://user@host:port/database?schema=holdfast")
        base, _, query = url.partition("?")
        words = [word.partition("=") for word in query.split("&") if word]
        own = {name: unquote(value) for name, _, value in words if name in ("schema", "deadline_seconds")}
        rest = "&".join("".join(word) for word in words if word[0] not in own)
        self.schema = own.get("schema", _DEFAULT_SCHEMA)
        self.deadline_seconds = _deadline(own.get("deadline_seconds", deadline_seconds))
        if not _SCHEMA.fullmatch(self.schema) or self.schema.startswith("pg_"):
            raise InvalidInputError(
                f"schema is {self.schema!r:.80}: use 1 to 63 characters from a-z 0-9 _, not beginning with a digit "
                "or with pg_"
            )
        try:
            self._given: dict[str, Any] = conninfo_to_dict(f"{base}?{rest}" if rest else base)
        except ProgrammingError:
            # Without the cause, which repeats the URL.
            raise InvalidInputError(
                "that postgresql: URL cannot be read: use postgresql://user@host:port/database?schema=holdfast, with "
                "%40 for @ and the like inside the user's name and password"
            ) from None
        host = self._given.get("host") or self._given.get("hostaddr") or os.environ.get("PGHOST", "")
        port = self._given.get("port") or os.environ.get("PGPORT", "5432")
        database = self._given.get("dbname") or os.environ.get("PGDATABASE", "")
        self.name = f"postgresql://{host}:{port}/{database}?schema={self.schema}"

    def conninfo(self, *, read_only: bool) -> dict[str, Any]:
        """Return what libpq is given: the URL's words, and settings that bound whatever the server does for us."""
        milliseconds = int(self.deadline_seconds * 1000)
        settings = {
            "statement_timeout": milliseconds,
            "lock_timeout": max(1, milliseconds // 2),
            "idle_in_transaction_session_timeout": milliseconds,
            # The commit's statement relies on each statement seeing what was committed before it.
            "default_transaction_isolation": r"read\ committed",
            "default_transaction_read_only": "on" if read_only else "off",
            # It has one good plan, by index; making a new one each time would take longer than running it.
            "plan_cache_mode": "force_generic_plan",
            "enable_seqscan": "off",
            "enable_bitmapscan": "off",
            "enable_hashjoin": "off",
            "enable_mergejoin": "off",
            "jit": "off",
        }
        options = " ".join(f"-c {name}={value}" for name, value in settings.items())
        return {
            "application_name": "holdfast",
            "connect_timeout": max(1, round(self.deadline_seconds)),
            "tcp_user_timeout": milliseconds,
            "keepalives_idle": 10,
            **self._given,
            "client_encoding": "UTF8",
            # Ours come last, so they win over the user's own.
            "options": f"{self._given.get('options', '')} {options}".strip(),
        }


def _deadline(given: str | float) -> float:
    try:
        seconds = float(given)
    except ValueError:
        seconds = 0.0
    if not 0.2 <= seconds <= 60:
        raise InvalidInputError(f"deadline_seconds is {given!r:.40}: use 0.2 to 60")
    return seconds
