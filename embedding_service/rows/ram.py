"""Tier `ram`: rows in anonymous memory, in huge pages where the kernel gives them."""

from __future__ import annotations

from pathlib import Path

from embedding_service.rows.host import HostTable
from embedding_service.store.manifest import Part
from embedding_service.store.parts import Pace, read_into


class RamTable(HostTable):
    """Parts are read into memory once, hashed on the way."""

    def _place(self, part: Part, path: Path, offset: int, pace: Pace) -> None:
        read_into(path, part, self._space.map_memory(offset, part.bytes), pace)
