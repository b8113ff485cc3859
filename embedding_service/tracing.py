"""Traces by OpenTelemetry: what one request did in each process on its way (docs/tracing.md).

OpenTelemetry is the extra `tracing`. It is imported where traces are asked for, and nowhere else. In all other
processes `tracer` is None, and that test is what traces cost.

Whether a request is traced is decided where it begins, before anything is made for it. Of the others nobody hears.
"""

from __future__ import annotations

import atexit
import logging
import os
import random
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import TYPE_CHECKING, Any

from embedding_service.foreign import one_line

if TYPE_CHECKING:
    from opentelemetry.trace import Span as OpenTelemetrySpan
    from opentelemetry.trace import SpanContext, TracerProvider

log = logging.getLogger(__name__)

# The header of W3C's trace context, and the name of the field of a `LookupRequest`.
TRACEPARENT = "traceparent"
# Kinds of processes.
SHARD, WORKER, CLIENT = "embedding-shard", "embedding-worker", "embedding-client"
# Bytes of a traceparent. Later versions of it may be longer, and begin the same.
_LONGEST = 256
# Seconds that a process waits at its end for a collector that does not answer.
_LEAVING = 2.0
_CHANCES = 1 << 64
_INSIDE, _SERVER, _CLIENT = "INTERNAL", "SERVER", "CLIENT"

Attributes = Mapping[str, str | int | float | bool]

tracer: Tracer | None = None
"""What makes spans in this process. None: nothing is traced."""
_off: AbstractContextManager[None] = nullcontext()
_beginning = threading.Lock()
_hooked = False


def start(service: str, instance: str = "") -> None:
    """Begin traces if they are asked for and have not begun.

    They are asked for by the variables of OpenTelemetry (docs/tracing.md), or by a program that has set a
    TracerProvider before. The program's provider is used then, with its sampler.

    Args:
        service: Name of the kind of process, where OTEL_SERVICE_NAME says none.
        instance: Name of this one.
    """
    global tracer, _hooked
    if tracer is not None:
        return
    with _beginning:
        if tracer is not None:
            return
        try:
            begun = _of_the_program() or (_of_the_environment(service, instance) if _asked_for() else None)
        except ImportError as error:
            _warn_once(f"no traces, for a package is missing ({error}): pip install 'embedding-service[tracing]'")
            return
        except ValueError as error:
            _warn_once(f"no traces: {one_line(error)}")
            return
        if begun is not None and not _hooked:
            _hooked = True
            atexit.register(stop)
            os.register_at_fork(after_in_child=_forget)
        tracer = begun


def stop() -> None:
    """Send what was not sent yet, for two seconds at most. Nothing is traced from then on."""
    global tracer
    ended, tracer = tracer, None
    if ended is not None:
        ended.close()


def inside(name: str, attributes: Attributes | None = None) -> Span | None:
    """A span of work within this process, under the current one. None where it is not traced."""
    return None if tracer is None else tracer.begin(name, _INSIDE, attributes=attributes)


def answering(name: str, parent: str, attributes: Attributes | None = None) -> AbstractContextManager[Span | None]:
    """A span of a call that is answered here, current inside, under the caller's.

    `parent`: the caller's traceparent. Without one this process decides whether the call is traced.
    """
    return _off if tracer is None else tracer.begin(name, _SERVER, parent, attributes=attributes) or _off


def current() -> Span | None:
    """The current span. None where it is not traced."""
    return None if tracer is None else tracer.current()


def working_for(name: str, spans: Iterable[Span | None]) -> AbstractContextManager[Span | None]:
    """A span of work for several requests at once: under the first one that is traced, with links to the others."""
    if tracer is None or not (traced := [span for span in spans if span is not None]):
        return _off
    return tracer.begin(name, _INSIDE, traced[0].traceparent, links=traced[1:]) or _off


def traceparent_of(metadata: Iterable[tuple[str, str | bytes]]) -> str:
    """What a call's metadata says of the caller's span. Empty where it says nothing."""
    said = next((value for key, value in metadata if key == TRACEPARENT), "")
    return said if isinstance(said, str) else ""


