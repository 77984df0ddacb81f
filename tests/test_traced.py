"""Traced: what OpenTelemetry is told of each call, and what it is never told."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import HistogramDataPoint, InMemoryMetricReader, NumberDataPoint
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from holdfast.backends.memory import MemoryBackend
from holdfast.contract import Backend, Key, KeyPrefix, Op
from holdfast.errors import ConflictError, FailedError, UnavailableError, UnknownOutcomeError
from holdfast.testing.faults import Fault, FaultyBackend
from holdfast.wrappers.around import Around
from holdfast.wrappers.retrying import Retrying
from holdfast.wrappers.stack import stack
from holdfast.wrappers.traced import Traced

CANARY = "CANARY7319"
KEYS = [Key("signal", f"{CANARY}SYM{i}_{CANARY}_x", f"{CANARY}ID{i}") for i in range(3)]
PAYLOAD = b'{"secret":"%s"}' % CANARY.encode()


class Told:
    """What reached the exporters."""

    def __init__(self) -> None:
        self.reader = InMemoryMetricReader()
        self.meters = MeterProvider([self.reader], shutdown_on_exit=False)
        self.exporter = InMemorySpanExporter()
        self.tracers = TracerProvider(shutdown_on_exit=False)
        self.tracers.add_span_processor(SimpleSpanProcessor(self.exporter))

    @property
    def spans(self) -> list[ReadableSpan]:
        """Return the spans that ended, in that order."""
        return list(self.exporter.get_finished_spans())

    def points(self) -> dict[str, list[NumberDataPoint | HistogramDataPoint]]:
        """Return the data points by the name of their instrument."""
        found: dict[str, list[Any]] = {}
        data = self.reader.get_metrics_data()
        for resource in data.resource_metrics if data else ():
            for scope in resource.scope_metrics:
                for metric in scope.metrics:
                    found.setdefault(metric.name, []).extend(metric.data.data_points)
        return found

    def count(self, name: str, **about: str) -> float:
        """Add up a counter's points that have these attributes."""
        wanted = {f"holdfast.{key}": value for key, value in about.items()}
        total = 0.0
        for point in self.points().get(name, []):
            if wanted.items() <= dict(point.attributes or {}).items():
                total += point.sum if isinstance(point, HistogramDataPoint) else point.value
        return total


@pytest.fixture
def told() -> Iterator[Told]:
    made = Told()
    yield made
    made.meters.shutdown()
    made.tracers.shutdown()


def traced(told: Told, backend: Backend, **options: Any) -> Traced:
    return Traced(backend, meter_provider=told.meters, tracer_provider=told.tracers, **options)


async def put(backend: Backend, n: int, expect: Mapping[Key, int] | None = None, keys: int = 1) -> int:
    changes: dict[Key, bytes | None] = dict.fromkeys(KEYS[:keys], PAYLOAD)
    return await backend.commit("main", changes, expect or {}, op=Op(f"{CANARY}writer", n))


async def use_all(backend: Backend) -> None:
    """Make each call, the failing ones too."""
    await backend.open()
    version = await put(backend, 1, {KEYS[0]: 0}, keys=2)
    await backend.read("main", KEYS)
    await backend.head("main")
    assert len([key async for key in backend.keys("main", KeyPrefix("signal"))]) == 2
    assert [scope async for scope in backend.scopes()] == ["main"]
    with pytest.raises(ConflictError, match=CANARY):
        await put(backend, 2, {KEYS[0]: version + 5})
    await backend.close()
    with pytest.raises(FailedError):
        await backend.read("main", KEYS)


async def test_every_call_is_counted_timed_and_has_a_span(told: Told) -> None:
    ticks = iter(i / 8 for i in range(1000))
    backend = traced(told, MemoryBackend(), clock=lambda: next(ticks))
    await use_all(backend)
    assert [span.name for span in told.spans] == [
        f"holdfast.{call}" for call in ("open", "commit", "read", "head", "keys", "scopes", "commit", "close", "read")
    ]
    assert told.count("holdfast.calls", call="commit", outcome="ok", backend="memory") == 1
    assert told.count("holdfast.calls", call="commit", outcome="ConflictError") == 1
    assert told.count("holdfast.calls", call="read", outcome="FailedError") == 1
    assert told.count("holdfast.calls") == 9
    assert told.count("holdfast.conflicts") == 1
    assert told.count("holdfast.unknown_outcomes") == 0
    assert told.count("holdfast.payload", call="commit") == 2 * len(PAYLOAD)
    assert told.count("holdfast.payload", call="read") == 2 * len(PAYLOAD)
    assert told.count("holdfast.rows", call="commit") == 2, "a refused commit moved none"
    assert told.count("holdfast.rows", call="keys") == 2
    assert told.count("holdfast.call.duration", call="commit") == 2 / 8, "two calls of an eighth of a second"


async def test_a_span_tells_scope_domains_sizes_and_outcome(told: Told) -> None:
    backend = traced(told, MemoryBackend())
    await use_all(backend)
    commit, refused = [span for span in told.spans if span.name == "holdfast.commit"]
    assert dict(commit.attributes or {}) == {
        "holdfast.scope": "main",
        "holdfast.domains": "signal",
        "holdfast.keys": 2,
        "holdfast.bytes": 2 * len(PAYLOAD),
        "holdfast.backend": "memory",
        "holdfast.outcome": "ok",
    }
    assert commit.status.status_code is StatusCode.UNSET
    assert (refused.status.status_code, refused.status.description) == (StatusCode.ERROR, "ConflictError")
    assert refused.events == (), "an error's message names keys, so it is not recorded"


