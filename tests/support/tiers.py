"""Tables of every tier, on any machine."""

from __future__ import annotations

import torch

from embedding_service.address_space import round_up
from embedding_service.rows import TIERS
from embedding_service.rows.base import TableRows
from embedding_service.rows.cuda import CudaCachedTable, CudaTable, RowCache
from embedding_service.rows.pool import Pool
from embedding_service.store.manifest import Table

MIB = 1 << 20


class SmallCache(RowCache):
    """A few rows of a pool, the oldest of which make room."""

    def __init__(self, memory: torch.Tensor, row_bytes: int, places: int = 16) -> None:
        self.rows = torch.zeros(places, row_bytes, dtype=torch.uint8)
        self._pool = memory[: len(memory) // row_bytes * row_bytes].view(-1, row_bytes)
        self._place: dict[int, int] = {}

    def find(self, where: torch.Tensor) -> torch.Tensor:
        wanted = dict.fromkeys(where.tolist())
        for row in wanted:
            if row not in self._place:
                self._take_in(row, wanted)
        return torch.tensor([self._place.get(row, -1) for row in where.tolist()], dtype=torch.int32)

    def _take_in(self, row: int, wanted: dict[int, None]) -> None:
        place = len(self._place)
        if place == len(self.rows):
            old = next((each for each in self._place if each not in wanted), None)
            if old is None:
                return
            place = self._place.pop(old)
        self._place[row] = place
        self.rows[place] = self._pool[row]

    def forget(self, first: int, count: int) -> None:
        kept = {row: place for row, place in self._place.items() if not first <= row < first + count}
        self._place = {row: place for place, row in enumerate(kept)}
        self.rows[: len(kept)] = self.rows[list(kept.values())]


def on_host(kind: str, table: Table, nbytes: int = 4 * MIB) -> TableRows:
    """A table of a GPU tier whose pool lies in host memory; a small cache stands in for FBGEMM's."""
    pool = Pool(torch.zeros(nbytes, dtype=torch.uint8))
    if kind == "cuda":
        return CudaTable(table, pool=pool)
    return CudaCachedTable(table, pool=pool, cache=SmallCache(pool.memory, round_up(table.row_bytes, 16)))


def open_table(tier: str, table: Table) -> TableRows:
    """A table of any tier without parts, as a shard opens it; tiers of a GPU lie in host memory."""
    if TIERS[tier].device == "cuda":
        return on_host(tier, table)
    TIERS[tier].prepare(4 * MIB)
    return TIERS[tier](table)
