"""Asking a second owner when the first one takes unusually long."""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections import deque
from concurrent.futures import Future
from functools import partial
from typing import Any

from embedding_service.client.transport import Call, Failure, Transport

# Of the last calls, the share that was answered sooner than the delay after which another owner is asked: so many calls
# in a hundred are asked twice, at most.
QUANTILE = 0.95
WINDOW, LEAST = 512, 64


class HedgingTransport(Transport):
    """Sends a call's `alternative` too when no answer came within the measured delay; the first good answer counts.

    Until enough calls were measured nothing is asked twice. One thread waits for all the calls.
    """

    def __init__(self, inner: Transport) -> None:
        self._inner = inner
        self._latencies: deque[float] = deque(maxlen=WINDOW)
        self._delay: float | None = None
        self._measured = itertools.count(1)
        self._due: list[tuple[float, int, Call, Future[Any], list[Future[Any]]]] = []
        self._order = itertools.count()
        self._wake = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="hedging", daemon=True)
        self._thread.start()

    @property
    def delay(self) -> float | None:
        """Seconds after which a second owner is asked; None while too little was measured."""
        return self._delay

    def send(self, call: Call) -> Future[Any]:
        """Start a call, and perhaps later its alternative."""
        began = time.monotonic()
        first = self._inner.send(call)
        first.add_done_callback(lambda future: self._measure(future.result(), time.monotonic() - began))
        delay = self._delay
        if call.alternative is None or delay is None:
            return first
        result: Future[Any] = Future()
        asked = [first]
        with self._wake:
            heapq.heappush(self._due, (began + delay, next(self._order), call.alternative, result, asked))
            self._wake.notify()
        first.add_done_callback(partial(self._settle, result, asked))
        return result

    def pause(self, deadline: float) -> None:
        """See `Transport.pause`."""
        self._inner.pause(deadline)

    def resume(self) -> None:
        """See `Transport.resume`."""
        self._inner.resume()

    def close(self) -> None:
        """Drop all connections; calls under way end as failures."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._inner.close()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._wake:
                while not self._closed and (not self._due or self._due[0][0] > time.monotonic()):
                    self._wake.wait(self._due[0][0] - time.monotonic() if self._due else None)
                if self._closed:
                    return
                _, _, alternative, result, asked = heapq.heappop(self._due)
            if not result.done():
                second = self._inner.send(alternative)
                asked.append(second)
                second.add_done_callback(partial(self._settle, result, asked))

    def _settle(self, result: Future[Any], asked: list[Future[Any]], future: Future[Any]) -> None:
        """Take an answer; take a failure only when nobody is left who may do better."""
        with self._wake:
            if result.done():
                return
            if isinstance(future.result(), Failure) and not all(each.done() for each in asked):
                return
            result.set_result(future.result())

    def _measure(self, outcome: Any, seconds: float) -> None:
        if isinstance(outcome, Failure):
            return
        self._latencies.append(seconds)
        if next(self._measured) % LEAST == 0:
            latencies = sorted(self._latencies)
            self._delay = latencies[int(QUANTILE * len(latencies))]
