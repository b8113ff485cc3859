"""Tier `mmap`: rows stay in their files, and the page cache holds what is asked for: a table may exceed memory."""

from __future__ import annotations

from pathlib import Path

from embedding_service.rows.host import HostTable
from embedding_service.store.manifest import Part
from embedding_service.store.parts import Pace, part_layout, verify


class MmapTable(HostTable):
    """Parts are mapped, not copied. Their checksum is taken once, before: that reads the file from end to end."""

    def _place(self, part: Part, path: Path, offset: int, pace: Pace) -> None:
        verify(path, part, pace)
        with path.open("rb") as file:
            self._space.map_file(offset, part.bytes, file.fileno(), part_layout(path).offset)
