"""Lookups there and back on streams that are kept open. It has pools of streams, and watches for late answers."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from embedding_service.client.calls import Call, Failure, undecodable
from embedding_service.client.streams import Ended, Stream, open_stream
from embedding_service.wire import embedding_pb2 as wire
from embedding_service.wire.lookup_codec import read_streamed

# Streams to one address. A shard takes 256 calls on a connection. Further threads make unary calls.
MOST_STREAMS = 64
# Seconds for which the watchdog's thread stays though there is nothing to watch.
LINGER_SECONDS = 60.0


class Pool:
    """The streams to one address. A taken one is its taker's alone until it is given back."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._channel = channel
        self._idle: list[Stream] = []
        self._taken: set[Stream] = set()
        self._lock = threading.Lock()
        self._closed = False

    def take(self) -> tuple[Stream, bool] | None:
        """A stream, and whether it was used before. None if there are too many, and once closed."""
        with self._lock:
            if self._closed:
                return None
            if self._idle:
                stream = self._idle.pop()
                self._taken.add(stream)
                return stream, True
            if len(self._taken) >= MOST_STREAMS:
                return None
            return self._fresh(), False

    def replace(self, stream: Stream) -> Stream | None:
        """A fresh stream in place of one that has ended, and of all that waited as long. None once closed."""
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
        """It has ended, or nobody waits for its answer."""
        with self._lock:
            self._taken.discard(stream)

    def close(self, why: str) -> None:
        """End all streams. Those that wait for one are told why."""
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


class Watchdog:
    """Cancels streams whose answer did not come in time. One thread serves all.

    It ends by itself once nothing was watched for a while, since not everybody closes a client.
    """

    def __init__(self) -> None:
        self._due: dict[Stream, float] = {}
        self._wakes = float("inf")
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._thread: threading.Thread | None = None
        self._closed = False

    def watch(self, due: Mapping[Stream, float]) -> None:
        """Cancel each stream at its time (on time.monotonic's clock), unless it is forgotten before."""
        earliest = min(due.values(), default=float("inf"))
        with self._lock:
            self._due.update(due)
            if earliest < self._wakes and not self._closed:
                self._wakes = earliest
                self._changed.notify()
                if self._thread is None:
                    self._thread = threading.Thread(target=self._run, name="lookup-deadlines", daemon=True)
                    self._thread.start()

    def forget(self, streams: Iterable[Stream]) -> None:
        """Their answers are there."""
        with self._lock:
            for stream in streams:
                self._due.pop(stream, None)

    def close(self) -> None:
        """Let the thread end."""
        with self._changed:
            self._closed = True
            self._changed.notify()
            thread = self._thread
        if thread:
            thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                if self._closed:
                    return
                now = time.monotonic()
                late = [stream for stream, due in self._due.items() if due <= now]
                for stream in late:
                    del self._due[stream]
                # If all were answered it keeps its time. Or each call that is answered at once would wake it again.
                idle = self._wakes if self._wakes > now else float("inf")
                self._wakes = min(self._due.values(), default=idle)
                if not late:
                    # It wakes up for those that are due sooner, and not for those that were forgotten.
                    pause = LINGER_SECONDS if self._wakes == float("inf") else self._wakes - now
                    if not self._changed.wait(pause) and self._wakes == float("inf"):
                        self._thread = None
                        return
                    continue
            for stream in late:
                stream.cancel(grpc.StatusCode.DEADLINE_EXCEEDED, "no answer in time")


class _Unary:
    """A unary call that was begun, where a stream would be."""

    def __init__(self, outcome: Future[Any]) -> None:
        self._outcome = outcome

    def receive(self) -> Any:
        return self._outcome.result()


@dataclass(eq=False, slots=True)
class _Trip:
    """One call. Its `stream` is its own until it was answered. `pool` is None for a unary call."""

    call: Call
    stream: Any
    pool: Pool | None
    used_before: bool
    due: float


