"""The row cache: what it returns is what the service would, however full it is and whatever version is served."""

import asyncio
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from support.checkpoints import longcat_checkpoint, longcat_table
from support.cluster import Up, serving

from embedding_service import EmbeddingClient, errors
from embedding_service.client import kept
from embedding_service.client.kept import MOST_ROWS, WAYS, Keeper, KeptRows, Kind
from embedding_service.client.wants import RowLookup, Tally
from embedding_service.formats import FORMATS
from embedding_service.placement.routing import Model, Table
from embedding_service.store.importing import import_checkpoint
from embedding_service.wire.lookup_codec import Bytes

ROWS = len(longcat_table())
MIB = 1 << 20


def kind(table: str = "t", version: str = "1", row_bytes: int = 16) -> Kind:
    return Kind(f"m@{version}", table, 0, row_bytes)


def named(ids: np.ndarray, tag: int = 0, row_bytes: int = 16) -> Bytes:
    """Rows that hold their id and a tag."""
    values = np.full((len(ids), row_bytes // 8), tag, np.int64)
    values[:, 0] = ids
    return values.view(np.uint8)


def check(cache: KeptRows, of: Kind, ids: np.ndarray, tag: int = 0) -> int:
    """Every row found must be the one asked for; returns how many were."""
    here, rows = cache.find(of, ids)
    assert np.array_equal(rows, named(ids[here], tag, of.row_bytes))
    return int(here.sum())


def test_what_is_kept_is_found() -> None:
    cache, ids = KeptRows(MIB), np.arange(5, 1000, 7)
    assert check(cache, kind(), ids) == 0
    cache.keep(kind(), ids, named(ids))
    assert check(cache, kind(), ids) == len(ids)
    assert check(cache, kind(), np.arange(1000)) == len(ids)
    assert cache.stats == (2 * len(ids), len(ids) + 1000 - len(ids), 2 * len(ids) * 16, len(ids))


def test_tables_encodings_and_versions_are_kept_apart() -> None:
    cache, ids = KeptRows(MIB), np.arange(50)
    kinds = [kind("a"), kind("b"), kind("a", "2"), kind("a")._replace(encoding=3)]
    for tag, each in enumerate(kinds):
        cache.keep(each, ids, named(ids, tag))
    assert [check(cache, each, ids, tag) for tag, each in enumerate(kinds)] == [50] * 4


def test_memory_is_bounded_and_what_was_asked_for_last_stays() -> None:
    cache = KeptRows(MIB)
    most, favourites = MIB // (16 + 16), np.arange(64)
    cache.keep(kind(), favourites, named(favourites))
    for begin in range(1000, 200_000, 4000):
        ids = np.arange(begin, begin + 4000)
        cache.keep(kind(), ids, named(ids))
        assert check(cache, kind(), favourites) == 64
    assert check(cache, kind(), np.arange(210_000)) == cache.stats.rows
    assert most * 0.9 < cache.stats.rows <= most


def test_more_rows_at_once_than_there_is_room_for() -> None:
    cache, ids = KeptRows(MIB), np.random.default_rng(1).permutation(1 << 17)
    cache.keep(kind(), ids, named(ids))
    assert check(cache, kind(), ids) == cache.stats.rows <= MIB // 32


def test_rows_of_several_widths_share_the_bytes() -> None:
    cache, ids = KeptRows(MIB), np.arange(1 << 16)
    for width in (16, 64, 256):
        cache.keep(kind(row_bytes=width), ids, named(ids, row_bytes=width))
    assert cache._slots.keys() == {16, 64, 256}
    found = {width: check(cache, kind(row_bytes=width), ids) for width in (16, 64, 256)}
    assert found[256] > WAYS
    assert sum(rows * (width + 16) for width, rows in found.items()) <= MIB


def test_a_row_wider_than_the_cache_is_not_kept() -> None:
    cache, ids = KeptRows(MIB), np.arange(2)
    cache.keep(kind(row_bytes=MIB), ids, named(ids, row_bytes=MIB))
    assert check(cache, kind(row_bytes=MIB), ids) == 0


def test_rows_that_would_leave_wider_ones_no_set_are_not_kept() -> None:
    cache, ids = KeptRows(MIB), np.arange(2)
    wide, narrow, third = 43_688, 1024, 512  # of the widest, a third of the bytes is less than a set
    for width in (wide, narrow, third, wide, third):
        cache.keep(kind(row_bytes=width), ids, named(ids, row_bytes=width))
    assert [check(cache, kind(row_bytes=width), ids) for width in (wide, narrow, third)] == [2, 2, 0]
    cache.retain(())
    cache.keep(kind(row_bytes=third), ids, named(ids, row_bytes=third))
    assert check(cache, kind(row_bytes=third), ids) == 2


def test_a_table_of_more_rows_than_keys_tell_apart_is_not_kept() -> None:
    """Its rows would be taken for those of another kind."""
    rows = {"few": 100, "most": MOST_ROWS, "more": 2 * MOST_ROWS}
    owners = np.zeros((2, 1), np.int32)
    tables = {name: Table(name, count, 4, "fp32", 16, count // 2, owners) for name, count in rows.items()}
    model = Model("m", "1", "", "{}", tables, False)
    cache = KeptRows(MIB)

    def lookup(table: str, id: int) -> bool:
        """Whether the row was kept. The others come now."""
        options = {"dtype": torch.float32, "device": torch.device("cpu"), "kept": Keeper(cache, lambda: None)}
        asked = RowLookup(model="m@1", table=table, ids=np.array([id]), shape=(1,), tally=Tally(), **options)  # type: ignore[arg-type]
        [want] = asked.wants(model)
        if len(want.ids):
            want.sink.put(None, np.full((1, 16), 7, np.uint8))
        asked.result()
        return not len(want.ids)

    for table, id, stays in (("few", 5, True), ("most", MOST_ROWS - 1, True), ("more", 5, False)):
        assert not lookup(table, id)
        assert lookup(table, id) == stays
    assert not lookup("more", MOST_ROWS + 5)


def test_versions_that_are_gone_are_dropped() -> None:
    cache, ids = KeptRows(MIB), np.arange(100)
    cache.keep(kind(version="1"), ids, named(ids, 1))
    cache.keep(kind(version="2"), ids, named(ids, 2))
    cache.retain({"m@2"})
    assert cache.stats.rows == 100
    assert (check(cache, kind(version="1"), ids, 1), check(cache, kind(version="2"), ids, 2)) == (0, 100)


def test_a_cache_must_hold_something(service: Up) -> None:
    with pytest.raises(errors.InvalidRequest, match=r"cache_bytes.*1 MiB"):
        EmbeddingClient(service.address, cache_bytes=100)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("model", FORMATS)
def test_hits_change_nothing(service: Up, client: EmbeddingClient, model: str, dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(1)
    with EmbeddingClient(service.address, timeout=60, cache_bytes=MIB, near=False) as cached:
        assert cached.cache is not None
        for size in (12, 300, 0, 12, 2000, 300):
            ids = torch.randint(0, 700, (size,), generator=random)
            expected = client.lookup(f"{model}/ngram", ids, dtype=dtype)
            assert torch.equal(cached.lookup(f"{model}/ngram", ids, dtype=dtype), expected)
            assert torch.equal(asyncio.run(cached.lookup_async(f"{model}/ngram", ids, dtype=dtype)), expected)
        assert cached.cache.stats.hits > 1000


def test_a_lookup_of_kept_rows_asks_nobody(service: Up, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "TRUSTED_SECONDS", 60.0)
    with EmbeddingClient(service.address, timeout=60, cache_bytes=MIB, near=False) as cached:
        tokens = torch.tensor([[5, 3, 8, 5, 3, 8]])
        rows = cached.lookup_ngrams("int8@1", tokens)
        assert cached.cache and cached.cache.stats.misses > 0
        cached._transport.close()
        assert torch.equal(cached.lookup_ngrams("int8@1", tokens), rows)
        with pytest.raises(errors.Unavailable):
            cached.lookup_ngrams("int8@1", tokens + 1)


def test_rows_that_may_be_of_an_older_version_count_as_misses(service: Up, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "TRUSTED_SECONDS", 0.0)
    with EmbeddingClient(service.address, timeout=60, cache_bytes=MIB, near=False) as cached:
        for _ in range(2):
            cached.lookup("int8/ngram", torch.arange(7))
        assert cached.cache and (cached.cache.stats.hits, cached.cache.stats.misses) == (0, 14)


def test_ids_out_of_range_are_never_found(service: Up) -> None:
    with EmbeddingClient(service.address, timeout=60, cache_bytes=MIB, near=False) as cached:
        cached.lookup("fp32/ngram", torch.arange(ROWS))
        for bad in (-1, ROWS, 1 << 40):
            with pytest.raises(errors.OutOfRange, match=f"id {bad} at position 1"):
                cached.lookup("fp32/ngram", torch.tensor([5, bad]))


def test_threads_share_a_cache_that_is_too_small(service: Up) -> None:
    wrong: list[int] = []
    with EmbeddingClient(service.address, timeout=60, cache_bytes=MIB, near=False) as cached:

        def work(seed: int) -> None:
            random = torch.Generator().manual_seed(seed)
            for _ in range(40):
                ids = torch.randint(0, ROWS, (500,), generator=random)
                if not torch.equal(cached.lookup("fp32/ngram", ids), longcat_table()[ids]):
                    wrong.append(seed)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert cached.cache is not None and cached.cache.stats.hits > 0
    assert not wrong


@pytest.mark.service
def test_a_new_version_takes_over_though_all_rows_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "TRUSTED_SECONDS", 0.2)
    store = tmp_path / "store"
    import_checkpoint(longcat_checkpoint(tmp_path / "one"), str(store), "m", dtype="fp32", version="1")
    ids, old, new = torch.arange(40), longcat_table(1)[:40], longcat_table(2)[:40]
    with (
        serving(tmp_path, store, 2) as running,
        EmbeddingClient(running.address, timeout=60, cache_bytes=MIB, near=False) as cached,
    ):
        assert torch.equal(cached.lookup("m/ngram", ids), old)
        import_checkpoint(longcat_checkpoint(tmp_path / "two", 2), str(store), "m", dtype="fp32", version="2")
        answers = []
        for _ in range(600):
            answers.append(cached.lookup("m/ngram", ids))
            if torch.equal(answers[-1], new):
                break
            threading.Event().wait(0.1)
        assert torch.equal(answers[-1], new)
        assert all(torch.equal(answer, old) for answer in answers[:-1])
        assert {each.model for each in cached.cache._kinds} == {"m@2"}  # type: ignore[union-attr]
