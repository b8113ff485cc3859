"""Sending requests to addresses: what sync and async have under them; above it they share all."""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future
from functools import cached_property
from typing import Any, NamedTuple

import grpc
from google.protobuf.message import DecodeError, Message

from embedding_service.client import forks
from embedding_service.client.channels import open_channel
from embedding_service.client.coalescing import Coalescer
from embedding_service.client.streams import Ended, Stream, Watchdog, open_stream
from embedding_service.errors import Unavailable
from embedding_service.wire import embedding_pb2 as wire
from embedding_service.wire import rows

_METHODS: dict[type[Message] | type[rows.Request], str] = {
    rows.Request: "/embedding.v1.EmbeddingService/Lookup",
    wire.GetRoutingRequest: "/embedding.v1.EmbeddingService/GetRouting",
}

# The largest block from which glibc learns how much freed memory to keep, less what it adds to a block.
_LARGEST_LEARNT = (32 << 20) - (64 << 10)
# Streams to one address; a shard takes 256 calls on a connection. Threads beyond these make unary calls.
MOST_STREAMS = 64


class Call(NamedTuple):
    """A request to one address.

    Attributes:
        timeout: Seconds.
        alternative: Asks somebody else for the same.
        request: A message, or a lookup.
        shape: What a lookup's answer should look like; its answer is a `rows.Answer`.
    """

    address: str
    request: Message | rows.Request
    timeout: float
    alternative: Call | None = None
    shape: rows.Shape | None = None


class Failure(NamedTuple):
    """How a call ended that brought no response."""

    code: grpc.StatusCode
    message: str


class Transport(ABC):
    """Sends calls. A call's outcome is the response message or a `Failure`; nothing is raised for it."""

    @abstractmethod
    def send(self, call: Call) -> Future[Any]:
        """Start a call; the future's result is its outcome."""

    def exchange(self, calls: Sequence[Call]) -> Generator[Any, None, None]:
        """Make calls at the same time: their outcomes in order, each when it is there. Close it to give up the rest."""
        for future in [self.send(call) for call in calls]:
            yield future.result()

    @cached_property
    def together(self) -> Coalescer:
        """`exchange` for event loops."""
        return Coalescer(self.send)

    def close(self) -> None:  # noqa: B027 - a transport without connections has nothing to close
        """Drop all connections; calls under way end as failures."""

    def pause(self, deadline: float) -> None:  # noqa: B027 - as above
        """Drop all connections, which is waited for until `deadline` on time.monotonic's clock.

        Calls that are under way may end before; those that do not, end as failures. Others wait for `resume`.
        """

    def resume(self) -> None:  # noqa: B027 - as above
        """Make calls again; after several `pause`s it takes as many."""


