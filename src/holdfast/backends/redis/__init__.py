"""Redis and Valkey: a single server, one that Sentinels watch, or a cluster; see ``docs/backends/redis.md``."""

from __future__ import annotations

from ...errors import InvalidInputError

try:
    import redis as _driver
except ImportError as _error:
    raise InvalidInputError("a Redis store needs redis-py: pip install 'holdfast[redis]'") from _error

from .backend import RedisBackend

del _driver

__all__ = ["RedisBackend"]
