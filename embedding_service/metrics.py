"""Prometheus metrics of a process, over HTTP at /metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from prometheus_client import PLATFORM_COLLECTOR, PROCESS_COLLECTOR, CollectorRegistry, make_wsgi_app
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from embedding_service.errors import PermissionDenied, Unauthenticated
from embedding_service.security.server import Security
from embedding_service.web import App, WebServer, admit, refusal

RIGHTS = ("metrics", "admin")


class MetricsServer:
    """Answers /metrics on a thread of its own.

    Args:
        host: Address to listen on.
        port: 0 switches metrics off.
        collect: Called at each scrape, on the server's thread. It reads counters and changes nothing.
        security: Who may see them, with a bearer token over TLS. None: plain text, and everybody may.
    """

    def __init__(
        self, host: str, port: int, collect: Callable[[], Iterable[Metric]], security: Security | None = None
    ) -> None:
        self._server: WebServer | None = None
        if not port:
            return
        registry = CollectorRegistry()
        for collector in (PROCESS_COLLECTOR, PLATFORM_COLLECTOR, _Collect(collect)):
            registry.register(collector)
        app = make_wsgi_app(registry)
        self._server = WebServer(host, port, _guarded(app, security) if security else app, "--metrics-port", security)

    def close(self) -> None:
        """Stop answering."""
        if self._server:
            self._server.close()


def _guarded(app: App, security: Security) -> App:
    """The application for who may see the metrics."""

    def answer(environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        try:
            admit(security, RIGHTS, environ)
        except (Unauthenticated, PermissionDenied) as error:
            status, headers = refusal(error)
            start_response(status, [("Content-Type", "text/plain"), *headers])
            return [f"{error}\n".encode()]
        return app(environ, start_response)

    return answer


class _Collect(Collector):
    def __init__(self, source: Callable[[], Iterable[Metric]]) -> None:
        self._source = source

    def collect(self) -> Iterable[Metric]:
        return self._source()


def counter(name: str, text: str, value: float) -> Metric:
    """A number that only grows."""
    return CounterMetricFamily(f"embedding_{name}", text, value=value)


def info(name: str, text: str, **labels: str) -> Metric:
    """What a process is: labels to join its other metrics with."""
    return InfoMetricFamily(f"embedding_{name}", text, value=labels)


def gauge(name: str, text: str, value: float) -> Metric:
    """A number that goes up and down."""
    return GaugeMetricFamily(f"embedding_{name}", text, value=value)
