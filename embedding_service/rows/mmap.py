"""Tier `mmap`: rows stay in their files, and the page cache holds what was asked for. A table may exceed memory."""

from __future__ import annotations

import os
from pathlib import Path

from embedding_service.rows.base import Ids, LiesIn, Location
from embedding_service.rows.host import HostTable
from embedding_service.store.manifest import Part, Table
from embedding_service.store.parts import Pace, part_layout, verify

# Rows that are sampled to find out whether a batch is in memory. Each takes a microsecond.
_LOOKED_AT = 8


class FileTable(HostTable):
    """Rows that may have to come from a disk."""

    lies_in = LiesIn.FILES

    def at_hand(self, ids: Ids) -> bool:
        """Whether a sample of the rows is in memory."""
        sample = ids[:: max(1, len(ids) // _LOOKED_AT)]
        return self._space.resident((sample * self.table.row_bytes).tolist())

    def read_ahead(self, ids: Ids) -> None:
        """Start reading the rows. Does not wait for them."""
        if not self.at_hand(ids):
            self._space.read_ahead((ids * self.table.row_bytes).tolist(), self.table.row_bytes)


class MappedTable(FileTable):
    """Parts that another process of this machine holds and has verified."""

    def __init__(self, table: Table) -> None:
        super().__init__(table)
        self._locations: dict[int, Location] = {}

    def take(self, part: Part, location: Location) -> None:
        """Map a part that the other process holds. It must be dropped here before it is dropped there."""
        self._locations[part.index] = location
        self.load(part, Path(location.path))

    def _place(self, part: Part, path: Path, offset: int, pace: Pace) -> None:
        with path.open("rb") as file:
            self._space.map_file(offset, part.bytes, file.fileno(), self._locations[part.index].offset)


class MmapTable(FileTable):
    """Parts are mapped, not copied. Their checksum is taken once before that, which reads the whole file."""

    shareable = True

    @classmethod
    def default_limit(cls, store: str, cache: Path) -> int:
        """The disk that the rows' files lie on."""
        stats = os.statvfs(store if Path(store).exists() else cache)
        return stats.f_blocks * stats.f_frsize

    def location(self, part: Part, path: Path) -> Location:
        """In the part's own file."""
        return Location(str(path), part_layout(path).offset)

    def _place(self, part: Part, path: Path, offset: int, pace: Pace) -> None:
        verify(path, part, pace)
        with path.open("rb") as file:
            self._space.map_file(offset, part.bytes, file.fileno(), part_layout(path).offset)
