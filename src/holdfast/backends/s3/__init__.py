"""S3 and services that speak like it: one object for each scope, changed by conditional writes; see the docs page."""

from __future__ import annotations

from ...errors import InvalidInputError

try:
    import obstore as _driver
except ImportError as _error:
    raise InvalidInputError("an S3 store needs obstore: pip install 'holdfast[s3]'") from _error

from .backend import S3Backend

del _driver

__all__ = ["S3Backend"]
