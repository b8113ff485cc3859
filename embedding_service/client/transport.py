"""Sending one request to one address: a single method, under which sync and async part; above it they share all."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, NamedTuple

import grpc
from google.protobuf.message import Message

from embedding_service.errors import Unavailable
from embedding_service.wire import embedding_pb2 as wire

_METHODS: dict[type[Message], tuple[str, type[Message]]] = {
    wire.LookupRequest: ("/embedding.v1.EmbeddingService/Lookup", wire.LookupResponse),
    wire.GetRoutingRequest: ("/embedding.v1.EmbeddingService/GetRouting", wire.Routing),
}

# Rows come in messages larger than gRPC's 4 MB default; the server's own limits bound them. Addresses may change behind
# a name (a restarted pod), so connecting again must not back off for minutes.
CHANNEL_OPTIONS: list[tuple[str, int]] = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2000),
    # A pod that was replaced has its old name and a new address: look it up again at once, not every 30 s.
    ("grpc.dns_min_time_between_resolutions_ms", 1_000),
    # A peer that hangs or was cut off does not close its connection: pings while calls wait find out.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
]


class Call(NamedTuple):
    """A request to one address; `timeout` in seconds. `alternative` asks somebody else for the same."""

    address: str
    request: Message
    timeout: float
    alternative: Call | None = None


class Failure(NamedTuple):
    """How a call ended that brought no response."""

    code: grpc.StatusCode
    message: str
    trailers: dict[str, str]


class Transport(ABC):
    """Sends calls. The future's result is the response message or a `Failure`; it never raises."""

    @abstractmethod
    def send(self, call: Call) -> Future[Any]:
        """Start a call."""

    def close(self) -> None:  # noqa: B027 - a transport without connections has nothing to close
        """Drop all connections; calls under way end as failures."""


class GrpcTransport(Transport):
    """One channel an address, opened when first used, shared by all threads."""

    def __init__(self) -> None:
        self._channels: dict[str, grpc.Channel] = {}
        self._methods: dict[tuple[str, type[Message]], Callable[..., Any]] = {}
        self._lock = threading.Lock()
        self._closed = False

    def send(self, call: Call) -> Future[Any]:
        """Start a call. Raises Unavailable once closed."""
        if self._closed:
            raise Unavailable("this client is closed")
        method = self._methods.get((call.address, type(call.request))) or self._open(call.address, type(call.request))
        result: Future[Any] = Future()
        try:
            rpc = method(call.request, timeout=call.timeout)
        except ValueError:  # closed since we looked
            raise Unavailable("this client is closed") from None
        rpc.add_done_callback(lambda rpc: result.set_result(_outcome(rpc)))
        return result

    def close(self) -> None:
        """Drop all connections."""
        self._closed = True
        with self._lock:
            channels, self._channels, self._methods = list(self._channels.values()), {}, {}
        for channel in channels:
            channel.close()

    def _open(self, address: str, kind: type[Message]) -> Callable[..., Any]:
        with self._lock:
            channel = self._channels.get(address)
            if channel is None:
                channel = self._channels[address] = grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
            path, response = _METHODS[kind]
            multi = channel.unary_unary(path, kind.SerializeToString, response.FromString)
            return self._methods.setdefault((address, kind), multi.future)


def _outcome(rpc: Any) -> Any:
    if rpc.code() is grpc.StatusCode.OK:
        return rpc.result()
    trailers = {item.key: item.value for item in rpc.trailing_metadata() or () if isinstance(item.value, str)}
    return Failure(rpc.code(), rpc.details() or "", trailers)
