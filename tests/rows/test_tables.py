"""The contract of tiers: each one in TIERS, with rows of each format in FORMATS, in each encoding.

A new tier or format is tested by being registered.
"""

import shutil
from collections.abc import Iterator
from functools import partialmethod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.checkpoints import longcat_table
from support.readers import reading
from support.tiers import open_table

from embedding_service.errors import CorruptPart, InvalidRequest, NotFound
from embedding_service.formats import FORMATS, get_format
from embedding_service.memory import available_memory
from embedding_service.rows import TIERS, host
from embedding_service.rows.base import LiesIn, TableRows
from embedding_service.store.manifest import Manifest
from embedding_service.store.store import Store

TORCH = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Loaded:
    """A table's rows with all its parts loaded, beside the stored bytes that it was imported as."""

    def __init__(self, store: Store, dtype: str, tier: str) -> None:
        self.store = store
        self.manifest: Manifest = store.manifest(dtype)
        self.table = self.manifest.tables[0]
        self.rows: TableRows = open_table(tier, self.table)
        for part in self.table.parts:
            self.rows.load(part, store.part_path(self.manifest, part))
        self.stored = get_format(dtype).encode(longcat_table())


@pytest.fixture(params=TIERS)
def tier(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=FORMATS)
def loaded(request: pytest.FixtureRequest, store: Path, tier: str) -> Iterator[Loaded]:
    table = Loaded(Store(store), request.param, tier)
    yield table
    table.rows.close()


