"""Prometheus metrics of a process, over HTTP at /metrics."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterable
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, make_server

from prometheus_client import PLATFORM_COLLECTOR, PROCESS_COLLECTOR, CollectorRegistry, make_wsgi_app
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import ThreadingWSGIServer
from prometheus_client.registry import Collector

from embedding_service.errors import InvalidRequest, PermissionDenied, Unauthenticated
from embedding_service.machine import join_address
from embedding_service.security.server import Security

# Seconds that a client has for its handshake and its request.
REQUEST_SECONDS = 10
RIGHTS, PATH = ("metrics", "admin"), b"/metrics"


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
        self._server: _Server | None = None
        if not port:
            return
        registry = CollectorRegistry()
        for collector in (PROCESS_COLLECTOR, PLATFORM_COLLECTOR, _Collect(collect)):
            registry.register(collector)
        app = make_wsgi_app(registry)
        host = host.strip("[]")
        try:
            [(family, *_), *_] = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)

            class Listening(_Server):
                address_family = family

            app = _guarded(app, security) if security else app
            self._server = make_server(host, port, app, Listening, _Handler)
        except OSError as error:
            raise InvalidRequest(
                f"cannot serve metrics on {join_address(host, port)} ({error.strerror}): give another --metrics-port"
            ) from error
        self._server.security = security
        self._thread = threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop answering."""
        if self._server:
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()


class _Server(ThreadingWSGIServer):
    """With TLS, each connection's handshake is on its own thread: one that says nothing keeps nobody."""

    security: Security | None = None

    def get_request(self) -> tuple[Any, Any]:
        """See the base class."""
        connection, address = super().get_request()
        if self.security is None:
            return connection, address
        try:
            context = self.security.context()
            return context.wrap_socket(connection, server_side=True, do_handshake_on_connect=False), address
        except OSError:
            connection.close()
            raise

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nobody is told of a client that speaks no TLS, or goes."""


class _Handler(WSGIRequestHandler):
    timeout = REQUEST_SECONDS

    def log_message(self, format: str, *args: Any) -> None:
        """Scrapes are not logged."""


def _guarded(app: Callable[..., Any], security: Security) -> Callable[..., Any]:
    """The application for who may see the metrics."""

    def answer(environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        try:
            bearer = environ.get("HTTP_AUTHORIZATION")
            security.admit(RIGHTS, PATH, bearer=bearer, peer=str(environ.get("REMOTE_ADDR", "")))
        except (Unauthenticated, PermissionDenied) as error:
            known = isinstance(error, PermissionDenied)
            challenge = [] if known else [("WWW-Authenticate", "Bearer")]
            start_response(
                "403 Forbidden" if known else "401 Unauthorized", [("Content-Type", "text/plain"), *challenge]
            )
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


def gauge(name: str, text: str, value: float) -> Metric:
    """A number that goes up and down."""
    return GaugeMetricFamily(f"embedding_{name}", text, value=value)
