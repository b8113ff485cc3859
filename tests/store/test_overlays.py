"""Versions that are their base but for some rows: published, imported, rolled back, compared."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from store.test_publishing import MOST_STEPS, Killed, killed_while_publishing

from embedding_service.errors import (
    BadTensorFile,
    CorruptPart,
    ImportRefused,
    InvalidRequest,
    NotFound,
    OutOfRange,
    StoreError,
    UnencodableRow,
)
from embedding_service.formats import FORMATS, get_format
from embedding_service.store import Manifest, Store, importing, publishing
from embedding_service.store.draft import Draft, RemoteDraft
from embedding_service.store.garbage import find_garbage, remove
from embedding_service.store.importing import import_checkpoint
from embedding_service.store.overlays import read_overlay
from embedding_service.store.publishing import publish_rows, rollback
from embedding_service.store.reading import diff
from embedding_service.tensorfile import PAGE_BYTES

DIM = 16
PART_BYTES = 68 << 10


def stored_rows(store: Store, manifest: Manifest) -> np.ndarray:
    """All rows of the one table as they are stored, from the files as anybody may read them."""
    table = manifest.tables[0]
    parts = [store.filesystem.cat_file(store.location(*manifest.root, part.file)) for part in table.parts]
    rows = np.concatenate([np.frombuffer(part[PAGE_BYTES:], np.uint8) for part in parts]).reshape(-1, table.row_bytes)
    for overlay in manifest.overlays(table.name).values():
        path = store.fetch_overlay(manifest, table, overlay, Path("/nonexistent"))
        replaced = read_overlay(path, table, overlay)
        rows[replaced.ids] = replaced.rows
    return rows


def changes(path: Path, ids: list[int], value: float = 0.5, **more: torch.Tensor) -> Path:
    """A file that gives each of `ids` a row of its id and `value`."""
    rows = torch.full((len(ids), DIM), value)
    rows[:, 0] = torch.tensor(ids).float() / 64
    save_file({"ngram.ids": torch.tensor(ids), "ngram.rows": rows, **more}, path)
    return path


def encoded(dtype: str, ids: list[int], value: float = 0.5) -> np.ndarray:
    rows = torch.full((len(ids), DIM), value)
    rows[:, 0] = torch.tensor(ids).float() / 64
    return get_format(dtype).encode(rows).numpy()


@pytest.mark.parametrize("dtype", FORMATS)
def test_t11_published_rows_are_in_place_of_the_bases(checkpoint: Any, tmp_path: Path, dtype: str) -> None:
    store = Store(tmp_path / "store")
    base = import_checkpoint(checkpoint.folder, store, "tiny", dtype=dtype, part_bytes=PART_BYTES)
    before = stored_rows(store, base)
    last = base.tables[0].rows - 1
    manifest = publish_rows(store, "tiny@1", changes(tmp_path / "rows", [last, 3, 0]))
    assert (manifest.full_name, manifest.root, manifest.tables) == ("tiny@2", ("tiny", "1"), base.tables)
    assert manifest == store.manifest("tiny") and manifest.replaced_rows == 3
    expected = before.copy()
    expected[[last, 3, 0]] = encoded(dtype, [last, 3, 0])
    assert np.array_equal(stored_rows(store, manifest), expected)
    # Over a version with a base: one base, and the newest rows.
    third = publish_rows(store, "tiny", changes(tmp_path / "rows", [3, 4], value=-0.25))
    assert (third.full_name, third.root, third.replaced_rows) == ("tiny@3", ("tiny", "1"), 4)
    expected[[3, 4]] = encoded(dtype, [3, 4], -0.25)
    assert np.array_equal(stored_rows(store, third), expected)
    # Anybody can open the file.
    overlay = third.overlays("ngram")[0]
    with safe_open(store.location("tiny", "3", overlay.file), "pt") as file:
        assert file.get_tensor("ids").tolist() == [0, 3, 4]


def test_rows_may_come_as_they_are_stored_and_under_another_name(checkpoint: Any, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    base = import_checkpoint(checkpoint.folder, store, "tiny", dtype="int4", part_bytes=PART_BYTES)
    rows = encoded("int4", [7, 9])
    file = tmp_path / "rows"
    save_file({"ngram.ids": torch.tensor([7, 9], dtype=torch.int32), "ngram.rows": torch.from_numpy(rows)}, file)
    manifest = publish_rows(store, "tiny@1", file, name="tiny+legal")
    assert (manifest.full_name, manifest.root) == ("tiny+legal@1", ("tiny", "1"))
    assert np.array_equal(stored_rows(store, manifest)[[7, 9]], rows)
    assert store.manifest("tiny") == base
    assert store.models() == ["tiny", "tiny+legal"]


@pytest.mark.parametrize(
    ("tensors", "error", "message"),
    [
        ({"ngram.ids": torch.tensor([1, 5, 1]), "ngram.rows": torch.zeros(3, DIM)}, InvalidRequest, "id 1 more than"),
        ({"ngram.ids": torch.tensor([1, -5]), "ngram.rows": torch.zeros(2, DIM)}, OutOfRange, r"ids\[1\] is -5: ids"),
        ({"ngram.ids": torch.tensor([1 << 40]), "ngram.rows": torch.zeros(1, DIM)}, OutOfRange, "must be from 0 to"),
        ({"ngram.ids": torch.tensor([1]), "ngram.rows": torch.zeros(1, DIM + 1)}, InvalidRequest, r"must be float \[1"),
        ({"ngram.ids": torch.tensor([1]), "ngram.rows": torch.zeros(2, DIM)}, InvalidRequest, r"must be float \[1"),
        ({"ngram.ids": torch.tensor([1.0]), "ngram.rows": torch.zeros(1, DIM)}, InvalidRequest, "must be int64"),
        ({"words.ids": torch.tensor([1]), "words.rows": torch.zeros(1, DIM)}, NotFound, "no table 'words'"),
        ({"ngram.ids": torch.tensor([1])}, InvalidRequest, "two tensors, TABLE.ids and TABLE.rows"),
        ({"ngram": torch.tensor([1])}, InvalidRequest, "two tensors, TABLE.ids and TABLE.rows"),
        (
            {"ngram.ids": torch.tensor([8, 6]), "ngram.rows": torch.tensor([[1.0] * DIM, [float("nan")] * DIM])},
            UnencodableRow,
            "for id 6 in .*not finite",
        ),
    ],
    ids=lambda value: "",
)
def test_what_cannot_be_published_is_refused_and_leaves_nothing(
    checkpoint: Any, tmp_path: Path, tensors: dict[str, torch.Tensor], error: type[Exception], message: str
) -> None:
    store = Store(tmp_path / "store")
    import_checkpoint(checkpoint.folder, store, "tiny", part_bytes=PART_BYTES)
    save_file(tensors, tmp_path / "rows")
    with pytest.raises(error, match=message):
        publish_rows(store, "tiny@1", tmp_path / "rows")
    assert [path.name for path in (tmp_path / "store" / "tiny").iterdir()] == ["1"]


@contextmanager
def meanwhile(monkeypatch: pytest.MonkeyPatch, happens: Callable[[], object]) -> Iterator[None]:
    """Something happens after the rows of the next version are written, and before it is published."""
    real = publishing.write_overlays

    def written(*arguments: Any) -> Any:
        overlays = real(*arguments)
        patch.undo()
        happens()
        return overlays

    with monkeypatch.context() as patch:
        for module in (publishing, importing):
            patch.setattr(module, "write_overlays", written)
        yield
        assert publishing.write_overlays is real


def test_rows_are_not_published_over_a_version_that_is_not_the_newest_any_more(
    checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second of two publishes hid the rows of the first, and a rollback took back what nobody had seen."""
    store = Store(tmp_path / "store")
    import_checkpoint(checkpoint.folder, store, "tiny", part_bytes=PART_BYTES)
    first, second = changes(tmp_path / "first", [1]), changes(tmp_path / "second", [2])

    def later(version: str) -> None:
        publish_rows(store, "tiny", first, version=version)

    with meanwhile(monkeypatch, lambda: later("5")), pytest.raises(ImportRefused, match="now tiny@5 is: run this agai"):
        publish_rows(store, "tiny", second)
    with meanwhile(monkeypatch, lambda: later("7")), pytest.raises(ImportRefused, match="now tiny@7 is: run this agai"):
        rollback(store, "tiny")
    assert sorted(path.name for path in (tmp_path / "store" / "tiny").iterdir()) == ["1", "5", "7"]
    manifest = publish_rows(store, "tiny", second)
    assert (manifest.full_name, manifest.replaced_rows) == ("tiny@8", 2)
    with meanwhile(monkeypatch, lambda: later("10")):  # whoever names the version gets that one's rows
        assert publish_rows(store, "tiny@1", second, version="9").replaced_rows == 1