def some_ids(rows: int) -> np.ndarray:
    edges = [0, rows - 1, rows // 2, rows // 2, 0]
    return np.concatenate([np.random.default_rng(7).integers(0, rows, 500), edges]).astype(np.int64)


def test_stored_rows_are_the_bytes_on_disk(loaded: Loaded) -> None:
    ids = some_ids(loaded.table.rows)
    assert np.array_equal(loaded.rows.gather(ids, "stored"), loaded.stored[torch.from_numpy(ids)].numpy())


@pytest.mark.parametrize("encoding", ["fp32", "fp16", "bf16"])
def test_decoded_rows_equal_the_light_clients_decoder(loaded: Loaded, encoding: str) -> None:
    ids = some_ids(loaded.table.rows)
    got = torch.from_numpy(loaded.rows.gather(ids, encoding)).view(TORCH[encoding])
    stored = loaded.stored[torch.from_numpy(ids)]
    expected = get_format(loaded.table.dtype).decode(stored, loaded.table.dim, dtype=TORCH[encoding])
    assert torch.equal(got, expected)


def test_what_a_tier_says_of_itself_is_what_it_does(tier: str, tmp_path: Path) -> None:
    kind = TIERS[tier]
    assert kind.device in ("cpu", "cuda")
    if kind.device == "cuda" and not torch.cuda.is_available():
        with pytest.raises(InvalidRequest, match="use --tier ram or mmap"):
            kind.check_machine()
        assert not kind.shareable
        return
    kind.check_machine()
    limit = kind.default_limit(str(tmp_path), tmp_path)
    if kind.lies_in is LiesIn.HOST:
        assert 0 < limit <= available_memory()
    elif kind.lies_in is LiesIn.FILES:
        assert limit > shutil.disk_usage(tmp_path).free


def test_a_tier_that_says_so_shows_its_rows_to_other_processes(store: Path, tier: str) -> None:
    source = Store(store)
    manifest = source.manifest("int8")
    table, part = manifest.tables[0], manifest.tables[0].parts[1]
    path = source.part_path(manifest, part)
    if not TIERS[tier].shareable:
        with pytest.raises(InvalidRequest, match="--processes"):
            open_table(tier, table).location(part, path)
        return
    rows = TIERS[tier](table, shared=True)
    rows.load(part, path)
    place = rows.location(part, path)
    with Path(place.path).open("rb") as file:
        file.seek(place.offset)
        shown = np.frombuffer(file.read(part.bytes), np.uint8).reshape(part.rows, table.row_bytes)
    ids = np.arange(part.first_row, part.first_row + part.rows)
    assert np.array_equal(shown, rows.gather(ids, "stored"))
    rows.close()


def test_int8_and_int4_equal_fbgemms_dequantization(store: Path, tier: str) -> None:
    import fbgemm_gpu  # noqa: F401

    rows = longcat_table()
    fused = torch.ops.fbgemm.FloatToFusedNBitRowwiseQuantizedSBHalf(rows, 4)
    reference = torch.ops.fbgemm.FusedNBitRowwiseQuantizedSBHalfToFloat(fused, 4)
    table = Loaded(Store(store), "int4", tier)
    got = table.rows.gather(np.arange(len(rows)), "fp32")
    assert torch.equal(torch.from_numpy(got).view(torch.float32), reference)
    table.rows.close()


def test_without_fbgemms_kernel_torch_decodes_to_the_same_bits(
    store: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def absent(*arguments: object) -> None:
        raise AttributeError("no such operator")

    ids = some_ids(len(longcat_table()))
    for dtype in ("fp16", "int8", "int4"):
        expected = Loaded(Store(store), dtype, "ram").rows.gather(ids, "bf16")
        assert not caplog.records
        with monkeypatch.context() as patch:
            patch.setattr(host, "fbgemm_kernel", absent)
            assert np.array_equal(Loaded(Store(store), dtype, "ram").rows.gather(ids, "bf16"), expected)
        assert "torch decodes in its place: no such operator" in caplog.text
        caplog.clear()


def test_no_ids_give_no_rows(loaded: Loaded) -> None:
    for encoding in ("fp32", "stored"):
        assert len(loaded.rows.gather(np.empty(0, np.int64), encoding)) == 0


def test_dropped_parts_are_not_answered_and_may_come_back(loaded: Loaded) -> None:
    part = loaded.table.parts[1]
    ids = np.arange(part.first_row, part.first_row + 3)
    before = loaded.rows.gather(ids, "stored").copy()
    loaded.rows.drop(part)
    assert part.index not in loaded.rows.held_parts()
    assert not loaded.rows.holds(ids).any()
    with pytest.raises(NotFound):
        loaded.rows.gather(ids, "stored")
    others = np.array([0, loaded.table.rows - 1])
    assert np.array_equal(loaded.rows.gather(others, "stored"), loaded.stored[torch.from_numpy(others)].numpy())
    loaded.rows.load(part, loaded.store.part_path(loaded.manifest, part))
    assert np.array_equal(loaded.rows.gather(ids, "stored"), before)


def test_rows_of_a_part_that_goes_while_they_are_read_are_not_used(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = loaded.table.parts[1]
    ids = np.array([part.first_row])
    gather = type(loaded.rows)._gather
    path = loaded.store.part_path(loaded.manifest, part)

    def interrupted(self: Any, *arguments: Any, back: bool) -> Any:
        self.drop(part)
        rows = gather(self, *arguments)  # what the addresses hold now: nothing
        if back:
            self.load(part, path)
        return rows

    for back in (True, False):
        with monkeypatch.context() as patch, pytest.raises(NotFound):
            patch.setattr(type(loaded.rows), "_gather", partialmethod(interrupted, back=back))
            loaded.rows.gather(ids, "stored")
    loaded.rows.load(part, path)
    assert np.array_equal(loaded.rows.gather(ids, "stored"), loaded.stored[torch.from_numpy(ids)].numpy())


def test_threads_read_right_rows_or_none_while_a_part_comes_and_goes(loaded: Loaded) -> None:
    part = loaded.table.parts[1]
    path = loaded.store.part_path(loaded.manifest, part)
    ids = np.arange(part.first_row - 5, part.first_row + 50)
    expected = loaded.stored[torch.from_numpy(ids)].numpy()
    with reading(loaded.rows, ids, expected) as readers:
        for turn in range(300):
            loaded.rows.drop(part)
            loaded.rows.load(part, path)
            if turn % 15 == 0:
                readers.wait_for_right()
            if readers.outcomes["right"] > 20:
                break
    assert readers.outcomes["right"]
    assert not readers.outcomes["wrong"]


@pytest.mark.parametrize("damage", ["flip", "truncate", "missing"])
def test_a_damaged_part_is_refused(store: Path, tier: str, tmp_path: Path, damage: str) -> None:
    source = Store(store)
    manifest = source.manifest("int8")
    table = manifest.tables[0]
    part = table.parts[2]
    data = bytearray(source.part_path(manifest, part).read_bytes())
    damaged = tmp_path / "part.safetensors"
    if damage == "flip":
        data[-7] ^= 1
    if damage == "truncate":
        del data[-1:]
    if damage != "missing":
        damaged.write_bytes(data)
    rows = open_table(tier, table)
    with pytest.raises((CorruptPart, OSError), match=r"part\.safetensors"):
        rows.load(part, damaged)
    assert rows.held_parts() == []
    with pytest.raises(NotFound):
        rows.gather(np.array([part.first_row]), "stored")
    rows.load(part, source.part_path(manifest, part))  # and the place is good for the right file
    assert len(rows.gather(np.array([part.first_row]), "fp32")) == 1
    rows.close()


@pytest.mark.parametrize("dtype", ["fp16", "int8", "int4"])
@pytest.mark.parametrize("dim", [4, 12, 20, 60, 100, 252, 256, 260])
def test_the_last_row_before_unmapped_addresses(tmp_path: Path, dtype: str, dim: int) -> None:
    """FBGEMM's vector loads must not run over the end of a part behind which no other one is held."""
    from embedding_service.store.manifest import Table
    from embedding_service.store.parts import NewPart, PartWriter, rows_per_part

    row_format = get_format(dtype)
    count = rows_per_part(row_format.row_bytes(dim), 1 << 21)
    values = torch.randn(count, dim, generator=torch.Generator().manual_seed(dim))
    with PartWriter(tmp_path, NewPart("t", 0, 0, count, dim, row_format)) as writer:
        writer.write(row_format.encode(values))
        part = writer.finish()
    more = part.model_copy(update={"index": 1, "first_row": count, "file": "t/part-00001.safetensors"})
    table = Table(
        name="t", rows=2 * count, dim=dim, dtype=dtype, row_bytes=row_format.row_bytes(dim), rows_per_part=count,
        parts=(part, more),
    )  # fmt: skip
    rows = TIERS["ram"](table)
    rows.load(part, tmp_path / part.file)
    last = np.array([count - 1])
    expected = row_format.decode(row_format.encode(values[-1:]), dim)
    for encoding in ("fp32", "fp16", "bf16", "stored"):
        got = rows.gather(last, encoding)
        if encoding == "fp32":
            assert torch.equal(torch.from_numpy(got).view(torch.float32), expected)
    rows.close()
