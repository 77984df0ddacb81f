"""MongoDB: one document for each scope, which several processes may share; see ``docs/backends/mongo.md``."""

from __future__ import annotations

from ...errors import InvalidInputError

try:
    import pymongo as _driver
except ImportError as _error:
    raise InvalidInputError("a mongodb: store needs pymongo: pip install 'holdfast[mongo]'") from _error

from .backend import MongoBackend

del _driver

__all__ = ["MongoBackend"]
