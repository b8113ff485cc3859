"""Two machines that make one version of a remote store: one is refused, and what the other makes stays whole."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from store.test_overlays import PART_BYTES, changes

from embedding_service.errors import ImportRefused, StoreError
from embedding_service.store import Manifest, Store
from embedding_service.store.draft import RemoteDraft, finish_published
from embedding_service.store.garbage import find_garbage, remove
from embedding_service.store.importing import import_checkpoint
from embedding_service.store.publishing import publish_rows
from embedding_service.store.reading import check_part


class Killed(Exception):
    """The process is gone."""


class Machines:
    """Each has a folder for temporary files of its own, in which drafts are."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self._folder, self._patch = folder, patch
        self.use("first")

    def use(self, name: str) -> None:
        """What is done from here on is done on that machine."""
        (self._folder / name).mkdir(exist_ok=True)
        self._patch.setattr("tempfile.tempdir", str(self._folder / name))

    @contextmanager
    def after_parts(self, count: int, happens: Callable[[], object]) -> Iterator[None]:
        """After so many copies to the store something happens, in which this does not count."""
        real, left = RemoteDraft.keep, [count]

        def keep(draft: RemoteDraft, part: Any) -> None:
            real(draft, part)
            left[0] -= 1
            if not left[0]:
                happens()

        with self._patch.context() as patch:
            patch.setattr(RemoteDraft, "keep", keep)
            yield


@pytest.fixture
def machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machines:
    return Machines(tmp_path, monkeypatch)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(f"simplecache::file://{tmp_path}/store")


def imported(checkpoint: Any, store: Store, dtype: str = "fp32", version: str = "1") -> Manifest:
    return import_checkpoint(checkpoint.folder, store, "tiny", version=version, dtype=dtype, part_bytes=PART_BYTES)


def is_whole(store: Store, manifest: Manifest) -> bool:
    """Whether it is there as its import said, and nothing else is."""
    for part in manifest.tables[0].parts:
        check_part(store, manifest, part)
    found = sorted(path.name for path in Path(store.location("tiny", manifest.version)).iterdir())
    return store.manifest("tiny", manifest.version) == manifest and found == ["manifest.json", "ngram"]


def killed() -> None:
    raise Killed


def test_a_version_that_another_machine_makes_is_refused(checkpoint: Any, store: Store, machines: Machines) -> None:
    claim = Path(store.location("tiny", "1", ".claim"))

    def second() -> None:
        machines.use("second")
        with pytest.raises(
            ImportRefused, match=r"^tiny@1 is being made by .* since .*: choose another --version.*dead"
        ):
            imported(checkpoint, store, "int8")
        assert f"remove {claim}. " in str(refusal(checkpoint, store))
        assert imported(checkpoint, store, "int8", "2").version == "2"
        machines.use("first")

    with machines.after_parts(2, second):
        manifest = imported(checkpoint, store)
    assert is_whole(store, manifest)


def refusal(checkpoint: Any, store: Store) -> ImportRefused:
    with pytest.raises(ImportRefused) as refused:
        imported(checkpoint, store, "int8")
    return refused.value


def test_a_claim_that_was_removed_ends_the_import_that_made_it(
    checkpoint: Any, store: Store, machines: Machines, tmp_path: Path
) -> None:
    """Somebody took it for dead. What the other publishes stays whole. The first does not say that it is its own."""
    others: list[Manifest] = []

    def second() -> None:
        Path(store.location("tiny", "1", ".claim")).unlink()
        machines.use("second")
        others.append(imported(checkpoint, store, "fp16"))
        machines.use("first")

    with machines.after_parts(2, second), pytest.raises(ImportRefused, match="name taken"):
        imported(checkpoint, store)
    assert is_whole(store, others[0])
    with pytest.raises(ImportRefused, match="name taken"):
        imported(checkpoint, store)
    assert is_whole(store, others[0])
    assert not list((tmp_path / "first").iterdir())
    with (
        machines.after_parts(1, lambda: Path(store.location("tiny", "2", ".claim")).unlink()),
        pytest.raises(ImportRefused, match="somebody removed the claim of this import of tiny@2: run the same"),
    ):
        imported(checkpoint, store, version="2")
    assert is_whole(store, imported(checkpoint, store, version="2"))


def test_parts_of_another_machine_are_not_taken_for_own_ones(
    checkpoint: Any, make_checkpoint: Callable[..., Any], store: Store, machines: Machines
) -> None:
    """They have the right size. The journal of a draft counts only while the draft's claim is there."""
    other = make_checkpoint(name="other")
    for rows in other.tables.values():
        rows += 1
    other.write()
    with machines.after_parts(3, killed), pytest.raises(Killed):
        imported(checkpoint, store)
    Path(store.location("tiny", "1", ".claim")).unlink()
    machines.use("second")
    with machines.after_parts(4, killed), pytest.raises(Killed):
        imported(other, store)
    Path(store.location("tiny", "1", ".claim")).unlink()
    machines.use("first")
    assert is_whole(store, imported(checkpoint, store))


