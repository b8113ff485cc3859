"""What every tier can do: hold parts of a table and gather rows from them."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt

from embedding_service.errors import InvalidRequest, NotFound
from embedding_service.formats import get_format
from embedding_service.formats.plain import plain_dtypes
from embedding_service.late import late
from embedding_service.memory import available_memory
from embedding_service.store.manifest import Part, Table
from embedding_service.store.parts import Pace

if TYPE_CHECKING:
    import torch
else:
    torch = late("torch")

Ids = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]

STORED = "stored"
# Of a gather. A part may have changed its place while it was read, and be there.
_TRIES = 3


class LiesIn(Enum):
    """What takes a tier's rows in, and so what a shard's memory limit counts."""

    HOST = "memory that only this process can free"
    DEVICE = "a GPU's memory"
    FILES = "files, whose pages the kernel keeps as it can"


class Location(NamedTuple):
    """Where a part's rows begin in a file that may be mapped. `offset` is a multiple of the page size."""

    path: str
    offset: int


class TableRows(ABC):
    """The parts of one table that a shard holds. Thread-safe: parts come and go while rows are gathered.

    A part has a generation. It changes with each load and is 0 while the part is not held. A gather compares
    generations before and after, and discards the result if they differ (a seqlock). So nobody waits when a part is
    dropped. Memory that a gather may still read must stay readable, but may hold anything.

    Args:
        shared: Whether other processes of this machine can map the rows (`location`).

    Attributes:
        device: The device whose memory answers: "cpu" or "cuda". Shards of a tier on "cuda" need a GPU.
        lies_in: What takes its rows in.
        shareable: Whether other processes of this machine can map rows that lie here.
        foldable: Whether rows of a held part can be written to (`write`).
    """

    device: ClassVar[str] = "cpu"
    lies_in: ClassVar[LiesIn] = LiesIn.HOST
    shareable: ClassVar[bool] = False
    foldable: ClassVar[bool] = False

    @classmethod
    def check_machine(cls) -> None:
        """Raise InvalidRequest, with the remedy, where this machine cannot have the tier."""
        return  # most tiers need nothing

    @classmethod
    def default_limit(cls, store: str, cache: Path) -> int:
        """Bytes to offer for rows where nobody says: 80 % of the memory that is available.

        store: Path or URL of the store.
        cache: The folder for parts of a remote one.
        """
        return available_memory() * 8 // 10

    @classmethod
    def prepare(cls, memory_limit: int) -> None:
        """Called once in a process, before any table is made. Raises InvalidRequest if this tier cannot work."""
        return  # most tiers need nothing

    def __init__(self, table: Table, *, shared: bool = False) -> None:
        self.table = table
        self.shared = shared
        self._generation = np.zeros(len(table.parts), dtype=np.int64)
        self._loads = itertools.count(1)
        self._accesses = np.zeros(len(table.parts), dtype=np.int64)

    def load(self, part: Part, path: Path, pace: Pace = lambda chunk_bytes: None) -> None:
        """Take a part in from its local file, reading at `pace`. It is held only once its checksum held.

        Raises:
            CorruptPart: the file is not what the manifest says.
            NoRoom: no memory for it.
        """
        self._load(part, path, pace)
        self._generation[part.index] = next(self._loads)

    def drop(self, part: Part) -> None:
        """Give a part's memory back."""
        self._generation[part.index] = 0
        self._unload(part)

    def held_parts(self) -> list[int]:
        """Indices of the parts that are held."""
        return np.flatnonzero(self._generation).tolist()

    def location(self, part: Part, path: Path) -> Location:
        """Where other processes find a held part that was loaded from `path`. For `shared` tables."""
        raise InvalidRequest("rows of this tier cannot be shared between processes: leave --processes at 1")

    def take_accesses(self) -> npt.NDArray[np.int64]:
        """Rows gathered from each part since this was last called: int64 [parts]."""
        taken, self._accesses = self._accesses, np.zeros_like(self._accesses)
        return taken

    def add_accesses(self, accesses: npt.NDArray[np.int64]) -> None:
        """Count what other processes gathered: int64 [parts]."""
        self._accesses += accesses

    def accesses(self, part: int) -> int:
        """Rows gathered from a part so far. Threads that count at the same time may lose some."""
        return int(self._accesses[part])

    def holds(self, ids: Ids) -> npt.NDArray[np.bool_]:
        """Whether each id's part is held: bool [n] for ids in [0, rows)."""
        return self._generation[ids // self.table.rows_per_part] > 0

    def at_hand(self, ids: Ids) -> bool:
        """Whether rows may be gathered on a thread that must not wait. No sampled row lies on a disk only."""
        return True

    def read_ahead(self, ids: Ids) -> None:
        """Start reading non-resident rows in parallel. A gather would read them one after the other."""
        return  # most tiers have no other place

    def gather(self, ids: Ids, encoding: str, out: Bytes | None = None) -> Bytes:
        """The rows of `ids` int64 [n], in their order, as uint8 [n, bytes of a row in `encoding`].

        Args:
            ids: Each in [0, rows) and in a held part.
            encoding: "fp32", "fp16", "bf16", or "stored" for the table's own bytes.
            out: Where to put them.

        Raises:
            NotFound: a part of them is not held (any more).
        """
        parts = ids // self.table.rows_per_part
        for _ in range(_TRIES):
            generation = self._generation[parts]
            if np.count_nonzero(generation) < len(ids):
                break
            rows = self._gather(ids, encoding, out)
            if np.count_nonzero(self._generation[parts] == generation) == len(ids):
                np.add.at(self._accesses, parts, 1)
                return rows
        raise NotFound(f"a part of the rows asked of {self.table.name} is not held here")

    def read(self, ids: Ids) -> Bytes:
        """Stored rows of held parts, for who sees to it that they stay: uint8 [n, row_bytes]."""
        return self._gather(ids, STORED, None)

    def write(self, ids: Ids, rows: Bytes) -> None:
        """Put stored rows in the place of others. Gathers see the old, the new, or some of both. For `foldable`."""
        raise InvalidRequest("rows of this tier cannot be written to")

    def close(self) -> None:
        """Give all memory back. Nothing is held afterwards."""
        for index in self.held_parts():
            self.drop(self.table.parts[index])

    def _decode(self, stored: torch.Tensor, encoding: str) -> torch.Tensor:
        """Stored rows uint8 [n, row_bytes] -> values [n, dim] of `encoding`'s dtype."""
        return get_format(self.table.dtype).decode(stored, self.table.dim, dtype=plain_dtypes()[encoding])

    @abstractmethod
    def _load(self, part: Part, path: Path, pace: Pace) -> None: ...

    @abstractmethod
    def _unload(self, part: Part) -> None: ...

    @abstractmethod
    def _gather(self, ids: Ids, encoding: str, out: Bytes | None) -> Bytes: ...
