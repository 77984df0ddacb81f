"""Spans and metrics of every call, by OpenTelemetry: what was called, on what, how long it took and how it ended.

No row, key, writer's name, message of an error or credential is in any attribute: a key holds a symbol and a
strategy's name, and an error's message may hold a key. Scope and domains are told: they name kinds of rows.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from typing import TypeVar

from ..contract import Backend, Guarantees, Head, Key, KeyPrefix, Op, Record
from ..errors import ConflictError, HoldfastError, InvalidInputError, UnknownOutcomeError
from .around import Around
from .retrying import Retry

try:
    from opentelemetry import metrics, trace
except ImportError as _error:
    raise InvalidInputError("tracing needs the OpenTelemetry API: pip install 'holdfast[tracing]'") from _error

T = TypeVar("T")

_NAME = "holdfast"
_BOUNDARIES = (
    0.0001,
    0.00025,
    0.0005,
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    30.0,
)
"""Of the histogram, in seconds: from a row in memory to a call that met its deadline."""
_LONGEST = 64
"""Characters of a scope or domain that are told: no right one is longer."""
_MOST_DOMAINS = 16
_Attributes = dict[str, str | int]
_logger = logging.getLogger(__name__)


class _Meters:
    """The instruments; each has the attributes ``holdfast.backend`` and ``holdfast.call``."""

    def __init__(self, provider: metrics.MeterProvider | None) -> None:
        meter = metrics.get_meter(_NAME, meter_provider=provider)
        self.calls = meter.create_counter("holdfast.calls", "{call}", "Calls of the store, by outcome")
        self.seconds = meter.create_histogram(
            "holdfast.call.duration",
            "s",
            "How long a call of the store took, by outcome",
            explicit_bucket_boundaries_advisory=_BOUNDARIES,
        )
        self.bytes = meter.create_counter("holdfast.payload", "By", "Bytes of the rows that were read and committed")
        self.rows = meter.create_counter("holdfast.rows", "{row}", "Rows read, committed and deleted, and keys listed")
        self.retries = meter.create_counter("holdfast.retries", "{retry}", "Attempts that failed and were made again")
        self.conflicts = meter.create_counter("holdfast.conflicts", "{commit}", "Commits that came second")
        self.unknowns = meter.create_counter("holdfast.unknown_outcomes", "{commit}", "Commits whose answer was lost")


class Traced(Around):
    """A backend whose calls are counted, timed and told to OpenTelemetry.

    Only the API is used: without an SDK set up in the process nothing is recorded, and little is spent.

    Args:
        backend: What it wraps.
        meter_provider: Where metrics go; the process's own provider if None.
        tracer_provider: Where spans go; the process's own provider if None.
        clock: Seconds that only grow.

    Raises:
        InvalidInputError: The package ``opentelemetry-api`` is missing (raised when this module is imported).
    """

    def __init__(
        self,
        backend: Backend,
        *,
        meter_provider: metrics.MeterProvider | None = None,
        tracer_provider: trace.TracerProvider | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        super().__init__(backend)
        self._meters = _Meters(meter_provider)
        self._tracer = trace.get_tracer(_NAME, tracer_provider=tracer_provider)
        self._clock = clock
        self._name = type(backend).__name__  # until open tells what it is

    def retried(self, retry: Retry) -> None:
        """Count an attempt that failed and will be made again: the observer of a retrying wrapper below."""
        told: _Attributes = {
            "holdfast.backend": retry.backend or self._name,
            "holdfast.call": retry.call,
            "error.type": retry.error,
        }
        self._meters.retries.add(1, told)
        span = trace.get_current_span()
        if span.is_recording():
            span.add_event("retry", {**told, "attempt": retry.attempt, "delay_seconds": retry.delay_seconds})
        _logger.info("%(holdfast.call)s on %(holdfast.backend)s is made again after %(error.type)s", told)

    async def open(self, *, read_only: bool = False) -> Guarantees:
        """Open what is wrapped; see :meth:`holdfast.contract.Backend.open`."""
        found = await self._call("open", {}, lambda: self.backend.open(read_only=read_only))
        self._name = found.backend
        return found

    async def read(self, scope: str, keys: Sequence[Key]) -> dict[Key, Record]:
        """Return the records of ``keys``; see :meth:`holdfast.contract.Backend.read`."""
        about = _about(scope, keys)
        found = await self._call("read", about, lambda: self.backend.read(scope, keys))
        self._moved("read", len(found), sum(len(record.payload) for record in found.values()))
        return found

    async def commit(
        self, scope: str, changes: Mapping[Key, bytes | None], expect: Mapping[Key, int], *, op: Op
    ) -> int:  # fmt: skip
        """Apply ``changes`` if ``expect`` holds; see :meth:`holdfast.contract.Backend.commit`.

        Crash: As what is wrapped.
        """
        about = _about(scope, changes)
        size = about["holdfast.bytes"] = sum(len(payload) for payload in changes.values() if type(payload) is bytes)
        number = await self._call("commit", about, lambda: self.backend.commit(scope, changes, expect, op=op))
        self._moved("commit", len(changes), size)
        return number

    async def head(self, scope: str) -> Head:
        """Return the scope's commit number and its writers' last ops."""
        return await self._call("head", {"holdfast.scope": str(scope)[:_LONGEST]}, lambda: self.backend.head(scope))

    async def keys(self, scope: str, prefix: KeyPrefix = KeyPrefix()) -> AsyncIterator[Key]:
        """Yield the scope's keys under ``prefix`` in byte order."""
        about: _Attributes = {"holdfast.scope": str(scope)[:_LONGEST], "holdfast.domains": str(prefix[0])[:_LONGEST]}
        async with aclosing(self._listing("keys", about, self.backend.keys(scope, prefix))) as found:
            async for key in found:
                yield key

    async def scopes(self) -> AsyncIterator[str]:
        """Yield the names of the scopes that have had a commit, in byte order."""
        async with aclosing(self._listing("scopes", {}, self.backend.scopes())) as found:
            async for scope in found:
                yield scope

    async def close(self) -> None:
        """Close what is wrapped. Repeatable.

        Crash: As before the call: nothing acknowledged depends on close.
        """
        await self._call("close", {}, self.backend.close)

    # ------------------------------------------------------------------ telling

    async def _call(self, call: str, about: _Attributes, run: Callable[[], Awaitable[T]]) -> T:
        begun = self._clock()
        # Messages of errors stay out: they name keys.
        with self._tracer.start_as_current_span(
            f"holdfast.{call}", attributes=about, record_exception=False, set_status_on_exception=False
        ) as span:
            try:
                answer = await run()
            except BaseException as error:
                self._end(call, span, self._clock() - begun, error)
                raise
            self._end(call, span, self._clock() - begun, None)
            return answer

    async def _listing(self, call: str, about: _Attributes, items: AsyncIterator[T]) -> AsyncGenerator[T, None]:
        """Yield ``items`` and tell how long they were waited for; the consumer's own time does not count."""
        # Not the current span: what the consumer does between two items is no part of it.
        span = self._tracer.start_span(f"holdfast.{call}", attributes=about)
        waited, count = 0.0, 0
        failure: BaseException | None = None
        try:
            while True:
                begun = self._clock()
                try:
                    item = await anext(items)
                except StopAsyncIteration:
                    return
                except BaseException as error:
                    failure = error
                    raise
                finally:
                    waited += self._clock() - begun
                count += 1
                yield item
        finally:
            if isinstance(items, AsyncGenerator):
                await items.aclose()
            self._end(call, span, waited, failure)
            span.end()
            self._moved(call, count, 0)

    def _end(self, call: str, span: trace.Span, seconds: float, error: BaseException | None) -> None:
        outcome = "ok" if error is None else _outcome(error)
        told: _Attributes = {"holdfast.backend": self._name, "holdfast.call": call, "holdfast.outcome": outcome}
        meters = self._meters
        meters.calls.add(1, told)
        meters.seconds.record(seconds, told)
        if isinstance(error, ConflictError):
            meters.conflicts.add(1, {"holdfast.backend": self._name, "holdfast.call": call})
        elif isinstance(error, UnknownOutcomeError):
            meters.unknowns.add(1, {"holdfast.backend": self._name, "holdfast.call": call})
            _logger.warning("%s on %s ended after %.3f s with %s", call, self._name, seconds, outcome)
        if span.is_recording():
            span.set_attribute("holdfast.backend", self._name)
            span.set_attribute("holdfast.outcome", outcome)
            if error is not None:
                span.set_status(trace.Status(trace.StatusCode.ERROR, outcome))

    def _moved(self, call: str, rows: int, size_bytes: int) -> None:
        told: _Attributes = {"holdfast.backend": self._name, "holdfast.call": call}
        self._meters.rows.add(rows, told)
        if size_bytes:
            self._meters.bytes.add(size_bytes, told)


def _outcome(error: BaseException) -> str:
    if isinstance(error, HoldfastError):
        return type(error).__name__
    return "cancelled" if isinstance(error, asyncio.CancelledError) else "error"


def _about(scope: str, keys: Iterable[Key]) -> _Attributes:
    """Return what a span may tell of a call's keys: how many, and of which domains."""
    names = list(keys)
    domains = sorted({str(key[0])[:_LONGEST] for key in names})
    return {
        "holdfast.scope": str(scope)[:_LONGEST],
        "holdfast.domains": ",".join(domains[:_MOST_DOMAINS]),
        "holdfast.keys": len(names),
    }