async def test_no_row_key_writer_or_credential_is_told(told: Told, caplog: pytest.LogCaptureFixture) -> None:
    """Every text that leaves by spans, metrics and logs, also of calls that fail and of a password."""
    caplog.set_level(logging.DEBUG)
    faults = [Fault(1, "unavailable"), Fault(3, "unknown_applied"), Fault(1, "unavailable", "keys")]
    whole = stack(
        FaultyBackend(MemoryBackend(), *faults),
        retrying=True, cached=True, traced=True, meter_provider=told.meters, tracer_provider=told.tracers,
    )  # fmt: skip
    await use_all(whole)
    url = f"redis://{CANARY}user:{CANARY}password@127.0.0.1:1/0?deadline_seconds=0.2"
    from holdfast.backends.redis import RedisBackend

    server = traced(told, RedisBackend(url))
    with pytest.raises(UnavailableError):
        await server.open()
    await server.close()
    for bad in (Key("x" * 250 + CANARY, "a", "b"), Key("signal", f"../{CANARY}", "b")):
        memory = traced(told, MemoryBackend())
        await memory.open()
        with pytest.raises(ValueError, match=CANARY):
            await memory.commit("main", {bad: PAYLOAD}, {}, op=Op("w", 1))
    everything = "".join(span.to_json() for span in told.spans) + caplog.text
    everything += "".join(f"{name}{point.attributes}" for name, points in told.points().items() for point in points)
    assert "holdfast.outcome" in everything
    assert "ConflictError" in everything
    assert "retry" in everything
    assert CANARY not in everything


async def test_retries_far_below_are_counted_and_lie_in_the_span_of_their_call(told: Told) -> None:
    whole = stack(
        FaultyBackend(MemoryBackend(), Fault(1, "unavailable"), Fault(2, "unknown_lost")),
        retrying=True, cached=True, traced=True, meter_provider=told.meters, tracer_provider=told.tracers,
    )  # fmt: skip
    await whole.open()
    await put(whole, 1, {KEYS[0]: 0})
    assert told.count("holdfast.retries", call="commit", backend="memory") == 2
    assert told.count("holdfast.unknown_outcomes") == 0, "nobody above was left in doubt"
    (commit,) = [span for span in told.spans if span.name == "holdfast.commit"]
    assert [dict(event.attributes or {})["error.type"] for event in commit.events] == [
        "UnavailableError",
        "UnknownOutcomeError",
    ]


async def test_an_unknown_outcome_is_counted_and_logged(told: Told, caplog: pytest.LogCaptureFixture) -> None:
    backend = traced(told, FaultyBackend(MemoryBackend(), Fault(1, "unknown_lost")))
    await backend.open()
    with pytest.raises(UnknownOutcomeError):
        await put(backend, 1)
    assert told.count("holdfast.unknown_outcomes", backend="memory", call="commit") == 1
    assert "commit on memory" in caplog.text


async def test_a_cancelled_call_is_told_as_cancelled_and_leaves(told: Told) -> None:
    backend = traced(told, FaultyBackend(MemoryBackend(), Fault(1, "delay")))
    await backend.open()
    task = asyncio.ensure_future(put(backend, 1))
    await backend.backend.waiting.wait()  # type: ignore[attr-defined]
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert told.count("holdfast.calls", outcome="cancelled") == 1
    assert len(told.spans) == 2


async def test_a_listing_that_is_left_half_way_ends_its_span_and_the_listing_below(told: Told) -> None:
    closed: list[str] = []

    class Listing(Around):
        async def keys(self, scope: str, prefix: KeyPrefix = KeyPrefix()) -> AsyncIterator[Key]:
            try:
                for key in KEYS:
                    yield key
            finally:
                closed.append("keys")

    backend = traced(told, Listing(MemoryBackend()))
    keys = backend.keys("main")
    await anext(keys)
    await keys.aclose()  # type: ignore[attr-defined]
    assert closed == ["keys"]
    assert [span.name for span in told.spans] == ["holdfast.keys"]
    assert told.count("holdfast.rows", call="keys") == 1


async def test_what_the_consumer_does_between_two_keys_is_not_inside_the_span(told: Told) -> None:
    backend = traced(told, MemoryBackend())
    await backend.open()
    await put(backend, 1)
    async for key in backend.keys("main"):
        await backend.read("main", [key])
    spans = {span.name: span for span in told.spans}
    assert spans["holdfast.read"].parent is None


async def test_nothing_is_lost_of_answers_and_guarantees(told: Told) -> None:
    bare, wrapped = MemoryBackend(), traced(told, MemoryBackend())
    assert await wrapped.open() == await bare.open()
    await put(bare, 1)
    assert await put(wrapped, 1) == 1
    assert await wrapped.read("main", KEYS) == await bare.read("main", KEYS)
    assert await wrapped.head("main") == await bare.head("main")


async def test_without_an_sdk_it_works_and_tells_nobody() -> None:
    backend = Traced(Retrying(MemoryBackend()))
    await use_all(backend)


@pytest.mark.parametrize("how", ["Traced", "traced+memory:"])
def test_without_the_package_there_is_one_clear_error(how: str) -> None:
    use = "from holdfast import Traced" if how == "Traced" else f"import holdfast; holdfast.open_backend({how!r})"
    code = f"""
import sys
sys.modules["opentelemetry"] = None
try:
    {use}
except Exception as error:
    print(type(error).__name__, error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "InvalidInputError" in done.stdout
    assert "pip install 'holdfast[tracing]'" in done.stdout


def test_stacks_and_other_wrappers_need_no_tracing_package() -> None:
    code = """
import sys
sys.modules["opentelemetry"] = None
import holdfast
print(holdfast.stack(holdfast.MemoryBackend(), cached=True, retrying=True), holdfast.Retrying, holdfast.Cached)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Cached(Retrying(" in done.stdout
