"""One `StreamLookup` call, used by one thread at a time: a lookup is a message there and a message back.

A stream costs about half of a unary call, which sends headers and a status each time. grpc's public stream hands every
answer from a thread of its own to the thread that waits. The waiting thread can also poll for itself, as grpc's own
blocking unary calls do. That saves a third of the time and half of the processor's. It needs grpc's private names
(`grpc_core`). If they differ, the public stream serves.
"""

from __future__ import annotations

import queue
from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import grpc

from embedding_service import grpc_core

METHOD = "/embedding.v1.EmbeddingService/StreamLookup"


class Ended(NamedTuple):
    """How a stream ended."""

    code: grpc.StatusCode
    message: str


class Stream(ABC):
    """An open stream. `cancel` may be called from any thread, the rest from one at a time."""

    @abstractmethod
    def send(self, message: bytes) -> object:
        """Send a serialized request, which one `receive` must follow."""

    @abstractmethod
    def receive(self) -> bytes | Ended:
        """Wait for the serialized answer. `Ended`: none comes any more."""

    @abstractmethod
    def cancel(self, code: grpc.StatusCode, message: str) -> None:
        """End the stream. Its waiting thread is told this code."""


def open_stream(channel: grpc.Channel) -> Stream:
    """A stream that polls for itself if grpc's core can be used so."""
    return _PublicStream(channel) if grpc_core.why_public() else _PollingStream(channel)


class _PollingStream(grpc_core.ClientCall, Stream):
    """A call with a completion queue of its own, polled by the thread that waits, with nothing in between."""

    def __init__(self, channel: grpc.Channel) -> None:
        super().__init__(channel, METHOD.encode(), ended=lambda code, message: _ended(_STATUS[code], message))

    send = grpc_core.ClientCall.exchange


class _PublicStream(Stream):
    """grpc's own stream."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._requests: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._call: Any = channel.stream_stream(METHOD)(iter(self._requests.get, None))
        self._told: Ended | None = None

    def send(self, message: bytes) -> None:
        self._requests.put(message)

    def receive(self) -> bytes | Ended:
        try:
            return next(self._call)  # type: ignore[no-any-return]
        except StopIteration:
            ended = _ended(grpc.StatusCode.OK, "")
        except grpc.RpcError as error:
            ended = self._told or Ended(error.code(), error.details() or "")  # type: ignore[attr-defined]
        self._requests.put(None)
        return ended

    def cancel(self, code: grpc.StatusCode, message: str) -> None:
        self._told = Ended(code, message)
        self._requests.put(None)
        self._call.cancel()


def _ended(code: grpc.StatusCode, message: str) -> Ended:
    """A peer that ends the stream with OK gives no answer: what still waits is asked of others."""
    if code is grpc.StatusCode.OK:
        return Ended(grpc.StatusCode.UNAVAILABLE, "the stream was ended by the shard")
    return Ended(code, message)


_STATUS = {code.value[0]: code for code in grpc.StatusCode}
