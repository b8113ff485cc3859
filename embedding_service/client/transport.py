"""Sending calls to addresses: the connections, which threads and event loops share."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Generator, Iterable, Sequence
from concurrent.futures import Future
from functools import cached_property
from typing import Any, NamedTuple

import grpc
from google.protobuf.message import DecodeError, Message

from embedding_service.client import forks
from embedding_service.client.calls import Call, Failure, undecodable
from embedding_service.client.channels import open_channel
from embedding_service.client.coalescing import Coalescer
from embedding_service.client.trips import Pool, Trips, Watchdog
from embedding_service.errors import EmbeddingServiceError, Unavailable
from embedding_service.grpc_codes import PUSHBACK
from embedding_service.security.access import Access
from embedding_service.wire import embedding_pb2 as wire
from embedding_service.wire.lookup_codec import EncodedLookup, read

_METHODS: dict[type[Message] | type[EncodedLookup], str] = {
    EncodedLookup: "/embedding.v1.EmbeddingService/Lookup",
    wire.GetRoutingRequest: "/embedding.v1.EmbeddingService/GetRouting",
}

# The largest block from which glibc learns how much freed memory to keep, less what it adds to a block.
_LARGEST_LEARNT = (32 << 20) - (64 << 10)


class GrpcTransport:
    """Sends calls. A call's outcome is what `Call` says; nothing is raised for it.

    There is one channel an address, opened when it is first used and shared by all threads. `send` makes unary calls.
    `exchange` takes a stream of each address for as long as its call takes. Streams are kept open.

    Args:
        access: What connections show and believe. None: plain text.
        named: The addresses that may still be asked. Connections to others are closed after a while. None: all may.
    """

    def __init__(self, access: Access | None = None, named: Callable[[], Collection[str]] | None = None) -> None:
        _let_malloc_keep_answers()
        self._access, self._named = access, named
        self._stamp = access.stamp() if access else ()
        self._looks_at = 0.0
        # Connections that show files of before, or are to who is gone, until their calls have ended.
        self._outdated: list[_Outdated] = []
        # Since when nobody names an address that there is a connection to.
        self._unnamed: dict[str, float] = {}
        # Those that others make calls on, which nobody counts.
        self._lent: set[grpc.Channel] = set()
        self._channels: dict[str, grpc.Channel] = {}
        self._methods: dict[tuple[str, type[Message] | type[EncodedLookup]], Callable[..., Any]] = {}
        self._pools: dict[str, Pool] = {}
        self._watchdog = Watchdog()
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        # What was begun and has not ended: exchanges, and the results of unary calls.
        self._under_way: set[object] = set()
        self._closed = False
        self._pauses = 0
        self._dropped = False

    def send(self, call: Call) -> Future[Any]:
        """Start a unary call. It ends when its result is cancelled. Raises Unavailable once closed."""
        result: Future[Any] = Future()
        self._enter(result)
        return self._send(call, result)

    def exchange(self, calls: Sequence[Call], meanwhile: Callable[[], object] | None = None) -> list[Any]:
        """Make calls at the same time and wait for all their outcomes, in order. Raises Unavailable once closed.

        `meanwhile` is called once they are on their way.
        """
        this = object()
        self._enter(this)
        try:
            return self._trips(calls).all(meanwhile)
        finally:
            self._under_way.discard(this)

    def exchange_in_turn(
        self, calls: Sequence[Call], meanwhile: Callable[[], object] | None = None
    ) -> Generator[Any, None, None]:
        """`exchange`, where each outcome comes when it is there. Close it to give up the rest."""
        this = object()
        self._enter(this)
        try:
            yield from self._trips(calls).in_turn(meanwhile)
        finally:
            self._under_way.discard(this)

    @cached_property
    def together(self) -> Coalescer:
        """`exchange` for event loops."""
        return Coalescer(self.send)

    def channel(self, address: str) -> grpc.Channel:
        """An address's connection, for calls that are not a `Call`. Raises Unavailable once closed."""
        self._look_now_and_then()
        channel = self._channel(address)
        with self._lock:
            if self._channels.get(address) is channel:
                self._lent.add(channel)
        return channel

    def close(self) -> None:
        """Drop all connections; calls under way end as failures."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._watchdog.close()
        self._drop(_CLOSED)

    def pause(self, deadline: float) -> None:
        """Drop all connections, which is waited for until `deadline` on time.monotonic's clock.

        Calls that are under way may end before; those that do not, end as failures. Others wait for `resume`.
        """
        with self._lock:
            self._pauses += 1
        self._wait_for_ends(deadline)
        with self._lock:
            self._dropped = True
        self._drop(_PAUSED)
        self._wait_for_ends(time.monotonic() + _LEAVING)

    def resume(self) -> None:
        """Make calls again; after several `pause`s it takes as many."""
        with self._changed:
            self._pauses -= 1
            self._dropped = self._pauses > 0
            self._changed.notify_all()

    def _enter(self, this: object) -> None:
        """Count what begins, and wait while paused. `pause` first says that it pauses, then looks at the count."""
        self._look_now_and_then()
        self._under_way.add(this)
        while self._pauses and not self._closed:
            self._under_way.discard(this)
            with self._changed:
                while self._pauses and not self._closed:
                    self._changed.wait()
            self._under_way.add(this)

    def _look_now_and_then(self) -> None:
        if time.monotonic() > self._looks_at:
            self._look()

    def _look(self) -> None:
        """Let go of connections that show files of before, or are to who is gone. They end with their calls."""
        now = time.monotonic()
        with self._lock:
            self._looks_at = now + _LOOK_SECONDS
            stamp = self._access.stamp() if self._access else ()
            if stamp != self._stamp:
                self._stamp = stamp
                self._outdate(bool(self._lent), self._take(list(self._channels)))
            if gone := self._gone(now):
                self._outdate(False, self._take(gone))
            over = [each for each in self._outdated if each.has_ended(now, self._under_way)]
            self._outdated = [each for each in self._outdated if each not in over]
        for each in over:
            _close(each.connections, _OUTDATED)

    def _outdate(self, lent: bool, connections: _Connections) -> None:
        """Close these when what is under way now has ended. With the lock."""
        until = time.monotonic() + _OUTDATED_SECONDS
        self._outdated.append(_Outdated(until, lent, frozenset(self._under_way), connections))

    def _gone(self, now: float) -> list[str]:
        """Addresses that nobody has named for a while, and that nobody else makes calls to. With the lock."""
        if self._named is None:
            return []
        unnamed = self._channels.keys() - self._named()
        self._unnamed = {address: self._unnamed.get(address, now) for address in unnamed}
        return [
            address
            for address, since in self._unnamed.items()
            if now - since > _GONE_SECONDS and self._channels[address] not in self._lent
        ]

    def _take(self, addresses: Iterable[str]) -> _Connections:
        """Connections, which nobody finds any more. With the lock."""
        pools, channels = [], []
        for address in addresses:
            channels.append(self._channels.pop(address))
            self._lent.discard(channels[-1])
            if pool := self._pools.pop(address, None):
                pools.append(pool)
            for kind in _METHODS:
                self._methods.pop((address, kind), None)
        return pools, channels

    def _wait_for_ends(self, deadline: float) -> None:
        while self._under_way and time.monotonic() < deadline:
            time.sleep(_LOOK)

    def _drop(self, why: str) -> None:
        with self._lock:
            dropped = [self._take(list(self._channels)), *(each.connections for each in self._outdated)]
            self._outdated = []
        for each in dropped:
            _close(each, why)

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
        rpc.add_done_callback(lambda rpc: self._answered(result, _outcome(rpc, call, self._access)))
        result.add_done_callback(lambda result: result.cancelled() and rpc.cancel())
        return result

    def _answered(self, result: Future[Any], outcome: Any) -> None:
        self._under_way.discard(result)
        if result.set_running_or_notify_cancel():
            result.set_result(outcome)

    def _trips(self, calls: Sequence[Call]) -> Trips:
        """Lookups take streams. What is no lookup, or finds no stream left, is a unary call."""
        trips = Trips(self._watchdog)
        try:
            for call in calls:
                if call.shape is None or not trips.add(call, self._pools.get(call.address) or self._pool(call.address)):
                    trips.add_unary(call, self._send(call, Future()))
        except BaseException:
            trips.close()
            raise
        return trips

    def _pool(self, address: str) -> Pool:
        while True:
            channel = self._channel(address)
            with self._lock:
                if self._channels.get(address) is channel:
                    return self._pools.setdefault(address, Pool(channel))

    def _channel(self, address: str) -> grpc.Channel:
        """The address's connection, opened if there is none. Waits while paused. Raises Unavailable once closed."""
        forks.check_grpc()
        with self._changed:
            while self._dropped and not self._closed:
                self._changed.wait()
            if self._closed:
                raise Unavailable(_CLOSED)
            if address not in self._channels:
                self._channels[address] = open_channel(address, self._access)
            return self._channels[address]

    def _method(self, address: str, kind: type[Message] | type[EncodedLookup]) -> Callable[..., Any]:
        serializer = EncodedLookup.message if kind is EncodedLookup else kind.SerializeToString  # type: ignore[union-attr]
        channel = self._channel(address)
        method: Callable[..., Any] = channel.unary_unary(_METHODS[kind], serializer).future
        with self._lock:
            if self._channels.get(address) is channel:
                self._methods[address, kind] = method
        return method