def test_of_two_publishes_that_chose_one_version_one_is_refused(
    checkpoint: Any, store: Store, machines: Machines, tmp_path: Path
) -> None:
    imported(checkpoint, store)
    first, second = changes(tmp_path / "rows", [1, 2]), changes(tmp_path / "other", [3])

    def meanwhile() -> None:
        machines.use("second")
        with pytest.raises(ImportRefused, match="tiny@2 is being made by"):
            publish_rows(store, "tiny", second)
        machines.use("first")

    with machines.after_parts(1, meanwhile):
        assert publish_rows(store, "tiny", first).full_name == "tiny@2"
    assert store.versions("tiny") == ["1", "2"]
    assert store.manifest("tiny").replaced_rows == 2
    assert publish_rows(store, "tiny", second).replaced_rows == 3


def test_a_manifest_is_not_written_over_another(checkpoint: Any, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another's came after the last look."""
    imported(checkpoint, store)
    theirs, real = store.manifest("tiny", "1").to_json().encode(), RemoteDraft._check_whole

    def check(draft: RemoteDraft, manifest: Manifest) -> None:
        real(draft, manifest)
        draft.store.filesystem.pipe_file(store.location("tiny", "2", "manifest.json"), theirs)

    monkeypatch.setattr(RemoteDraft, "_check_whole", check)
    with pytest.raises(ImportRefused, match="name taken"):
        imported(checkpoint, store, version="2")
    assert Path(store.location("tiny", "2", "manifest.json")).read_bytes() == theirs


def test_the_same_job_on_another_machine_is_told_what_was_published(
    checkpoint: Any, store: Store, machines: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And another job is not, whatever its own machine remembers."""
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(RemoteDraft, "clear_published", lambda draft: killed())
        imported(checkpoint, store)
    machines.use("second")
    with pytest.raises(ImportRefused, match="name taken"):
        imported(checkpoint, store, "int8")
    assert is_whole(store, imported(checkpoint, store))
    assert finish_published(store, "tiny", "1", "any") is None


def test_lost_parts_are_not_published(checkpoint: Any, store: Store, machines: Machines) -> None:
    lose = Path(store.location("tiny", "1", "ngram", "part-00001.safetensors")).unlink
    with (
        machines.after_parts(3, lose),
        pytest.raises(StoreError, match=r"tiny@1 is not published: somebody removed ngram/part-00001.safetensors whi"),
    ):
        imported(checkpoint, store)
    assert is_whole(store, imported(checkpoint, store))


def test_what_is_given_up_leaves_nothing_and_what_died_is_found_by_gc(
    checkpoint: Any, make_checkpoint: Callable[..., Any], store: Store, machines: Machines, tmp_path: Path
) -> None:
    bad = make_checkpoint(name="bad")
    list(bad.tables.values())[-1][-1, 3] = float("nan")
    bad.write()
    imported(checkpoint, store)
    with pytest.raises(ImportRefused, match="row"):
        imported(bad, store, "int8", "2")
    assert [path.name for path in (tmp_path / "store" / "tiny").iterdir()] == ["1"]
    with machines.after_parts(2, killed), pytest.raises(Killed):
        imported(checkpoint, store, version="3")
    assert find_garbage(store, 1, drafts=True) == []  # it may run somewhere
    dead = Path(store.location("tiny", "3"))
    for path in dead.rglob("*"):
        os.utime(path, (0, 0))
    [found] = find_garbage(store, 1, drafts=True)
    assert (found.kind, found.name) == ("draft", "tiny@3") and found.bytes > 2 * PART_BYTES // 2
    assert find_garbage(store, 1) == []
    mine = dead / "notes.txt"
    mine.touch()
    os.utime(mine, (0, 0))
    assert find_garbage(store, 1, drafts=True) == []  # somebody else's folder
    mine.unlink()
    (dead / ".claim").touch()
    assert not remove(store, found)
    os.utime(dead / ".claim", (0, 0))
    assert remove(store, found)
    assert not dead.exists()
    assert is_whole(store, imported(checkpoint, store, version="3"))


def test_the_base_of_a_version_under_way_stays(
    checkpoint: Any, store: Store, machines: Machines, tmp_path: Path
) -> None:
    imported(checkpoint, store)
    imported(checkpoint, store, version="2")
    [before] = find_garbage(store, 1)
    seen: list[bool] = []

    def gc() -> None:
        seen.extend([before in find_garbage(store, 1), remove(store, before)])

    with machines.after_parts(1, gc):
        publish_rows(store, "tiny@1", changes(tmp_path / "rows", [1]), name="tiny+legal")
    assert seen == [False, False]
    assert not remove(store, before)
    assert store.catalogue().problems == {}
