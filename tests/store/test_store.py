"""Reading a store, local and remote."""

import json
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

import pytest
import torch

from embedding_service.errors import CorruptPart, ImportRefused, InvalidRequest, NotFound, StoreError
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


def test_two_versions_that_are_one_number_have_one_order() -> None:
    """That of their listing decided which one was served."""
    assert sorted(["1", "01", "v1", "v01"], key=natural_order) == sorted(["v01", "v1", "01", "1"], key=natural_order)


def test_what_is_no_store_is_told(tmp_path: Path) -> None:
    """Nothing was said of a file. An empty name was the current folder."""
    (tmp_path / "file").touch()
    with pytest.raises(InvalidRequest, match="a store needs a name"):
        Store("")
    for scheme in ("", "simplecache::file://"):
        with pytest.raises(NotADirectoryError, match=f"^{tmp_path}/file is a file, and a store is a folder: correct"):
            Store(f"{scheme}{tmp_path}/file").catalogue()
        with pytest.raises(FileNotFoundError, match=f"^nothing is at {tmp_path}/nowhere: import into it, or correct"):
            Store(f"{scheme}{tmp_path}/nowhere").catalogue()


def test_a_manifest_that_cannot_be_read_names_its_file(checkpoint: Any, tmp_path: Path) -> None:
    import_checkpoint(checkpoint.folder, tmp_path / "store", "tiny")
    (tmp_path / "store" / "tiny" / "1" / "manifest.json").write_text('{"format_version": 1}')
    with pytest.raises(StoreError, match=r"tiny/1/manifest\.json is not a manifest"):
        Store(tmp_path / "store").manifest("tiny")


def copy_of(manifest: Path, **changes: object) -> str:
    return json.dumps(json.loads(manifest.read_text()) | changes)


def table_of(manifest: Path, **changes: object) -> dict[str, Any]:
    return {**json.loads(manifest.read_text())["tables"][0], **changes}


