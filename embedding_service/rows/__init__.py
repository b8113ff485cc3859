"""Rows in memory, a file for each tier. FBGEMM lives here.

A new tier is one file beside `ram.py` with a subclass of `TableRows`. Enter it into `TIERS`, and its name into
`commands.cluster.Tier`.
"""

from __future__ import annotations

from embedding_service.rows.base import TableRows
from embedding_service.rows.cuda import CudaCachedTable, CudaTable
from embedding_service.rows.mmap import MappedTable, MmapTable
from embedding_service.rows.ram import RamTable

TIERS: dict[str, type[TableRows]] = {
    "ram": RamTable,
    "mmap": MmapTable,
    "cuda": CudaTable,
    "cuda-cached": CudaCachedTable,
}

__all__ = ["TIERS", "CudaCachedTable", "CudaTable", "MappedTable", "MmapTable", "RamTable", "TableRows"]