class GrpcTransport(Transport):
    """One channel an address, opened when first used, shared by all threads.

    `send` makes unary calls. `exchange` takes a stream an address for as long as its call takes; streams are kept open.
    """

    def __init__(self) -> None:
        _let_malloc_keep_answers()
        self._channels: dict[str, grpc.Channel] = {}
        self._methods: dict[tuple[str, type[Message] | type[rows.Request]], Callable[..., Any]] = {}
        self._streams: dict[str, _Streams] = {}
        self._watchdog = Watchdog()
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        # What was begun and has not ended: exchanges, and the results of unary calls.
        self._under_way: set[object] = set()
        self._closed = False
        self._pauses = 0
        self._dropped = False

    def send(self, call: Call) -> Future[Any]:
        """Start a unary call. Raises Unavailable once closed."""
        result: Future[Any] = Future()
        self._enter(result)
        return self._send(call, result)

    def exchange(self, calls: Sequence[Call]) -> Generator[Any, None, None]:
        """See `Transport.exchange`. Raises Unavailable once closed."""
        trips: list[_Trip | Future[Any]] = []
        this = object()
        self._enter(this)
        try:
            for call in calls:
                trips.append(self._begin(call))
            for trip in trips:
                yield trip.result()
        finally:
            for trip in trips:
                if isinstance(trip, _Trip):
                    trip.close()
            self._under_way.discard(this)

    def close(self) -> None:
        """Drop all connections."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._watchdog.close()
        self._drop(_CLOSED)

    def pause(self, deadline: float) -> None:
        """See `Transport.pause`."""
        with self._lock:
            self._pauses += 1
        self._wait_for_ends(deadline)
        with self._lock:
            self._dropped = True
        self._drop(_PAUSED)
        self._wait_for_ends(time.monotonic() + _LEAVING)

    def resume(self) -> None:
        """See `Transport.resume`."""
        with self._changed:
            self._pauses -= 1
            self._dropped = self._pauses > 0
            self._changed.notify_all()

    def _enter(self, this: object) -> None:
        """Count what begins, which waits while paused: `pause` looks at what is counted after it has said so."""
        self._under_way.add(this)
        while self._pauses and not self._closed:
            self._under_way.discard(this)
            with self._changed:
                while self._pauses and not self._closed:
                    self._changed.wait()
            self._under_way.add(this)

    def _wait_for_ends(self, deadline: float) -> None:
        while self._under_way and time.monotonic() < deadline:
            time.sleep(_LOOK)

    def _drop(self, why: str) -> None:
        with self._lock:
            channels, self._channels, self._methods = self._channels, {}, {}
            streams, self._streams = self._streams, {}
        for each in streams.values():
            each.close(why)
        for channel in channels.values():
            channel.close()

    def _send(self, call: Call, result: Future[Any]) -> Future[Any]:
        kind = type(call.request)
        try:
            method = self._methods.get((call.address, kind)) or self._method(call.address, kind)
            rpc = method(call.request, timeout=call.timeout)
        except ValueError:  # dropped since we looked
            return self._send(call, result)
        except BaseException:
            self._under_way.discard(result)
            raise
        rpc.add_done_callback(lambda rpc: self._answered(result, _outcome(rpc, call)))
        return result

    def _answered(self, result: Future[Any], outcome: Any) -> None:
        self._under_way.discard(result)
        result.set_result(outcome)

    def _begin(self, call: Call) -> _Trip | Future[Any]:
        if call.shape is None:
            return self._send(call, Future())
        while True:
            streams = self._streams.get(call.address) or self._open_streams(call.address)
            try:
                stream = streams.take()
            except _Refused:
                continue  # dropped since we looked
            if stream is None:
                return self._send(call, Future())
            return _Trip(call, stream, streams, self._watchdog)

    def _open_streams(self, address: str) -> _Streams:
        while True:
            channel = self._channel(address)
            with self._lock:
                if self._channels.get(address) is channel:
                    return self._streams.setdefault(address, _Streams(channel))

    def _channel(self, address: str) -> grpc.Channel:
        """Opened when there is none; waits where all were dropped for a while. Raises Unavailable once closed."""
        forks.check_grpc()
        with self._changed:
            while self._dropped and not self._closed:
                self._changed.wait()
            if self._closed:
                raise Unavailable(_CLOSED)
            if address not in self._channels:
                self._channels[address] = open_channel(address)
            return self._channels[address]

    def _method(self, address: str, kind: type[Message] | type[rows.Request]) -> Callable[..., Any]:
        serializer = rows.Request.message if kind is rows.Request else kind.SerializeToString  # type: ignore[union-attr]
        channel = self._channel(address)
        method: Callable[..., Any] = channel.unary_unary(_METHODS[kind], serializer).future
        with self._lock:
            if self._channels.get(address) is channel:
                self._methods[address, kind] = method
        return method


_CLOSED = "this client is closed"
_PAUSED = "cancelled, for this process forks"
# Seconds: how often is looked whether calls have ended, and how long cancelled ones may take for it.
_LOOK, _LEAVING = 0.0005, 0.2


class _Refused(Exception):
    """These streams are closed."""


def _let_malloc_keep_answers() -> None:
    """Free a block of 32 MiB that nobody wrote to.

    glibc gives what is freed back to the kernel from a size on that begins at 128 KiB and becomes twice that of the
    largest block that was freed. Until a process has freed such a block, an answer of megabytes may spend more time on
    page faults than on anything else.
    """
    bytes(_LARGEST_LEARNT)


class _Streams:
    """The streams to one address. One that is taken is its taker's alone until it is given back."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._channel = channel
        self._idle: list[Stream] = []
        self._taken: set[Stream] = set()
        self._lock = threading.Lock()
        self._closed = False

    def take(self) -> tuple[Stream, bool] | None:
        """A stream, and whether it was used before; None where there are too many."""
        with self._lock:
            if self._closed:
                raise _Refused
            if self._idle:
                stream = self._idle.pop()
                self._taken.add(stream)
                return stream, True
            if len(self._taken) >= MOST_STREAMS:
                return None
            return self._fresh(), False

    def replace(self, stream: Stream) -> Stream | None:
        """A fresh stream for one that has ended, and for all that waited as long as it did; None once closed."""
        with self._lock:
            self._taken.discard(stream)
            idle, self._idle = self._idle, []
            if self._closed:
                return None
            fresh = self._fresh()
        _end(idle)
        return fresh

    def give_back(self, stream: Stream) -> None:
        """It was answered and may be used again."""
        with self._lock:
            if stream in self._taken:
                self._taken.remove(stream)
                self._idle.append(stream)

    def drop(self, stream: Stream) -> None:
        """It has ended, or nobody waits for what it is asked."""
        with self._lock:
            self._taken.discard(stream)

    def close(self, why: str) -> None:
        """End all streams; whoever waits for one is told why."""
        with self._lock:
            self._closed = True
            idle, taken = self._idle, list(self._taken)
            self._idle = []
        _end(idle)
        for stream in taken:
            stream.cancel(grpc.StatusCode.CANCELLED, why)

    def _fresh(self) -> Stream:
        stream = open_stream(self._channel)
        self._taken.add(stream)
        return stream


