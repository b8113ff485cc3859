"""What a lookup that took long was waiting for: the calls of each lookup of a client, kept where it was slow."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import grpc

from embedding_service import EmbeddingClient
from embedding_service.client.calls import Call, Failure

# A lookup that takes longer than this many seconds is told step by step.
SLOW = 0.3
# Slow lookups that are kept.
MOST_KEPT = 20


class Trace:
    """Watches the calls that a client's threads wait for.

    Args:
        began: When the run began, on time.monotonic's clock. Times are told from there.

    Attributes:
        slow: The steps of each lookup over `SLOW`, one a line.
        held_up: Slow lookups that were not without the time for which calls outlasted their time: a busy machine's.
        calls, late: Counts of lookups that shards were asked, and of those that were given up for being late.
    """

    def __init__(self, client: EmbeddingClient, began: float) -> None:
        self.slow: list[str] = []
        self.calls = self.late = self.held_up = 0
        self._client, self._began = client, began
        self._steps = threading.local()
        self._lock = threading.Lock()
        transport: Any = client._transport
        self._exchange = transport.exchange
        transport.exchange = self._traced

    @contextmanager
    def lookup(self) -> Iterator[None]:
        """A lookup of this thread."""
        self._steps.lines, self._steps.overdue = [], 0.0
        before = time.monotonic()
        try:
            yield
        finally:
            seconds = time.monotonic() - before
            self.held_up += seconds > SLOW >= seconds - self._steps.overdue
            if seconds > SLOW and len(self.slow) < MOST_KEPT:
                heading = f"at {before - self._began:.3f} s a lookup of {seconds * 1000:.0f} ms"
                self.slow.append("\n  ".join([heading, *self._steps.lines]))

    def _traced(self, calls: Sequence[Call], meanwhile: Callable[[], object] | None = None) -> list[Any]:
        router, now = self._client._router, time.monotonic()
        patience = f"patience {router._patience.seconds:.3f} s of {router._patience.usual:.3f}"
        failing = dict(router._breaker.failing)
        outcomes: list[Any] = self._exchange(calls, meanwhile)
        lookups = [outcome for call, outcome in zip(calls, outcomes, strict=True) if call.shape]
        with self._lock:
            self.calls += len(lookups)
            self.late += sum(map(_is_late, lookups))
        resting = ", ".join(f"{where} for {each.until - now:.2f} s" for where, each in failing.items()) or "none"
        seconds = time.monotonic() - now
        self._steps.overdue += max(0.0, seconds - max(call.timeout for call in calls))
        times = f"{now - self._began:.3f} to {now + seconds - self._began:.3f} s"
        self._steps.lines += [
            f"{times}, {patience}, resting: {resting}",
            *(f"  {_told(call)}: {_outcome(outcome)}" for call, outcome in zip(calls, outcomes, strict=True)),
        ]
        return outcomes


def _told(call: Call) -> str:
    what = f"{call.shape.count} rows" if call.shape else "the routing"
    return f"{call.address} for {what} within {call.timeout:.3f} s"


def _outcome(outcome: Any) -> str:
    return f"{outcome.code.name} {outcome.message}" if isinstance(outcome, Failure) else "answered"


def _is_late(outcome: Any) -> bool:
    return isinstance(outcome, Failure) and outcome.code is grpc.StatusCode.DEADLINE_EXCEEDED