class Span(AbstractContextManager["Span"]):
    """One piece of a request's way. As a context manager it is the current span, and ends with an error if that came.

    Attributes:
        traceparent: What the next process is told.
        trace_id, span_id: In hexadecimal digits.
    """

    def __init__(self, span: OpenTelemetrySpan) -> None:
        context = span.get_span_context()
        self.trace_id, self.span_id = f"{context.trace_id:032x}", f"{context.span_id:016x}"
        self.traceparent = f"00-{self.trace_id}-{self.span_id}-{context.trace_flags:02x}"
        self._span = span

    @property
    def context(self) -> SpanContext:
        """As OpenTelemetry has it."""
        return self._span.get_span_context()

    def note(self, attributes: Attributes) -> None:
        """Say more of it."""
        self._span.set_attributes(attributes)

    def event(self, name: str, attributes: Attributes | None = None) -> None:
        """Something happened now."""
        self._span.add_event(name, attributes)

    def fail(self, why: str) -> None:
        """It came to nothing."""
        from opentelemetry.trace import Status, StatusCode

        self._span.set_status(Status(StatusCode.ERROR, why))

    def end(self, at: int | None = None) -> None:
        """It is over, now or `at` nanoseconds since 1970."""
        self._span.end(at)

    def __enter__(self) -> Span:
        from opentelemetry.context import attach
        from opentelemetry.trace import set_span_in_context

        self._token = attach(set_span_in_context(self._span))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        from opentelemetry.context import detach

        detach(self._token)
        if error is not None:
            self.fail(one_line(error) or type(error).__name__)
        self.end()


class Tracer:
    """Makes spans of those requests that are traced.

    Args:
        provider: Where spans go.
        sampler: Which requests are traced. None: the provider's own sampler says that.
    """

    def __init__(self, provider: TracerProvider, sampler: Sampler | None) -> None:
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._trace = trace
        self._read = TraceContextTextMapPropagator().extract
        self._provider, self._sampler = provider, sampler
        self._tracer = provider.get_tracer("embedding_service")

    def begin(
        self,
        name: str,
        kind: str,
        parent: str = "",
        *,
        began: int | None = None,
        attributes: Attributes | None = None,
        links: Sequence[Span] = (),
    ) -> Span | None:
        """A span under `parent`, or else under the current one, or else the first of a trace. None: it is not traced.

        `began`: in nanoseconds since 1970. None: now.
        """
        if parent:
            context = self._read({TRACEPARENT: parent}) if len(parent) <= _LONGEST else None
            above = self._trace.get_current_span(context).get_span_context() if context else None
            if above is None or not above.is_valid:
                return None  # a traceparent that says nothing
        else:
            context, above = None, self._trace.get_current_span().get_span_context()
        if self._sampler is not None and not self._sampler.takes(above if above.is_valid else None):
            return None
        span = self._tracer.start_span(
            name,
            context,
            self._trace.SpanKind[kind],
            attributes,
            [self._trace.Link(link.context) for link in links],
            began,
        )
        return Span(span) if span.is_recording() else None

    def record(self, name: str, parent: str, began: float, attributes: Attributes) -> Span | None:
        """A span of a call that was answered here since `began` on time.perf_counter's clock."""
        now = time.time_ns()
        since = now - int((time.perf_counter() - began) * 1e9)
        span = self.begin(name, _SERVER, parent, began=since, attributes=attributes)
        if span is not None:
            span.end(now)
        return span

    def asking(self, name: str, parent: Span, attributes: Attributes) -> Span | None:
        """A span of a call that is made from here."""
        return self.begin(name, _CLIENT, parent.traceparent, attributes=attributes)

    def current(self) -> Span | None:
        """See `tracing.current`."""
        span = self._trace.get_current_span()
        return Span(span) if span.is_recording() else None

    def close(self) -> None:
        """Send what is left, unless the provider is the program's own business."""
        if self._sampler is not None:
            closing = threading.Thread(target=self._provider.shutdown, name="last-spans", daemon=True)  # type: ignore[attr-defined]
            closing.start()
            closing.join(_LEAVING)