def _end(streams: Sequence[Stream]) -> None:
    for stream in streams:
        stream.cancel(grpc.StatusCode.CANCELLED, "not used any more")
    for stream in streams:
        while not isinstance(stream.receive(), Ended):
            pass


class _Trip:
    """A lookup there and back on a stream."""

    def __init__(self, call: Call, taken: tuple[Stream, bool], streams: _Streams, watchdog: Watchdog) -> None:
        self._call = call
        self._streams = streams
        self._watchdog = watchdog
        self._due = time.monotonic() + call.timeout
        self._stream: Stream | None = None
        self._used_before = taken[1]
        self._send(taken[0])

    def result(self) -> Any:
        """Wait for the outcome."""
        assert self._stream is not None
        answer = self._stream.receive()
        self._watchdog.forget(self._stream)
        if isinstance(answer, Ended) and self._used_before and time.monotonic() < self._due:
            # It may have ended long ago, and says nothing about who is there now. Asking twice does no harm.
            self._used_before = False
            fresh = self._streams.replace(self._stream)
            if fresh is not None:
                self._send(fresh)
                return self.result()
        if isinstance(answer, Ended):
            self.close()
            return Failure(answer.code, answer.message)
        self._streams.give_back(self._stream)
        self._stream = None
        return _read(answer, self._call)

    def close(self) -> None:
        """Give up what was not waited for."""
        if self._stream is not None:
            self._watchdog.forget(self._stream)
            self._streams.drop(self._stream)
            _end([self._stream])
            self._stream = None

    def _send(self, stream: Stream) -> None:
        self._stream = stream
        self._watchdog.watch(stream, self._due)
        assert isinstance(self._call.request, rows.Request)
        stream.send(self._call.request.streamed())


def _read(message: bytes, call: Call) -> Any:
    assert call.shape is not None
    try:
        answer = rows.read_streamed(message, call.shape)
    except DecodeError as error:
        return _undecodable(error)
    if isinstance(answer, wire.LookupFailure):
        return Failure(_CODES.get(answer.code, grpc.StatusCode.UNKNOWN), answer.message)
    return answer


_CODES = {code.value[0]: code for code in grpc.StatusCode}


def _outcome(rpc: Any, call: Call) -> Any:
    if rpc.code() is not grpc.StatusCode.OK:
        return Failure(rpc.code(), rpc.details() or "")
    try:
        if call.shape is not None:
            return rows.read(rpc.result(), call.shape)
        return wire.Routing.FromString(rpc.result())
    except DecodeError as error:
        return _undecodable(error)


def _undecodable(error: DecodeError) -> Failure:
    return Failure(grpc.StatusCode.INTERNAL, f"the answer is no message of this service: {error}")
