"""Threads that read the same rows again and again while a test moves the parts they lie in."""

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from embedding_service.errors import NotFound
from embedding_service.rows.base import TableRows

# Seconds.
PATIENCE = 10.0


class Readers:
    """Counts what the threads saw: `outcomes` "right", "wrong", and "none" for rows that are not held."""

    def __init__(self, rows: TableRows, ids: np.ndarray, expected: np.ndarray) -> None:
        self.outcomes: Counter[str] = Counter()
        self._rows, self._ids, self._expected = rows, ids, expected
        self._done = threading.Event()
        self._threads = [threading.Thread(target=self._read) for _ in range(3)]

    def wait_for_right(self) -> None:
        """Wait until one of them saw right rows once more. A part that goes again at once is right for nobody."""
        before, until = self.outcomes["right"], time.monotonic() + PATIENCE
        while self.outcomes["right"] == before and time.monotonic() < until:
            time.sleep(0.001)

    def start(self) -> None:
        """Begin to read."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Returns when all of them have ended."""
        self._done.set()
        for thread in self._threads:
            thread.join()

    def _read(self) -> None:
        while not self._done.is_set():
            try:
                right = np.array_equal(self._rows.gather(self._ids, "stored"), self._expected)
                self.outcomes["right" if right else "wrong"] += 1
            except NotFound:
                self.outcomes["none"] += 1
                time.sleep(0.001)  # else three readers hold the interpreter, and a load waits for it again and again


@contextmanager
def reading(rows: TableRows, ids: np.ndarray, expected: np.ndarray) -> Iterator[Readers]:
    """Readers of `ids` int64 [n], whose stored rows are `expected`."""
    readers = Readers(rows, ids, expected)
    readers.start()
    try:
        yield readers
    finally:
        readers.stop()