class Sampler:
    """OTEL_TRACES_SAMPLER, without making anything for a request that is not traced.

    OpenTelemetry's own samplers are asked with a trace id, and answer with an object: 10 µs for each request.
    """

    def __init__(self, name: str, argument: str) -> None:
        """Raises ValueError for what is none."""
        kind = name.removeprefix("parentbased_")
        self._follows = kind != name
        shares = {"always_on": "1", "always_off": "0", "traceidratio": argument or "1"}
        if kind not in shares:
            raise ValueError(
                f"OTEL_TRACES_SAMPLER must be always_on, always_off, traceidratio or one of these after parentbased_, "
                f"got {name!r}"
            )
        try:
            share = float(shares[kind])
        except ValueError:
            share = -1.0
        if not 0 <= share <= 1:
            raise ValueError(f"OTEL_TRACES_SAMPLER_ARG must be a number from 0 to 1, got {argument!r}")
        self._below = round(share * _CHANCES)

    def takes(self, above: SpanContext | None) -> bool:
        """Whether a span under this one is recorded. None: the first of its trace."""
        if above is None:
            return random.getrandbits(64) < self._below
        if self._follows:
            return above.trace_flags.sampled
        return above.trace_id % _CHANCES < self._below


def _asked_for() -> bool:
    """Whether OpenTelemetry's variables ask for traces. Raises ValueError for what they say wrong."""
    said = os.environ.get
    exporter = said("OTEL_TRACES_EXPORTER", "").strip()
    if said("OTEL_SDK_DISABLED", "").strip().lower() == "true" or exporter == "none":
        return False
    if exporter not in ("", "otlp"):
        raise ValueError(f"OTEL_TRACES_EXPORTER must be otlp or none, got {exporter!r}")
    endpoint = said("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") or said("OTEL_EXPORTER_OTLP_ENDPOINT")
    if not (exporter or endpoint):
        return False
    protocol = said("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or said("OTEL_EXPORTER_OTLP_PROTOCOL") or "http/protobuf"
    if protocol != "http/protobuf":
        raise ValueError(f"OTEL_EXPORTER_OTLP_PROTOCOL must be http/protobuf (port 4318), got {protocol!r}")
    return True


def _of_the_program() -> Tracer | None:
    """By the TracerProvider that this program has set, if it has."""
    trace = sys.modules.get("opentelemetry.trace")
    sdk = sys.modules.get("opentelemetry.sdk.trace")
    if trace is None or sdk is None:
        return None
    provider = trace.get_tracer_provider()
    return Tracer(provider, None) if isinstance(provider, sdk.TracerProvider) else None


def _of_the_environment(service: str, instance: str) -> Tracer:
    """By OTEL_*. Spans go by OTLP over HTTP: grpc's connections would not outlive a fork of this process."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.sdk.trace.sampling import ALWAYS_ON

    said = os.environ.get("OTEL_TRACES_SAMPLER") or "parentbased_always_on"
    sampler = Sampler(said.strip().lower(), os.environ.get("OTEL_TRACES_SAMPLER_ARG", ""))
    ours: dict[str, Any] = {"service.name": service, "service.instance.id": instance or f"{service}-{os.getpid()}"}
    resource = Resource.create(ours).merge(OTELResourceDetector().detect())
    provider = TracerProvider(sampler=ALWAYS_ON, resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return Tracer(provider, sampler)


def _forget() -> None:
    """In a child of a fork: its own traces begin with its first client. The parent's connection is the parent's."""
    global tracer, _beginning
    tracer, _beginning = None, threading.Lock()


_warned: set[str] = set()


def _warn_once(text: str) -> None:
    if text not in _warned:
        _warned.add(text)
        log.warning("%s", text)