_Connections = tuple[list[Pool], list[grpc.Channel]]


class _Outdated(NamedTuple):
    """Connections that nobody finds any more.

    Attributes:
        until: When they end at the latest.
        lent: Somebody else makes calls on them too.
        under_way: What had begun when they were taken away.
    """

    until: float
    lent: bool
    under_way: frozenset[object]
    connections: _Connections

    def has_ended(self, now: float, under_way: set[object]) -> bool:
        """Whether nobody needs them any more."""
        return now > self.until or not (self.lent or self.under_way & under_way)


# Seconds between two looks at the files that are shown, and those that calls on connections of before may take.
_LOOK_SECONDS, _OUTDATED_SECONDS = 1.0, 60.0
# Seconds that an address is not named until it is gone. One that is cut off for a moment keeps its connection.
_GONE_SECONDS = 60.0
_OUTDATED = "the connection shows files of before, or is to an address that the routing names no more"
_CLOSED = "this client is closed"
_PAUSED = "cancelled, for this process forks"
# Seconds between two looks whether calls have ended, and seconds that cancelled ones may take to end.
_LOOK, _LEAVING = 0.0005, 0.2


def _close(connections: _Connections, why: str) -> None:
    pools, channels = connections
    for pool in pools:
        pool.close(why)
    for channel in channels:
        channel.close()


