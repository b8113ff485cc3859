"""The contract of overlaid tables: over each tier in TIERS, with rows of each format in FORMATS, in each encoding."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.overlays import overlaid_table, replaced_of, some_ids
from support.readers import reading
from support.tiers import open_table

from embedding_service.errors import InvalidRequest, NotFound
from embedding_service.formats import FORMATS, get_format
from embedding_service.rows import TIERS, overlaid
from embedding_service.rows.base import Location, TableRows
from embedding_service.rows.overlaid import OverlaidTable
from embedding_service.store.manifest import Manifest, Part
from embedding_service.store.overlays import Replaced, rows_offset, write_overlay
from embedding_service.store.store import Store

TORCH = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Of all rows: an index that is sparse, and one that is dense.
SHARES = {"sparse": 0.004, "dense": 0.05}


class Overlaid:
    """Versions on one ground: the base, and two that replace rows, one few and one many."""

    def __init__(self, store: Store, dtype: str, tier: str, folder: Path) -> None:
        self.manifest: Manifest = store.manifest(dtype)
        self.table = self.manifest.tables[0]
        self.ground: TableRows = open_table(tier, self.table)
        for part in self.table.parts:
            self.ground.load(part, store.part_path(self.manifest, part))
        self.versions = {"base": OverlaidTable(self.table, self.ground)}
        self.expected = {"base": overlaid_table(dtype)}
        self.ids = {"base": np.empty(0, np.int64)}
        for tag, (name, share) in enumerate(SHARES.items(), start=7):
            ids = self.ids[name] = some_ids(tag, share)
            self.expected[name] = overlaid_table(dtype, (ids, tag))
            self.versions[name] = OverlaidTable(self.table, self.ground, len(ids))
        for name, rows in self.versions.items():
            for part in self.table.parts:
                replaced = self._replaced(name, part.index)
                if tier == "mmap" and len(replaced.ids):
                    overlay = write_overlay(folder / name, self.table, part, replaced)
                    path = folder / name / overlay.file
                    rows.hold(part, replaced, Location(str(path), rows_offset(path, overlay)))
                else:
                    rows.hold(part, replaced)

    def _replaced(self, name: str, part: int) -> Replaced:
        tags = dict(zip(SHARES, range(7, 9), strict=True))
        return replaced_of(self.manifest, self.table.parts[part], self.ids[name], tags.get(name, 0))

    def hold_again(self, name: str, part: int) -> None:
        """A part that was dropped is there again."""
        self.versions[name].hold(self.table.parts[part], self._replaced(name, part))


@pytest.fixture(params=TIERS)
def tier(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=FORMATS)
def over(request: pytest.FixtureRequest, store: Path, tier: str, tmp_path: Path) -> Iterator[Overlaid]:
    made = Overlaid(Store(store), request.param, tier, tmp_path)
    yield made
    for rows in made.versions.values():
        rows.close()
    made.ground.close()


def test_t12_each_version_has_its_own_rows_over_the_base(over: Overlaid) -> None:
    ids = np.random.default_rng(3).permutation(np.arange(over.table.rows))[:500]
    ids = np.concatenate([ids, over.ids["sparse"], over.ids["dense"][::9], ids[:5]])
    for name, rows in over.versions.items():
        stored = torch.from_numpy(over.expected[name][ids])
        assert np.array_equal(rows.gather(ids, "stored"), stored.numpy()), name
        assert rows.at_hand(ids)
        for encoding, dtype in TORCH.items():
            got = torch.from_numpy(rows.gather(ids, encoding)).view(dtype)
            assert torch.equal(got, get_format(over.table.dtype).decode(stored, over.table.dim, dtype=dtype))
        out = np.empty_like(over.expected[name][ids])
        assert rows.gather(ids, "stored", out) is out
        assert np.array_equal(out, stored.numpy())
        for count in (0, 1):
            assert np.array_equal(rows.gather(ids[:count], "stored"), stored.numpy()[:count])
        for begin in range(0, len(ids), 211):  # few at a time are found in another way
            few = ids[begin : begin + 1 + begin % 30]
            stored = torch.from_numpy(over.expected[name][few])
            assert np.array_equal(rows.gather(few, "stored"), stored.numpy())
            for encoding, dtype in TORCH.items():
                values = get_format(over.table.dtype).decode(stored, over.table.dim, dtype=dtype)
                out = np.empty((len(few), over.table.dim * dtype.itemsize), np.uint8)
                assert rows.gather(few, encoding, out) is out
                assert torch.equal(torch.from_numpy(out).view(dtype), values)
                assert torch.equal(torch.from_numpy(rows.gather(few, encoding)).view(dtype), values)


def test_parts_of_one_version_come_and_go_without_the_others(store: Path, tier: str, tmp_path: Path) -> None:
    over = Overlaid(Store(store), "int8", tier, tmp_path)
    part = over.table.parts[1]
    ids = np.arange(part.first_row, part.first_row + part.rows)
    rows = over.versions["dense"]
    assert rows.replaces(part)
    rows.drop(part)
    with pytest.raises(NotFound):
        rows.gather(ids, "stored")
    assert not rows.replaces(part)
    for name in ("base", "sparse"):
        assert np.array_equal(over.versions[name].gather(ids, "stored"), over.expected[name][ids])
    rest = np.setdiff1d(np.arange(over.table.rows), ids)
    assert np.array_equal(rows.gather(rest, "stored"), over.expected["dense"][rest])
    over.hold_again("dense", 1)
    assert np.array_equal(rows.gather(ids, "stored"), over.expected["dense"][ids])


def test_threads_read_right_rows_or_none_while_a_part_comes_and_goes(store: Path, tier: str, tmp_path: Path) -> None:
    over = Overlaid(Store(store), "int8", tier, tmp_path)
    part = over.table.parts[1]
    ids = np.arange(part.first_row - 5, part.first_row + 50)
    rows = over.versions["dense"]
    with reading(rows, ids, over.expected["dense"][ids]) as readers:
        for turn in range(200):
            rows.drop(part)
            over.hold_again("dense", 1)
            if turn % 15 == 0:
                readers.wait_for_right()
            if readers.outcomes["right"] > 20:
                break
    assert readers.outcomes["right"]
    assert not readers.outcomes["wrong"]


def test_t12_a_version_that_is_left_alone_is_folded_in_while_it_is_read(store: Path, tmp_path: Path) -> None:
    over = Overlaid(Store(store), "int8", "ram", tmp_path)
    ids = np.random.default_rng(5).permutation(over.table.rows)[:3000]
    before, rows = over.expected["base"], over.versions["dense"]
    for each in ("base", "sparse"):
        over.versions[each].close()
    with reading(rows, ids, over.expected["dense"][ids]) as readers:
        for _ in range(4):
            for part in over.table.parts:
                below = rows.fold(part)
                assert np.array_equal(below.rows, before[below.ids]) and not rows.replaces(part)
                assert len(rows.fold(part).ids) == 0
            readers.wait_for_right()
            assert np.array_equal(over.ground.gather(ids, "stored"), over.expected["dense"][ids])
            for part in over.table.parts:  # and back: as a part that was loaded again
                rows.drop(part)
                here = np.arange(part.first_row, part.first_row + part.rows)
                over.ground.write(here, before[here])
                over.hold_again("dense", part.index)
    assert readers.outcomes["right"] and not readers.outcomes["wrong"]


def test_a_gather_is_right_whose_ground_is_read_before_the_fold_and_that_ends_before_it(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    over = Overlaid(Store(store), "int8", "ram", tmp_path)
    part, rows, ids = over.table.parts[1], over.versions["dense"], over.ids["dense"]
    ids = ids[(ids >= part.first_row) & (ids < part.first_row + part.rows)]
    forgotten, go_on = threading.Event(), threading.Event()
    folding = threading.Thread(target=rows.fold, args=(part,))
    gather, forget = over.ground._gather, overlaid._Over.forget

    def then_fold(*arguments: Any) -> Any:
        read = gather(*arguments)
        if threading.current_thread() is not folding and not folding.ident:
            folding.start()
            assert forgotten.wait(180)
        return read

    def half(self: Any, part: Part) -> None:
        forget(self, part)
        forgotten.set()
        assert go_on.wait(180)

    monkeypatch.setattr(over.ground, "_gather", then_fold)
    monkeypatch.setattr(overlaid._Over, "forget", half)
    got = rows.gather(ids, "stored")
    go_on.set()
    folding.join()
    assert np.array_equal(got, over.expected["dense"][ids])
    assert np.array_equal(rows.gather(ids, "stored"), over.expected["dense"][ids])


def test_a_part_in_two_places_is_shown_to_no_other_process(store: Path, tmp_path: Path) -> None:
    over = Overlaid(Store(store), "int8", "mmap", tmp_path)
    part, path = over.table.parts[0], Store(store).part_path(over.manifest, over.table.parts[0])
    assert over.versions["base"].location(part, path) == over.ground.location(part, path)
    with pytest.raises(InvalidRequest, match="lies in two places"):
        over.versions["dense"].location(part, path)


@settings(max_examples=25)
@given(
    st.lists(st.integers(0, 63 * 64), max_size=300).map(lambda numbers: np.unique(np.array(numbers, np.int64))),
    st.lists(st.integers(0, 63 * 64), max_size=50).map(lambda numbers: np.array(numbers, np.int64)),
)
def test_a_bitmap_gives_ranks(members: np.ndarray, asked: np.ndarray) -> None:
    bitmap = overlaid._Bitmap(64)
    bitmap.put(members, 1000)
    found, ranks = bitmap.find(asked)
    assert found.tolist() == [place for place, number in enumerate(asked.tolist()) if number in members]
    assert (ranks - 1000).tolist() == np.searchsorted(members, asked[found]).tolist()
    bitmap.clear(0, 64)
    assert not len(bitmap.find(asked)[0])


def test_bits_are_counted_alike_without_numpys_function(monkeypatch: pytest.MonkeyPatch) -> None:
    words = np.random.default_rng(1).integers(0, 1 << 64, 200, np.uint64)
    expected = overlaid.count_bits(words)
    assert expected.tolist() == [int(word).bit_count() for word in words]
    monkeypatch.delattr(np, "bitwise_count", raising=False)
    assert np.array_equal(overlaid.count_bits(words), expected)
