"""A collector of OpenTelemetry in this process: it keeps the spans that processes send it by OTLP over HTTP."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.trace.v1.trace_pb2 import Span as Sent
from opentelemetry.proto.trace.v1.trace_pb2 import Status

from embedding_service import tracing
from support.cluster import until

# Not where the service listens: its tests name proxies that answer nobody, and only these spans go past them.
HOST = "127.0.0.2"


class Span(NamedTuple):
    """One that came. Ids are in hexadecimal digits; `parent` is empty for the first of a trace."""

    service: str
    instance: str
    name: str
    kind: str
    trace: str
    id: str
    parent: str
    links: tuple[str, ...]
    failed: str
    nanoseconds: int
    attributes: dict[str, Any]


class Collector:
    """What came so far."""

    def __init__(self) -> None:
        self._spans: dict[str, Span] = {}
        self._lock = threading.Lock()
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                collector.take(ExportTraceServiceRequest.FromString(body))
                answer = ExportTraceServiceResponse().SerializeToString()
                self.send_response(200)
                self.send_header("Content-Type", "application/x-protobuf")
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *_: object) -> None:
                """Nobody wants that."""

        self._server = ThreadingHTTPServer((HOST, 0), Handler)
        self.endpoint = f"http://{HOST}:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, name="collector", daemon=True).start()

    def variables(self, sampler: str = "parentbased_always_on") -> dict[str, str]:
        """What a process needs to trace to it."""
        return {
            "OTEL_EXPORTER_OTLP_ENDPOINT": self.endpoint,
            "OTEL_TRACES_SAMPLER": sampler,
            "OTEL_BSP_SCHEDULE_DELAY": "100",
            "NO_PROXY": HOST,
            "no_proxy": HOST,
        }

    def take(self, request: ExportTraceServiceRequest) -> None:
        """Keep these."""
        for resource in request.resource_spans:
            about = {each.key: each.value.string_value for each in resource.resource.attributes}
            sent = [span for scope in resource.scope_spans for span in scope.spans]
            with self._lock:
                self._spans.update((span.span_id.hex(), _read(about, span)) for span in sent)

    def of(self, trace: str) -> list[Span]:
        """The spans of a trace, from the first to the last that ended."""
        with self._lock:
            return [span for span in self._spans.values() if span.trace == trace]

    def traces(self) -> set[str]:
        """All that something came of."""
        with self._lock:
            return {span.trace for span in self._spans.values()}

    def whole(self, trace: str, spans: int) -> dict[str, Span]:
        """A trace of so many spans, once all have come, by their ids. The parent of each but the first is there."""
        found = until(lambda: found if len(found := self.of(trace)) >= spans else None, f"{spans} spans of {trace}")
        by_id = {span.id: span for span in found}
        assert len(found) == spans, [(span.service, span.name) for span in found]
        return by_id

    def close(self) -> None:
        """Take no more."""
        self._server.shutdown()
        self._server.server_close()


def _read(about: dict[str, str], span: Sent) -> Span:
    return Span(
        about["service.name"],
        about["service.instance.id"],
        span.name,
        Sent.SpanKind.Name(span.kind).removeprefix("SPAN_KIND_"),
        span.trace_id.hex(),
        span.span_id.hex(),
        span.parent_span_id.hex(),
        tuple(link.span_id.hex() for link in span.links),
        span.status.message if span.status.code == Status.STATUS_CODE_ERROR else "",
        span.end_time_unix_nano - span.start_time_unix_nano,
        {each.key: _value(each.value) for each in span.attributes},
    )


def _value(value: Any) -> Any:
    return getattr(value, value.WhichOneof("value"))


@contextmanager
def tracing_here(collector: Collector, sampler: str = "parentbased_always_on") -> Iterator[None]:
    """This process traces what it does."""
    with pytest.MonkeyPatch.context() as environment:
        for name, value in collector.variables(sampler).items():
            environment.setenv(name, value)
        tracing.start("embedding-client", "test")
    assert tracing.tracer is not None
    try:
        yield
    finally:
        tracing.stop()
