"""What every tier can do: hold parts of a table and gather rows from them."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt

from embedding_service.errors import NotFound
from embedding_service.store.manifest import Part, Table
from embedding_service.store.parts import Pace

Ids = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]

STORED = "stored"


class TableRows(ABC):
    """The parts of one table that a shard holds. Thread-safe: parts come and go while rows are gathered."""

    def __init__(self, table: Table) -> None:
        self.table = table
        self._held = np.zeros(len(table.parts), dtype=np.bool_)
        self._accesses = np.zeros(len(table.parts), dtype=np.int64)
        self._readers = _Readers()
        self._leaving: set[int] = set()
        self._changed = threading.Condition()

    def load(self, part: Part, path: Path, pace: Pace = lambda chunk_bytes: None) -> None:
        """Take a part in from its local file, reading at `pace`; it is held only once its checksum held.

        Raises:
            CorruptPart: the file is not what the manifest says.
            MemoryError: no room.
        """
        with self._changed:
            # Its addresses may still be read by those who began before it was dropped.
            self._changed.wait_for(lambda: part.index not in self._leaving)
        self._load(part, path, pace)
        self._held[part.index] = True

    def drop(self, part: Part) -> None:
        """Give a part's memory back, once the last gather that may read it has ended."""
        self._held[part.index] = False
        with self._changed:
            self._leaving.add(part.index)
        self._readers.when_gone(lambda: self._leave(part))

    def _leave(self, part: Part) -> None:
        self._unload(part)
        with self._changed:
            self._leaving.remove(part.index)
            self._changed.notify_all()

    def held_parts(self) -> list[int]:
        """Indices of the parts that are held."""
        return np.flatnonzero(self._held).tolist()

    def accesses(self, part: int) -> int:
        """Rows gathered from a part so far; threads that count at the same time may lose some."""
        return int(self._accesses[part])

    def holds(self, ids: Ids) -> npt.NDArray[np.bool_]:
        """Whether each id's part is held: bool [n] for ids in [0, rows)."""
        return self._held[ids // self.table.rows_per_part]

    def gather(self, ids: Ids, encoding: str) -> Bytes:
        """The rows of `ids` int64 [n], in their order, as uint8 [n, bytes of a row in `encoding`].

        Args:
            ids: Each in [0, rows) and in a held part.
            encoding: "fp32", "fp16", "bf16", or "stored" for the table's own bytes.

        Raises:
            NotFound: a part of them is not held (any more).
        """
        with self._readers.reading():
            parts = ids // self.table.rows_per_part
            if not self._held[parts].all():
                raise NotFound(f"a part of the rows asked of {self.table.name} is not held here")
            np.add.at(self._accesses, parts, 1)
            return self._gather(ids, encoding)

    @abstractmethod
    def close(self) -> None:
        """Give all memory back; nothing may be gathered afterwards."""

    @abstractmethod
    def _load(self, part: Part, path: Path, pace: Pace) -> None: ...

    @abstractmethod
    def _unload(self, part: Part) -> None: ...

    @abstractmethod
    def _gather(self, ids: Ids, encoding: str) -> Bytes: ...


class _Readers:
    """Who reads now, by generation, so that memory is given back only after everyone who may still look at it left."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._generation = 0
        self._reading: Counter[int] = Counter()
        self._waiting: list[tuple[int, Callable[[], None]]] = []

    @contextmanager
    def reading(self) -> Iterator[None]:
        with self._lock:
            generation = self._generation
            self._reading[generation] += 1
        try:
            yield
        finally:
            with self._lock:
                self._reading[generation] -= 1
                due = self._take_due() if self._waiting else []
            for action in due:
                action()

    def when_gone(self, action: Callable[[], None]) -> None:
        """Do it once all who read now have ended; those who come later do not matter."""
        with self._lock:
            self._waiting.append((self._generation, action))
            self._generation += 1
            due = self._take_due()
        for action in due:
            action()

    def _take_due(self) -> list[Callable[[], None]]:
        self._reading = +self._reading  # forget generations without readers
        oldest = min(self._reading, default=self._generation)
        due = [action for generation, action in self._waiting if generation < oldest]
        self._waiting = [entry for entry in self._waiting if entry[0] >= oldest]
        return due