def test_what_is_wrong_with_one_version_hides_no_other_and_is_named(checkpoint: Any, tmp_path: Path) -> None:
    root = tmp_path / "store"
    for name, version in (("good", "1"), ("good", "2"), ("other", "1")):
        import_checkpoint(checkpoint.folder, root, name, version=version)
    whole = root / "good/1/manifest.json"
    good, table = whole.read_text(), table_of(whole)
    accidents: dict[str, str | bytes | None] = {
        "no-utf8": b"\xff\xfe" + good.encode(),
        "empty": "",
        "deep": '{"tables":' + "[" * 100_000 + "]" * 100_000 + "}",
        "long-number": good.replace(str(table["rows"]), "9" * 10_000),
        "rows": copy_of(whole, model="rows", tables=[table | {"rows": 2**62}]),
        "dim": copy_of(whole, model="dim", tables=[table | {"dim": 2**33, "row_bytes": 2**33 + 4}]),
        "twice": copy_of(whole, model="twice", tables=[table, table]),
        "surrogate": good.replace("longcat", "\\ud800", 1),
        "huge": None,
        "a-folder": None,
        "a-pipe": None,
    }
    for name, content in accidents.items():
        folder = root / name / "1"
        folder.mkdir(parents=True)
        if content is not None:
            (folder / "manifest.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with (root / "huge/1/manifest.json").open("wb") as file:
        file.truncate(1 << 40)
    (root / "a-folder/1/manifest.json").mkdir()
    os.mkfifo(root / "a-pipe/1/manifest.json")
    (root / "old models").mkdir()
    (root / os.fsdecode(b"\xff\x1b[31m\nx")).mkdir()
    shutil.copytree(root / "good", root / "renamed")
    shutil.copytree(root / "good/2", root / "good/3")
    (root / "good/1 (copy)").mkdir()
    # None of these is worth a word.
    (root / ".hidden").mkdir()
    (root / "lost+found").mkdir()
    (root / "README").write_text("notes")
    (root / "link").symlink_to("nowhere")
    (root / "good/4").mkdir()  # an import that is under way

    found = Store(root).catalogue()
    assert {model: [each.version for each in versions] for model, versions in found.manifests.items()} == {
        "good": ["1", "2"],
        "other": ["1"],
    }
    assert set(found.problems) == {
        *((name, "1") for name in accidents),
        ("old models", ""),
        ("good", "1 (copy)"),
        (os.fsdecode(b"\xff\x1b[31m\nx"), ""),
        ("renamed", "1"),
        ("renamed", "2"),
        ("good", "3"),
    }
    assert all(problem.isprintable() and len(problem) < 2_000 for problem in found.problems.values())
    assert "is the manifest of good@2" in found.problems["good", "3"]
    assert "table is named ngram" in found.problems["twice", "1"]
    assert "'old models' cannot be a name" in found.problems["old models", ""]
    assert found.cannot_tell("rows", "1") and found.cannot_tell("old models", "7")
    assert not found.cannot_tell("good", "2")
    with pytest.raises(StoreError, match="is the manifest of good@2"):
        Store(root).manifest("good", "3")


def test_a_version_is_gone_only_where_its_folder_could_be_read(checkpoint: Any, tmp_path: Path) -> None:
    root = tmp_path / "store"
    for name in ("kept", "gone", "shut"):
        import_checkpoint(checkpoint.folder, root, name)

    class Failing(Store):
        """As a network's filesystem that answers for some folders."""

        def _folders(self, location: str) -> list[str]:
            if location.endswith("/shut"):
                raise PermissionError(13, "Permission denied", location)
            return super()._folders(location)

    before = Store(root).catalogue()
    shutil.rmtree(root / "gone")
    after = Failing(root).catalogue(before)
    assert list(after.manifests) == ["kept"]
    assert after.manifests["kept"][0] is before.manifests["kept"][0]  # not read again
    assert not after.cannot_tell("gone", "1")
    assert after.cannot_tell("shut", "1")
    shutil.rmtree(root)
    with pytest.raises(FileNotFoundError):
        Store(root).catalogue(after)


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


def attack(remote: str, file: str) -> Store:
    """A remote store whose first part's manifest entry names another file."""
    store = Store(remote)
    location = store.location("tiny", "1", "manifest.json")
    content = json.loads(store.filesystem.cat_file(location))
    content["tables"][0]["parts"][0]["file"] = file
    store.filesystem.pipe_file(location, json.dumps(content).encode())
    return store


def test_a_remote_manifest_reaches_no_file_outside_the_cache(checkpoint: Any, tmp_path: Path, remote: str) -> None:
    """An absolute name had a shard delete that file and put another in its place."""
    manifest = import_checkpoint(checkpoint.folder, remote, "tiny", part_bytes=PART_BYTES)
    victim = tmp_path / "victim"
    victim.write_text("mine")
    for file in (str(victim), "../../../../victim", "ngram/part-00001.safetensors"):
        store = attack(remote, file)
        assert "must be the file ngram/part-00000.safetensors" in store.catalogue().problems["tiny", "1"]
        with pytest.raises(StoreError, match="must be the file"):
            store.manifest("tiny")
        # Nor would it through a manifest that was read by somebody else.
        part = manifest.tables[0].parts[0].model_copy(update={"file": file})
        if file != manifest.tables[0].parts[1].file:
            with pytest.raises(StoreError, match="leads out of the cache"):
                store.fetch_part(manifest, part, tmp_path / "cache")
        assert victim.read_text() == "mine" and not (tmp_path / "cache").exists()


@pytest.mark.parametrize("link", ["tiny", "tiny/1", "tiny/1/ngram", "tiny/1/ngram/part-00000.safetensors"])
@pytest.mark.parametrize("target", ["elsewhere", "nowhere", "circle"])
def test_a_link_in_the_cache_leads_nowhere(
    checkpoint: Any, tmp_path: Path, remote: str, link: str, target: str
) -> None:
    manifest = import_checkpoint(checkpoint.folder, remote, "tiny", part_bytes=PART_BYTES)
    (tmp_path / "elsewhere").mkdir()
    path = tmp_path / "cache" / link
    path.parent.mkdir(parents=True)
    path.symlink_to(path if target == "circle" else tmp_path / target)
    with pytest.raises(StoreError, match=r"leads out of the cache .*: remove the link there"):
        Store(remote).fetch_part(manifest, manifest.tables[0].parts[0], tmp_path / "cache")
    assert not list((tmp_path / "elsewhere").iterdir()) and not (tmp_path / "nowhere").exists()


def test_a_cache_may_itself_be_a_link(checkpoint: Any, tmp_path: Path, remote: str) -> None:
    manifest = import_checkpoint(checkpoint.folder, remote, "tiny", part_bytes=PART_BYTES)
    (tmp_path / "disk").mkdir()
    (tmp_path / "cache").symlink_to(tmp_path / "disk")
    path = Store(remote).fetch_part(manifest, manifest.tables[0].parts[0], tmp_path / "cache")
    assert path.is_file() and [each.name for each in path.parent.iterdir()] == [path.name]


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