def test_gc_leaves_the_base_of_what_is_published_meanwhile(
    checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It removed the base of a version under way. That was published, could not be served, and stopped gc for good."""
    store = Store(tmp_path / "store")
    for version in ("1", "2"):
        import_checkpoint(checkpoint.folder, store, "tiny", version=version, part_bytes=PART_BYTES)
    file = changes(tmp_path / "rows", [1])
    [before] = find_garbage(store, 1)
    assert before.name == "tiny@1"

    def gc() -> None:
        assert before not in find_garbage(store, 1)
        assert not remove(store, before)
        assert store.has("tiny", "1")

    for publish in (
        lambda: publish_rows(store, "tiny@1", file, name="tiny+legal"),
        lambda: rollback(store, "tiny"),
        lambda: import_checkpoint(checkpoint.folder, store, "tiny", version="4", base="1"),
    ):
        with meanwhile(monkeypatch, gc):
            assert publish().root == ("tiny", "1")
        assert not remove(store, before)
    assert not list((tmp_path / "store").rglob("base.json"))
    assert store.catalogue().problems == {}


@pytest.mark.parametrize("scheme", ["", "simplecache::file://"])
def test_nothing_is_published_over_a_base_that_was_removed(
    checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    store = Store(f"{scheme}{tmp_path}/store")
    import_checkpoint(checkpoint.folder, store, "tiny", part_bytes=PART_BYTES)
    with (
        meanwhile(monkeypatch, lambda: (tmp_path / "store" / "tiny" / "1").rename(tmp_path / "1")),
        pytest.raises(StoreError, match=r"tiny@2 is not published: its base tiny@1 was removed meanwhile. Bring that"),
    ):
        publish_rows(store, "tiny@1", changes(tmp_path / "rows", [1]))
    (tmp_path / "1").rename(tmp_path / "store" / "tiny" / "1")
    assert store.versions("tiny") == ["1"]


def test_names_that_are_not_there_or_taken_and_files_that_are_none(checkpoint: Any, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    import_checkpoint(checkpoint.folder, store, "tiny", part_bytes=PART_BYTES)
    file = changes(tmp_path / "rows", [1])
    with pytest.raises(NotFound, match="no model 'big'"):
        publish_rows(store, "big@1", file)
    with pytest.raises(NotFound, match="no version '7'; it has: 1"):
        publish_rows(store, "tiny@7", file)
    with pytest.raises(ImportRefused, match="--version 2"):
        publish_rows(store, "tiny@1", file, version="1")
    with pytest.raises(BadTensorFile, match="No such file"):
        publish_rows(store, "tiny@1", tmp_path / "nothing")


def test_a_version_whose_base_went_is_named_and_no_other_suffers(checkpoint: Any, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    import_checkpoint(checkpoint.folder, store, "tiny", part_bytes=PART_BYTES)
    publish_rows(store, "tiny@1", changes(tmp_path / "rows", [1]), name="tiny+legal")
    import_checkpoint(checkpoint.folder, store, "tiny", version="2", part_bytes=PART_BYTES)
    shutil.rmtree(tmp_path / "store" / "tiny" / "1")
    found = store.catalogue()
    assert list(found.manifests) == ["tiny"]
    assert "its base tiny@1 is not there" in found.problems["tiny+legal", "1"]
    with pytest.raises(StoreError, match="its base tiny@1 is not there"):
        store.manifest("tiny+legal")


def test_a_look_asks_nothing_about_bases_that_it_has_read(checkpoint: Any, tmp_path: Path) -> None:
    """A bucket with a hundred domains would be asked hundreds of times."""
    asked: list[tuple[str, str]] = []

    class Noting(Store):
        def has(self, model: str, version: str) -> bool:
            asked.append((model, version))
            return super().has(model, version)

    store = Noting(tmp_path / "store")
    import_checkpoint(checkpoint.folder, store, "tiny", part_bytes=PART_BYTES)
    for name in ("another", "tiny+legal"):
        publish_rows(store, "tiny@1", changes(tmp_path / "rows", [1]), name=name)
    asked.clear()
    before = store.answered
    assert list(store.catalogue().manifests) == ["another", "tiny", "tiny+legal"]
    assert asked == [] and store.answered > before
    shutil.rmtree(tmp_path / "store" / "tiny")
    assert not store.catalogue().manifests and set(asked) == {("tiny", "1")}


@pytest.mark.parametrize("damage", ["flip", "cut", "ids"])
def test_a_damaged_overlay_is_refused(checkpoint: Any, tmp_path: Path, damage: str) -> None:
    store = Store(tmp_path / "store")
    import_checkpoint(checkpoint.folder, store, "tiny", part_bytes=PART_BYTES)
    manifest = publish_rows(store, "tiny@1", changes(tmp_path / "rows", [1, 2]))
    table, overlay = manifest.tables[0], manifest.overlays("ngram")[0]
    path = Path(store.location("tiny", "2", overlay.file))
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[-3] ^= 1
    elif damage == "cut":
        del data[-3:]
    else:
        overlay = overlay.model_copy(update={"rows": 1, "bytes": overlay.bytes // 2})
    path.write_bytes(data)
    with pytest.raises(CorruptPart, match=r"(publish|Publish) the version again"):
        read_overlay(path, table, overlay)


def test_t11_rollback_serves_the_version_before_again(checkpoint: Any, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    base = import_checkpoint(checkpoint.folder, store, "tiny", dtype="fp32", part_bytes=PART_BYTES)
    rows = {"1": stored_rows(store, base)}
    for version, ids in (("2", [1, 2]), ("3", [2, 5000])):
        file = changes(tmp_path / "rows", ids, float(version))
        rows[version] = stored_rows(store, publish_rows(store, "tiny", file))
    for new, restores in (("4", "2"), ("5", "1")):
        manifest = rollback(store, "tiny")
        assert (manifest.version, manifest.base and manifest.base.restores) == (new, restores)
        assert store.manifest("tiny") == manifest
        assert np.array_equal(stored_rows(store, manifest), rows[restores])
    with pytest.raises(
        NotFound, match=r"tiny@5 has the rows of version 1, and .* has no version before it: name another one with --to"
    ):
        rollback(store, "tiny")
    with pytest.raises(InvalidRequest, match="tiny@1 has the rows that are served already, as tiny@5"):
        rollback(store, "tiny", to="1")
    again = rollback(store, "tiny", to="3")
    assert np.array_equal(stored_rows(store, again), rows["3"])


def test_an_import_over_a_base_writes_the_rows_that_differ(make_checkpoint: Callable[..., Any], tmp_path: Path) -> None:
    store, first, second = Store(tmp_path / "store"), make_checkpoint().write(), make_checkpoint(name="second")
    base = import_checkpoint(first.folder, store, "tiny", dtype="int8", part_bytes=PART_BYTES)
    names = list(second.tables)
    second.tables[names[0]][[3, 700]] = 7
    second.tables[names[2]][11, 5] = 9
    heads = [len(table) for table in second.tables.values()]
    changed = [3, 700, heads[0] + heads[1] + 11]
    second.write()
    manifest = import_checkpoint(second.folder, store, "tiny", version="2", base="1")
    assert (manifest.root, manifest.replaced_rows, manifest.tables) == (("tiny", "1"), 3, base.tables)
    whole = import_checkpoint(second.folder, store, "whole", dtype="int8", part_bytes=PART_BYTES)
    assert np.array_equal(stored_rows(store, manifest), stored_rows(store, whole))
    assert manifest.provenance and manifest.provenance.checkpoint == str(second.folder)
    # Over a version with a base: what differs from that one's base.
    third = import_checkpoint(first.folder, store, "tiny", version="3", base="2")
    assert (third.root, third.replaced_rows) == (("tiny", "1"), 0)
    [found] = diff(store, "tiny@1", "tiny@2")
    assert (found.differ, found.first_ids, sum(found.parts.values())) == (3, changed, 3)
    [other] = diff(store, "whole", "tiny@1")
    assert (other.differ, other.first_ids, other.largest) == (3, changed, found.largest)
    assert found.distance == pytest.approx(other.distance)
    before = get_format("int8").decode(torch.from_numpy(stored_rows(store, base)[changed]), DIM)
    after = get_format("int8").decode(torch.from_numpy(stored_rows(store, whole)[changed]), DIM)
    assert found.largest == float((after - before).abs().max())
    assert found.distance == pytest.approx(float((after - before).norm(dim=1).mean()))
    [same] = diff(store, "whole", "tiny@2")
    assert (same.differ, same.first_ids, same.parts) == (0, [], {})


def damage_overlays(store: Store, folder: str) -> list[int]:
    """Damage three overlays of a version under way. Returns their parts."""
    files = sorted(store.filesystem.find(folder))[:3]
    contents = [store.filesystem.cat_file(file) for file in files]
    store.filesystem.rm(files[0])
    store.filesystem.pipe_file(files[1], contents[1][:-1])
    store.filesystem.pipe_file(files[2], contents[2][PAGE_BYTES:])
    return [int(file[-len("00000.safetensors") : -len(".safetensors")]) for file in files]


@pytest.mark.parametrize("url", ["{}/store", "memory://over-a-base"])
def test_an_import_over_a_base_goes_on_where_it_was_killed(
    make_checkpoint: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    store, first, second = Store(url.format(tmp_path)), make_checkpoint().write(), make_checkpoint(name="second")
    parts = len(import_checkpoint(first.folder, store, "tiny", part_bytes=PART_BYTES).tables[0].parts)
    for table in second.tables.values():
        table[[1, -1]] = 7
    second.write()
    compared, told, dies_at, chunks = [], [], parts - 2, importing._stored_chunks

    def compare(plan: Any, part: Any) -> Iterator[torch.Tensor]:
        compared.append(part.index)
        if len(compared) == dies_at + 1:
            raise Killed
        return chunks(plan, part)

    def go_on() -> Manifest:
        options: Any = {"version": "2", "base": "1", "progress": lambda done, total: told.append((done, total))}
        return import_checkpoint(second.folder, store, "tiny", **options)

    monkeypatch.setattr(importing, "_stored_chunks", compare)
    with pytest.raises(Killed):
        go_on()
    assert store.versions("tiny") == ["1"]
    damaged = [] if store.is_local else damage_overlays(store, store.location("tiny", "2", "ngram"))
    manifest = go_on()
    # The part that it died at is compared again, and damaged ones are.
    assert compared == [*range(dies_at + 1), *damaged, *range(dies_at, parts)]
    assert told[-1][0] == told[-1][1]
    assert 0 < len(manifest.overlays("ngram")) < parts  # parts without any are gone on from, too
    whole = import_checkpoint(second.folder, store, "whole", part_bytes=PART_BYTES)
    assert np.array_equal(stored_rows(store, manifest), stored_rows(store, whole))


def test_an_import_over_a_base_of_other_tables_is_refused(
    make_checkpoint: Callable[..., Any], checkpoint: Any, tmp_path: Path
) -> None:
    store = Store(tmp_path / "store")
    import_checkpoint(checkpoint.folder, store, "tiny", part_bytes=PART_BYTES)
    refusals: list[tuple[dict[str, Any], str]] = [
        ({"dtype": "int4"}, "stores table ngram as int8: leave --dtype out"),
        ({"part_bytes": 1 << 20}, "leave --part-size out"),
        ({"base": "9"}, "no version '9'"),
    ]
    for options, message in refusals:
        with pytest.raises((InvalidRequest, NotFound), match=message):
            import_checkpoint(checkpoint.folder, store, "tiny", **{"version": "2", "base": "1", **options})
    other = make_checkpoint(name="other")
    other.config["eos_token_id"] = 1
    with pytest.raises(ImportRefused, match="import it without --base"):
        import_checkpoint(other.write().folder, store, "tiny", version="2", base="1")
    with pytest.raises(InvalidRequest, match="cannot be compared"):
        import_checkpoint(checkpoint.folder, store, "few", generic={next(iter(checkpoint.tables)): "ngram"})
        diff(store, "tiny", "few")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["local", "remote"])
def test_the_same_publish_ends_well_whenever_the_first_one_was_killed(
    checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    cls, scheme = (Draft, "") if kind == "local" else (RemoteDraft, "simplecache::file://")
    seen = set()
    import_checkpoint(checkpoint.folder, tmp_path / "first", "tiny", dtype="keep", part_bytes=PART_BYTES)
    ids = [0, 5, 6000]
    file = changes(tmp_path / "rows", ids)
    for step in range(1, MOST_STEPS):
        folder = tmp_path / f"store-{step}"
        shutil.copytree(tmp_path / "first", folder)
        url = f"{scheme}{folder}"
        with killed_while_publishing(cls, step) as had_it:
            publish_rows(url, "tiny@1", file)
        store = Store(url)
        there = store.has("tiny", "2")
        if had_it == [False]:  # it had ended before: then it is somebody's second publish
            assert publish_rows(url, "tiny@1", file).version == "3"
            break
        seen.add(there)
        manifest = publish_rows(url, "tiny@1", file)
        assert manifest.version == "2"
        local = Store(folder)
        assert local.manifest("tiny") == manifest
        assert np.array_equal(stored_rows(local, manifest)[ids], encoded("bf16", ids))
        assert sorted(path.name for path in (folder / "tiny").iterdir()) == ["1", "2"]
        assert sorted(path.name for path in (folder / "tiny" / "2").iterdir()) == ["manifest.json", "ngram"]
        assert not list((tmp_path / "tmp").glob("embedding-service-import-*"))
    else:
        raise AssertionError("it never came to its end")
    assert seen == {False, True}