class Trips:
    """Calls under way at the same time: lookups there and back on streams, each its own, and unary calls."""

    def __init__(self, watchdog: Watchdog) -> None:
        self._watchdog = watchdog
        self._trips: list[_Trip] = []

    def add(self, call: Call, pool: Pool) -> bool:
        """Take a stream for a lookup. False: there is none to be had."""
        taken = pool.take()
        if taken is not None:
            stream, used_before = taken
            self._trips.append(_Trip(call, stream, pool, used_before, time.monotonic() + call.timeout))
        return taken is not None

    def add_unary(self, call: Call, outcome: Future[Any]) -> None:
        """One that was begun elsewhere."""
        self._trips.append(_Trip(call, _Unary(outcome), None, False, 0.0))

    def all(self, meanwhile: Callable[[], object] | None = None) -> list[Any]:
        """Send all, do what is to be done meanwhile, and wait for all: their outcomes, in order."""
        trips, answers = self._trips, []
        try:
            self._send(meanwhile)
            for trip in trips:
                answers.append(trip.stream.receive())
            self._watchdog.forget([trip.stream for trip in trips])
            return _outcomes(trips, [self._settled(*each) for each in zip(trips, answers, strict=True)])
        except BaseException:
            self.close()
            raise

    def in_turn(self, meanwhile: Callable[[], object] | None = None) -> Generator[Any, None, None]:
        """Send all, and do what is to be done meanwhile. Outcomes come in order, each when it is there.

        Close it to give up the rest.
        """
        try:
            self._send(meanwhile)
            for trip in self._trips:
                answer = trip.stream.receive()
                self._watchdog.forget([trip.stream])
                yield from _outcomes([trip], [self._settled(trip, answer)])
        finally:
            self.close()

    def close(self) -> None:
        """Give up what was not waited for."""
        for trip in self._trips:
            if trip.pool is not None:
                self._give_up(trip, trip.pool)

    def _send(self, meanwhile: Callable[[], object] | None) -> None:
        self._watchdog.watch({trip.stream: trip.due for trip in self._trips if trip.pool is not None})
        for trip in self._trips:
            if trip.pool is not None:
                trip.stream.send(trip.call.request.streamed)  # type: ignore[union-attr]
        if meanwhile is not None:
            meanwhile()

    def _settled(self, trip: _Trip, answer: Any) -> Any:
        """Give the stream back. One that was used before may have ended long ago. Then the lookup is sent once more.

        That end says nothing about who is there now, and asking twice does no harm.
        """
        pool = trip.pool
        if pool is None:
            return answer
        if isinstance(answer, Ended) and trip.used_before and time.monotonic() < trip.due:
            fresh = pool.replace(trip.stream)
            if fresh is not None:
                trip.stream, trip.used_before = fresh, False
                self._watchdog.watch({fresh: trip.due})
                fresh.send(trip.call.request.streamed)  # type: ignore[union-attr]
                answer = fresh.receive()
                self._watchdog.forget([fresh])
        if isinstance(answer, Ended):
            self._give_up(trip, pool)
            return Failure(answer.code, answer.message)
        trip.pool = None
        pool.give_back(trip.stream)
        return answer

    def _give_up(self, trip: _Trip, pool: Pool) -> None:
        trip.pool = None
        self._watchdog.forget([trip.stream])
        pool.drop(trip.stream)
        _end([trip.stream])


def _outcomes(trips: Sequence[_Trip], answers: Sequence[Any]) -> list[Any]:
    """What was not read yet is read."""
    outcomes: list[Any] = []
    for trip, answer in zip(trips, answers, strict=True):
        outcome = answer
        if isinstance(answer, bytes):
            try:
                outcome = read_streamed(answer, trip.call.shape)  # type: ignore[arg-type]
            except DecodeError as error:
                outcome = undecodable(error)
        if isinstance(outcome, wire.LookupFailure):
            code = _CODES.get(outcome.code, grpc.StatusCode.UNKNOWN)
            outcome = Failure(code, outcome.message, outcome.retry_after_ms / 1000)
        outcomes.append(outcome)
    return outcomes


_CODES = {code.value[0]: code for code in grpc.StatusCode}
