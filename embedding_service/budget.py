"""The bytes of requests and answers that may be under way in a process at a time."""

from __future__ import annotations

import asyncio
import threading

from embedding_service.errors import Overloaded
from embedding_service.machine import give_freed_memory_back

# Less is not counted. A connection's open calls bound it, and counting takes time.
COUNTED_BYTES = 64 << 10
# After much was under way, and then little for some seconds, malloc's freed memory goes back to the kernel.
MUCH_BYTES, LITTLE_BYTES = 128 << 20, 16 << 20
LOOK_SECONDS = 2.0


class Budget:
    """Bytes that are promised before anything is made of them. Thread-safe.

    A request is always granted while nothing else is under way. So everything within a request's limits is answered at
    some time.

    Attributes:
        most: Bytes that may be under way.
        left: The bytes of those that may still be taken.
    """

    def __init__(self, most: int) -> None:
        self.most = self.left = most
        self._peak = 0
        self._lock = threading.Lock()

    def take(self, nbytes: int) -> bool:
        """Whether `nbytes` may come under way. If so, they count until they are given back."""
        with self._lock:
            if nbytes > self.left < self.most:
                return False
            self._add(nbytes)
            return True

    def promise(self, nbytes: int) -> None:
        """`take`, or raise Overloaded."""
        if not self.take(nbytes):
            raise Overloaded(self.refusal(nbytes))

    def count(self, nbytes: int) -> None:
        """`nbytes` are under way, even if less is left."""
        with self._lock:
            self._add(nbytes)

    def give_back(self, nbytes: int) -> None:
        """`nbytes` are not under way any more."""
        with self._lock:
            self.left += nbytes

    def refusal(self, nbytes: int) -> str:
        """The message for `nbytes` that were not granted."""
        return (
            f"this request needs {nbytes:,} bytes of memory, and of the {self.most:,} for requests and answers only "
            f"{max(self.left, 0):,} are free: ask again in a moment, for less at a time, and read what is answered; a "
            "lower --memory, or a higher limit of the container's memory, leaves more"
        )

    async def watch(self) -> None:
        """Give freed memory back to the kernel after much was under way, until cancelled."""
        much = False
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            peak = self._take_peak()
            if much and peak < LITTLE_BYTES:
                await asyncio.to_thread(give_freed_memory_back)
                much = False
            much = much or peak > MUCH_BYTES

    def _add(self, nbytes: int) -> None:
        self.left -= nbytes
        self._peak = max(self._peak, self.most - self.left)

    def _take_peak(self) -> int:
        """The most that was under way since the last call."""
        with self._lock:
            peak, self._peak = self._peak, self.most - self.left
            return peak
