"""Tier `ram`: rows in anonymous memory, in huge pages where the kernel gives them."""

from __future__ import annotations

import os
from pathlib import Path

from embedding_service.address_space import AddressSpace
from embedding_service.rows.base import Bytes, Ids, Location
from embedding_service.rows.host import HostTable
from embedding_service.store.manifest import Part
from embedding_service.store.parts import Pace, read_into


class RamTable(HostTable):
    """Parts are read into memory once, hashed on the way."""

    shareable = True
    foldable = True

    def location(self, part: Part, path: Path) -> Location:
        """In the memory of this process."""
        fd, offset = self._space.file_at(part.first_row * self.table.row_bytes)
        return Location(f"/proc/{os.getpid()}/fd/{fd}", offset)

    def write(self, ids: Ids, rows: Bytes) -> None:
        """See the base class. Nobody else can write to this memory, sealed or not."""
        self._rows.numpy()[ids] = rows

    def _reserve(self) -> AddressSpace:
        return AddressSpace(self.table.bytes, shared=self.shared)

    def _place(self, part: Part, path: Path, offset: int, pace: Pace) -> None:
        read_into(path, part, self._space.map_memory(offset, part.bytes), pace)
        self._space.seal(offset)
