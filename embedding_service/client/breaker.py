"""Remembers which addresses failed lately, so that a dead or hanging shard does not slow everything down."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Set
from dataclasses import dataclass

FIRST_REST, LONGEST_REST = 0.5, 8.0
_NONE: frozenset[str] = frozenset()


@dataclass
class _Failing:
    rest: float
    until: float


class Breaker:
    """A circuit breaker for many addresses. Thread-safe.

    An address that failed rests for 0.5 s. Each further failure doubles that, to 8 s. When its rest is over one caller
    tries it. The others go on avoiding it until that one was answered.

    Attributes:
        failing: What is remembered, by address. Others may look whether it is empty, as it usually is.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.failing: dict[str, _Failing] = {}
        self._lock = threading.Lock()

    def failed(self, address: str) -> None:
        """It did not answer, or too late."""
        with self._lock:
            known = self.failing.get(address)
            rest = min(2 * known.rest, LONGEST_REST) if known else FIRST_REST
            self.failing[address] = _Failing(rest, self._clock() + rest)

    def answered(self, address: str) -> None:
        """It answers, so forget its failures."""
        if address in self.failing:  # the usual case costs no lock
            with self._lock:
                self.failing.pop(address, None)

    def resting(self) -> tuple[Set[str], Set[str]]:
        """Addresses to avoid now, and those whose rest is over. This caller tries those or leaves them `untried`."""
        if not self.failing:
            return _NONE, _NONE
        with self._lock:
            now = self._clock()
            due = {address for address, failing in self.failing.items() if failing.until <= now}
            for address in due:
                self.failing[address].until = now + self.failing[address].rest
            return self.failing.keys() - due, due

    def untried(self, addresses: Set[str]) -> None:
        """The caller that was to try these had no use for them. It is the next one's turn."""
        with self._lock:
            now = self._clock()
            for address in addresses & self.failing.keys():
                self.failing[address].until = now

    def forget_others(self, addresses: Collection[str]) -> None:
        """Forget all other addresses, which are not in use any more."""
        if self.failing:
            with self._lock:
                for address in self.failing.keys() - set(addresses):
                    del self.failing[address]
