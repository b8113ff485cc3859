"""Reading a store, local and remote."""

import uuid
from pathlib import Path
from typing import Any

import pytest
import torch

from embedding_service.errors import CorruptPart, ImportRefused, NotFound, StoreError
from embedding_service.formats import get_format
from embedding_service.store import Store, read_into
from embedding_service.store.importing import import_checkpoint
from embedding_service.store.store import natural_order

PART_BYTES = 64 << 10


class Interrupted(Exception):
    """What these tests stop an import with."""


@pytest.fixture
def remote() -> str:
    """The URL of an empty store in fsspec's memory filesystem."""
    return f"memory://{uuid.uuid4().hex}/store"


def test_an_empty_store_knows_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path / "nowhere")
    assert store.models() == [] and store.versions("tiny") == []
    with pytest.raises(NotFound, match=r"no model 'tiny' in .*nowhere; it has: none"):
        store.manifest("tiny")


def test_what_is_not_there_is_named_beside_what_is(checkpoint: Any, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    for version in ("2", "10", "9"):
        import_checkpoint(checkpoint.folder, store, "tiny", version=version)
    import_checkpoint(checkpoint.folder, store, "other")
    # Neither of these is a version: one has no manifest, one is under way.
    (tmp_path / "store" / "tiny" / "11").mkdir()
    (tmp_path / "store" / "tiny" / ".12.importing").mkdir()
    assert store.models() == ["other", "tiny"]
    assert store.versions("tiny") == ["2", "9", "10"]
    assert store.manifest("tiny").version == "10"
    with pytest.raises(NotFound, match=r"no model 'tinny' in .*; it has: other, tiny"):
        store.manifest("tinny")
    with pytest.raises(NotFound, match="no version '11'; it has: 2, 9, 10"):
        store.manifest("tiny", "11")


def test_versions_sort_by_their_numbers() -> None:
    mixed = ["v10", "10", "2025.10", "2", "v9", "1", "a", "2025.9"]
    assert sorted(mixed, key=natural_order) == ["1", "2", "10", "2025.9", "2025.10", "a", "v9", "v10"]


def test_a_manifest_that_cannot_be_read_names_its_file(checkpoint: Any, tmp_path: Path) -> None:
    import_checkpoint(checkpoint.folder, tmp_path / "store", "tiny")
    (tmp_path / "store" / "tiny" / "1" / "manifest.json").write_text('{"format_version": 1}')
    with pytest.raises(StoreError, match=r"tiny/1/manifest\.json is not a manifest"):
        Store(tmp_path / "store").manifest("tiny")


def test_what_is_read_is_what_the_store_has_and_no_cache_of_fsspec_between(checkpoint: Any, tmp_path: Path) -> None:
    import_checkpoint(checkpoint.folder, tmp_path / "store", "tiny")
    store = Store(f"simplecache::file://{tmp_path}/store")
    assert not store.is_local
    assert store.manifest("tiny").version == "1"
    (tmp_path / "store" / "tiny" / "1" / "manifest.json").write_text("{}")
    with pytest.raises(StoreError, match="is not a manifest"):
        store.manifest("tiny")


def test_a_local_url_is_a_local_store(checkpoint: Any, tmp_path: Path) -> None:
    store = Store(f"file://{tmp_path}/store")
    manifest = import_checkpoint(checkpoint.folder, store, "tiny")
    part = manifest.tables[0].parts[0]
    assert store.is_local
    assert store.part_path(manifest, part) == store.fetch_part(manifest, part, tmp_path / "cache")
    assert store.part_path(manifest, part).is_file()
    assert not (tmp_path / "cache").exists()


def test_a_remote_store_holds_what_a_local_one_does(checkpoint: Any, tmp_path: Path, remote: str) -> None:
    manifest = import_checkpoint(checkpoint.folder, remote, "tiny", part_bytes=PART_BYTES)
    local = import_checkpoint(checkpoint.folder, tmp_path / "store", "tiny", part_bytes=PART_BYTES)
    assert manifest.tables == local.tables
    store = Store(remote)
    assert not store.is_local
    assert store.models() == ["tiny"] and store.manifest("tiny") == manifest
    rows = []
    for part in manifest.tables[0].parts:
        path = store.fetch_part(manifest, part, tmp_path / "cache")
        rows.append(torch.empty(part.rows, manifest.tables[0].row_bytes, dtype=torch.uint8))
        read_into(path, part, rows[-1])
    assert torch.equal(torch.cat(rows), get_format("int8").encode(checkpoint.rows))
    with pytest.raises(ImportRefused, match="name taken"):
        import_checkpoint(checkpoint.folder, remote, "tiny")


def test_a_fetched_part_is_checked_and_kept(checkpoint: Any, tmp_path: Path, remote: str) -> None:
    manifest = import_checkpoint(checkpoint.folder, remote, "tiny", part_bytes=PART_BYTES)
    store, part = Store(remote), manifest.tables[0].parts[1]
    good = store.fetch_part(manifest, part, tmp_path / "cache")
    location = store.location("tiny", "1", part.file)
    data = bytearray(store.filesystem.cat_file(location))
    data[-1] ^= 1
    store.filesystem.pipe_file(location, bytes(data))
    assert store.fetch_part(manifest, part, tmp_path / "cache") == good
    with pytest.raises(CorruptPart, match="expected xxh3-128"):
        store.fetch_part(manifest, part, tmp_path / "cold")
    assert not list((tmp_path / "cold").rglob("part-00001.safetensors"))


def test_an_interrupted_remote_import_goes_on(checkpoint: Any, tmp_path: Path, remote: str) -> None:
    def interrupt(done: int, total: int) -> None:
        if done > total * 0.6:
            raise Interrupted

    with pytest.raises(Interrupted):
        import_checkpoint(checkpoint.folder, remote, "tiny", part_bytes=PART_BYTES, progress=interrupt)
    store = Store(remote)
    assert store.models() == []
    first = store.location("tiny", "1", "ngram/part-00000.safetensors")
    lost = store.location("tiny", "1", "ngram/part-00001.safetensors")
    created = store.filesystem.created(first)
    store.filesystem.rm_file(lost)
    manifest = import_checkpoint(checkpoint.folder, remote, "tiny", part_bytes=PART_BYTES)
    assert store.manifest("tiny") == manifest
    assert store.filesystem.created(first) == created
    for part in manifest.tables[0].parts:
        store.fetch_part(manifest, part, tmp_path)


def test_an_unknown_kind_of_url_is_an_error() -> None:
    with pytest.raises(StoreError, match="nosuch"):
        Store("nosuch://x")
