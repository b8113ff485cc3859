"""Rows of `mmap` that are not in memory: told from those that are, and read ahead of a gather."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from support.checkpoints import longcat_table
from support.cluster import until

from embedding_service.rows.mmap import MmapTable
from embedding_service.store.store import Store


@pytest.fixture
def table(store: Path) -> MmapTable:
    described = Store(store).manifest("fp32").table("ngram")
    return MmapTable(described)


def forget(path: Path) -> None:
    """Have the kernel drop the file's pages from memory."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def test_cold_rows_are_told_from_warm_ones_and_are_right(store: Path, table: MmapTable) -> None:
    paths = {part.index: Path(Store(store).location("fp32", "1", part.file)) for part in table.table.parts}
    for part in table.table.parts:
        table.load(part, paths[part.index])
    ids = np.random.default_rng(0).permutation(table.table.rows)[:500]
    for path in paths.values():
        forget(path)
    if table.at_hand(ids):
        pytest.skip("this file system keeps its files in memory")
    table.read_ahead(ids)

    def all_read() -> bool:
        missing = [ids[i : i + 1] for i in range(len(ids)) if not table.at_hand(ids[i : i + 1])]
        for one in missing:
            table.read_ahead(one)  # a kernel short of memory drops such requests
        return not missing

    until(all_read, "all rows to be read")
    rows = torch.from_numpy(table.gather(ids, "stored")).view(torch.float32)
    assert torch.equal(rows, longcat_table()[ids])