def _let_malloc_keep_answers() -> None:
    """Free a block of 32 MiB that nobody wrote to.

    From some size on, glibc gives freed blocks back to the kernel. That size begins at 128 KiB and becomes twice that
    of the largest block that was freed. Until a process has freed such a block, an answer of megabytes may spend most
    of its time on page faults.
    """
    bytes(_LARGEST_LEARNT)


def _pushback(trailing: Iterable[tuple[str, str | bytes]]) -> float:
    """Seconds after which the shard lets a call be made again. 0 where it does not say."""
    said = dict(trailing).get(PUSHBACK, "0")
    return int(said) / 1000 if isinstance(said, str) and said.isdecimal() else 0.0


def _outcome(rpc: Any, call: Call, access: Access | None) -> Any:
    if rpc.code() is not grpc.StatusCode.OK:
        return Failure(rpc.code(), rpc.details() or "", _pushback(rpc.trailing_metadata() or ()))
    try:
        if call.shape is not None:
            return read(rpc.result(), call.shape)
        routing = wire.Routing.FromString(rpc.result())
        if access:
            access.check_routing(routing, (call.request.term, call.request.epoch))  # type: ignore[union-attr]
        return routing
    except DecodeError as error:
        return undecodable(error)
    except EmbeddingServiceError as error:  # another one may give the controller's own
        return Failure(grpc.StatusCode.UNAVAILABLE, f"{call.address}: {error}")
