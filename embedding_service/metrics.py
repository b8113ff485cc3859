"""Prometheus metrics of a process, over HTTP at /metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from wsgiref.simple_server import WSGIServer

from prometheus_client import PLATFORM_COLLECTOR, PROCESS_COLLECTOR, CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from embedding_service.errors import InvalidRequest
from embedding_service.machine import join_address


class MetricsServer:
    """Answers /metrics on a thread of its own.

    Args:
        host: Address to listen on.
        port: 0 switches metrics off.
        collect: Called at each scrape, on the server's thread. It reads counters and changes nothing.
    """

    def __init__(self, host: str, port: int, collect: Callable[[], Iterable[Metric]]) -> None:
        self._server: WSGIServer | None = None
        if not port:
            return
        registry = CollectorRegistry()
        for collector in (PROCESS_COLLECTOR, PLATFORM_COLLECTOR, _Collect(collect)):
            registry.register(collector)
        try:
            self._server, self._thread = start_http_server(port, addr=host.strip("[]"), registry=registry)
        except OSError as error:
            raise InvalidRequest(
                f"cannot serve metrics on {join_address(host, port)} ({error.strerror}): give another --metrics-port"
            ) from error

    def close(self) -> None:
        """Stop answering."""
        if self._server:
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()


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
