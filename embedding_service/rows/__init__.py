"""Rows in memory, a file for each tier. FBGEMM lives here.

A new tier is one file with a subclass of `base.TableRows`, and one line in `TIERS`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from embedding_service.registry import Registry

if TYPE_CHECKING:
    from embedding_service.rows.base import TableRows

TIERS: Registry[TableRows] = Registry(
    "tier",
    "embedding_service.rows.base:TableRows",
    {
        "ram": "embedding_service.rows.ram:RamTable",
        "mmap": "embedding_service.rows.mmap:MmapTable",
        "cuda": "embedding_service.rows.cuda:CudaTable",
        "cuda-cached": "embedding_service.rows.cuda:CudaCachedTable",
    },
)
