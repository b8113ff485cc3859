"""The GPU tiers: the rules of slots, parts and cache on any machine, the same with the device where there is one.

Without a GPU the pool lies in host memory and a cache of a few lines stands in for FBGEMM's, whose kernels are CUDA
only; everything else is the code that runs on GPUs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from support.readers import reading
from support.tiers import MIB, on_host

from embedding_service.address_space import round_up
from embedding_service.errors import CorruptPart, InvalidRequest, NotFound
from embedding_service.formats import FORMATS
from embedding_service.rows.base import TableRows
from embedding_service.rows.cuda import (
    CudaCachedTable,
    CudaTable,
    FbgemmRowCache,
    free_memory,
    require_cuda,
    require_fbgemm_cuda,
)
from embedding_service.rows.pool import Pool
from embedding_service.rows.ram import RamTable
from embedding_service.store.manifest import Table
from embedding_service.store.store import Store

ENCODINGS = ["stored", "fp32", "fp16", "bf16"]


def on_device(kind: str, table: Table, nbytes: int = 4 * MIB) -> TableRows:
    if kind == "cuda":
        return CudaTable(table, pool=Pool(torch.zeros(nbytes, dtype=torch.uint8, device="cuda")))
    like = torch.empty(0, dtype=torch.uint8, device="cuda")
    pool = Pool(torch.ops.fbgemm.new_unified_tensor(like, [nbytes], True))
    stride = round_up(table.row_bytes, 16)
    return CudaCachedTable(table, pool=pool, cache=FbgemmRowCache(pool.memory, stride, 64 * stride))


Make = Callable[..., TableRows]


@pytest.fixture(params=["host", pytest.param("device", marks=pytest.mark.gpu)])
def make(request: pytest.FixtureRequest) -> Make:
    return on_host if request.param == "host" else on_device


@pytest.fixture(params=["cuda", "cuda-cached"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class Beside:
    """A table in a GPU tier, and the same in `ram`."""

    def __init__(self, store: Store, model: str, make: Make, kind: str) -> None:
        manifest = store.manifest(model)
        self.table = manifest.tables[0]
        self.paths = [store.part_path(manifest, part) for part in self.table.parts]
        self.rows, self.ram = make(kind, self.table), RamTable(self.table)
        for part in reversed(self.table.parts):  # so that rows lie in another order than their ids
            self.rows.load(part, self.paths[part.index])
            self.ram.load(part, self.paths[part.index])

    def close(self) -> None:
        self.rows.close()
        self.ram.close()

    def check(self, ids: np.ndarray, encoding: str = "stored") -> None:
        assert np.array_equal(self.rows.gather(ids, encoding), self.ram.gather(ids, encoding))


@pytest.fixture
def beside(store: Path, make: Make, kind: str) -> Iterator[Beside]:
    both = Beside(Store(store), "int8", make, kind)
    yield both
    both.close()


@pytest.mark.parametrize("model", FORMATS)
def test_every_row_is_that_of_the_ram_tier(store: Path, make: Make, kind: str, model: str) -> None:
    both = Beside(Store(store), model, make, kind)
    some = np.random.default_rng(3).integers(0, both.table.rows, 700)
    for encoding in ENCODINGS:
        both.check(np.arange(both.table.rows), encoding)
        both.check(some, encoding)  # some of them from the cache
        both.check(np.empty(0, np.int64), encoding)
    out = np.zeros((len(some), both.table.row_bytes), np.uint8)
    assert both.rows.gather(some, "stored", out) is out
    assert np.array_equal(out, both.ram.gather(some, "stored"))
    both.close()


def test_a_part_that_comes_back_elsewhere_is_read_there(beside: Beside) -> None:
    first, second = beside.table.parts[0], beside.table.parts[1]
    ids = np.array([first.first_row, second.first_row, second.first_row + 1])
    beside.check(ids)
    for part in (first, second):
        beside.rows.drop(part)
        with pytest.raises(NotFound):
            beside.rows.gather(ids, "stored")
    for part in (first, second):  # each into the other's place
        beside.rows.load(part, beside.paths[part.index])
    beside.check(ids)
    beside.check(np.arange(beside.table.rows))


def test_threads_read_right_rows_or_none_while_parts_change_places(beside: Beside) -> None:
    parts = beside.table.parts[:2]
    ids = np.concatenate([np.arange(part.first_row, part.first_row + 4) for part in parts])
    expected = beside.ram.gather(ids, "stored")
    with reading(beside.rows, ids, expected) as readers:
        for turn in range(100):
            for part in parts:
                beside.rows.drop(part)
            for part in parts if turn % 2 else reversed(parts):
                beside.rows.load(part, beside.paths[part.index])
            if turn % 15 == 0:
                readers.wait_for_right()
            if readers.outcomes["right"] > 20 and turn > 10:
                break
    assert readers.outcomes["right"]
    assert not readers.outcomes["wrong"]


def test_tables_share_the_pool(store: Path, make: Make) -> None:
    pool = None
    tables = []
    for model in ("int8", "fp32", "int4"):
        manifest = Store(store).manifest(model)
        table = manifest.tables[0]
        rows = make("cuda", table) if pool is None else CudaTable(table, pool=pool)
        pool = rows._pool  # type: ignore[attr-defined]
        tables.append((rows, RamTable(table), manifest))
    for rows, ram, manifest in tables:
        for part in rows.table.parts:
            rows.load(part, Store(store).part_path(manifest, part))
            ram.load(part, Store(store).part_path(manifest, part))
    ids = np.random.default_rng(5).integers(0, tables[0][0].table.rows, 300)
    for rows, ram, _ in tables:
        assert np.array_equal(rows.gather(ids, "fp32"), ram.gather(ids, "fp32"))
        rows.close()
        ram.close()
    assert pool is not None
    assert pool.take(4 * MIB, 1) == 0  # all of it is free again


def test_without_room_a_part_is_refused_and_comes_in_later(store: Path, make: Make, kind: str) -> None:
    manifest = Store(store).manifest("int8")
    table = manifest.tables[0]
    first, second = table.parts[0], table.parts[1]
    rows = make(kind, table, nbytes=first.rows * round_up(table.row_bytes, 16))
    rows.load(first, Store(store).part_path(manifest, first))
    with pytest.raises(MemoryError, match="raise --memory"):
        rows.load(second, Store(store).part_path(manifest, second))
    assert rows.held_parts() == [0]
    rows.drop(first)
    rows.load(second, Store(store).part_path(manifest, second))
    assert rows.held_parts() == [1]
    rows.close()


def test_a_damaged_part_is_refused_and_its_room_free(store: Path, make: Make, kind: str, tmp_path: Path) -> None:
    manifest = Store(store).manifest("int8")
    table = manifest.tables[0]
    part = table.parts[0]
    path = Store(store).part_path(manifest, part)
    data = bytearray(path.read_bytes())
    data[-7] ^= 1
    (tmp_path / "part.safetensors").write_bytes(data)
    rows = make(kind, table, nbytes=part.rows * round_up(table.row_bytes, 16))
    with pytest.raises(CorruptPart):
        rows.load(part, tmp_path / "part.safetensors")
    assert rows.held_parts() == []
    rows.load(part, path)
    assert rows.held_parts() == [0]
    rows.close()


def test_fbgemm_takes_the_cache_as_it_is_given_and_forgets_a_parts_rows() -> None:
    """The CPU build has the operators' signatures, though they do nothing there."""
    cache = FbgemmRowCache(torch.zeros(100 * 272, dtype=torch.uint8), 272, 64 * 272)
    found = cache.find(torch.tensor([3, 99]))
    assert (found.dtype, found.shape) == (torch.int32, (2,))
    assert cache.rows.shape == (64, 272)
    cache._state[0, :4] = torch.tensor([9, 10, 19, 20])
    cache.forget(10, 10)
    assert cache._state[0, :5].tolist() == [9, -1, -1, 20, -1]


def test_the_pool_reuses_holes_at_multiples_of_the_row() -> None:
    pool = Pool(torch.zeros(1000, dtype=torch.uint8))
    assert [pool.take(260, 260), pool.take(132, 132), pool.take(300, 100)] == [0, 264, 400]
    pool.give_back(264)
    assert pool.take(133, 7) == 266  # the hole ends at 400
    with pytest.raises(MemoryError, match="301 bytes"):
        pool.take(301, 1)  # 300 are left behind
    assert [pool.rows(nbytes).element_size() for nbytes in (264, 260, 26, 25)] == [8, 4, 2, 1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is said where there is no GPU")
def test_without_a_gpu_the_tiers_name_the_remedy() -> None:
    for call in (require_cuda, free_memory, lambda: CudaTable.prepare(MIB), lambda: CudaCachedTable.prepare(MIB)):
        with pytest.raises(InvalidRequest, match="--tier ram or mmap"):
            call()


@pytest.mark.skipif(torch.version.cuda is not None, reason="what is said of a CPU build")
def test_fbgemms_cpu_build_is_named() -> None:
    with pytest.raises(InvalidRequest, match="fbgemm-gpu in place of fbgemm-gpu-cpu"):
        require_fbgemm_cuda()
