"""What an identity may take of a process: calls at once, and so much a second. Each process counts by itself."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from embedding_service.errors import QuotaExceeded
from embedding_service.security.policy import Identity

# Seconds of its rate that an identity may take at once, after it took nothing for a while.
BURST_SECONDS = 1.0
# Seconds after which a call may come again that was one too many.
CALL_SECONDS = 0.1


_KINDS = ("rows", "bytes", "tokens")


class _Bucket:
    """Holds what may be taken, and is filled at a rate. It may be owed, so that any single request is granted."""

    def __init__(self, rate: float, now: float) -> None:
        self.rate, self._at = rate, now
        self.level = rate * BURST_SECONDS

    def wait(self, now: float) -> float:
        """Seconds until something may be taken again."""
        self.level = min(self.level + (now - self._at) * self.rate, self.rate * BURST_SECONDS)
        self._at = now
        return 0.0 if self.level > 0 else (1 - self.level) / self.rate


class Quota:
    """Of one identity. Thread-safe.

    Args:
        name: The identity's.
        limits: What the policy gives it.
        clock: Seconds now.
    """

    def __init__(self, name: str, limits: Identity, clock: Callable[[], float] = time.monotonic) -> None:
        self._name, self._clock = name, clock
        self._lock = threading.Lock()
        self._calls = 0
        self.limit(limits)

    def limit(self, limits: Identity) -> None:
        """The policy gives it other limits. Calls that are open still count."""
        now = self._clock()
        with self._lock:
            self._most = limits.calls
            rates = (limits.rows_per_second, limits.bytes_per_second, limits.tokens_per_second)
            self._buckets = {what: _Bucket(rate, now) for what, rate in zip(_KINDS, rates, strict=True) if rate}

    def enter(self) -> None:
        """A call begins. Raises QuotaExceeded if too many are open."""
        with self._lock:
            if self._most is None or self._calls < self._most:
                self._calls += 1
                return
        raise QuotaExceeded(f"{self._name} has {self._most:,} calls open here, its quota: end some first", CALL_SECONDS)

    def leave(self) -> None:
        """A call that was let in has ended."""
        with self._lock:
            self._calls -= 1

    def owe(self, tokens: int) -> None:
        """Take tokens that nobody could count before."""
        self._take(tokens=tokens)

    def give_back(self, rows: int = 0, nbytes: int = 0, tokens: int = 0) -> None:
        """What was spent was not had."""
        self._take(-rows, -nbytes, -tokens)

    def _take(self, rows: int = 0, nbytes: int = 0, tokens: int = 0) -> None:
        with self._lock:
            for each, amount in zip(_KINDS, (rows, nbytes, tokens), strict=True):
                if each in self._buckets:
                    self._buckets[each].level -= amount

    def spend(self, rows: int = 0, nbytes: int = 0, tokens: int = 0) -> None:
        """Take so much, or raise QuotaExceeded with the seconds to wait."""
        if not self._buckets:
            return
        with self._lock:
            now = self._clock()
            waits = [(bucket.wait(now), what) for what, bucket in self._buckets.items()]
            seconds, what = max(waits)
            if not seconds:
                for each, amount in zip(_KINDS, (rows, nbytes, tokens), strict=True):
                    if each in self._buckets:
                        self._buckets[each].level -= amount
                return
            rate = self._buckets[what].rate
        raise QuotaExceeded(
            f"{self._name} has used its quota of {rate:,.0f} {what} a second here: ask again in {seconds:.3f} s",
            seconds,
        )
