"""An import that is killed while it publishes, before each of its steps, and the same job run again."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import pytest

from embedding_service.errors import ImportRefused
from embedding_service.store import Manifest, Store
from embedding_service.store.draft import Draft, RemoteDraft, open_draft
from embedding_service.store.importing import import_checkpoint
from embedding_service.store.store import natural_order, next_version
from embedding_service.tensorfile import PAGE_BYTES, byte_view

# What the interpreter tells of before it does it.
STEPS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree"}
MOST_STEPS = 60


class Killed(Exception):
    """The process that published is gone."""


def publish_and_die(publish: Callable[[], None], step: int) -> bool:
    """Publish in a process of its own that is killed before its n-th step; whether it had that many."""
    child = os.fork()
    if not child:
        _publish_in_child(publish, step)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def _publish_in_child(publish: Callable[[], None], step: int) -> NoReturn:
    left = step

    def before(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if event in STEPS:
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)

    try:
        sys.addaudithook(before)
        publish()
        os._exit(0)
    finally:
        os._exit(1)


@contextmanager
def killed_while_publishing(cls: type[Draft], step: int) -> Iterator[list[bool]]:
    """What is published within is killed before its n-th step. Afterwards: whether it had that many."""
    real, had_it = cls.publish, list[bool]()

    def killed(draft: Draft, manifest: Manifest) -> None:
        had_it.append(publish_and_die(lambda: real(draft, manifest), step))
        raise Killed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(cls, "publish", killed)
        yield had_it


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["local", "remote"])
def test_the_same_job_ends_well_whenever_the_first_one_was_killed(
    checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    cls, scheme = (Draft, "") if kind == "local" else (RemoteDraft, "simplecache::file://")
    seen = set()
    for step in range(1, MOST_STEPS):
        url = f"{scheme}{tmp_path}/store-{step}"
        with killed_while_publishing(cls, step) as had_it:
            import_checkpoint(checkpoint.folder, url, "tiny", dtype="keep")
        store = Store(url)
        if had_it == [False]:  # it had ended before: then it is somebody's second import
            with pytest.raises(ImportRefused, match="name taken"):
                import_checkpoint(checkpoint.folder, url, "tiny", dtype="keep")
            break
        seen.add(store.has("tiny", "1"))
        if store.has("tiny", "1"):
            with pytest.raises(ImportRefused, match="name taken"):  # of another job, by its dtype
                import_checkpoint(checkpoint.folder, url, "tiny", dtype="int8")
        manifest = import_checkpoint(checkpoint.folder, url, "tiny", dtype="keep")
        assert store.manifest("tiny") == manifest
        parts = [store.location("tiny", "1", part.file) for part in manifest.tables[0].parts]
        rows = b"".join(store.filesystem.cat_file(part)[PAGE_BYTES:] for part in parts)
        assert rows == bytes(byte_view(checkpoint.rows))
        folder = tmp_path / f"store-{step}" / "tiny"
        assert sorted(path.name for path in folder.iterdir()) == ["1"]
        assert sorted(path.name for path in (folder / "1").iterdir()) == ["manifest.json", "ngram"]
        assert not list((tmp_path / "tmp").glob("embedding-service-import-*"))
    else:
        raise AssertionError("it never came to its end")
    assert seen == {False, True} and step > 4


def test_a_version_that_was_published_after_the_first_look_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Draft.locked

    @contextmanager
    def published_meanwhile(draft: Draft) -> Iterator[None]:
        (draft.folder.parent / "1").mkdir(parents=True)
        with real(draft):
            yield

    monkeypatch.setattr(Draft, "locked", published_meanwhile)
    with pytest.raises(ImportRefused, match="name taken"), open_draft(Store(tmp_path), "m", "1"):
        raise AssertionError("two imports of one name")
    assert [path.name for path in (tmp_path / "m").iterdir()] == ["1"]


def test_half_a_manifest_in_a_remote_store_is_written_again(
    checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(f"simplecache::file://{tmp_path}/store")

    def half(draft: Draft, manifest: Manifest) -> None:
        draft.store.filesystem.pipe_file(store.location("tiny", "1", "manifest.json"), manifest.to_json()[:99].encode())
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(RemoteDraft, "publish", half)
        import_checkpoint(checkpoint.folder, store, "tiny")
    manifest = import_checkpoint(checkpoint.folder, store, "tiny")
    assert store.manifest("tiny") == manifest


@pytest.mark.parametrize(
    ("versions", "expected"),
    [
        (["1"], "2"),
        (["1", "2", "10"], "11"),
        (["v1"], "v2"),
        (["1", "v1"], "v2"),
        (["2025.9", "2025.10"], "2025.11"),
        (["v1-rc"], "v1-rc2"),
        (["1", "beta"], "beta2"),
        (["v009"], "v10"),
        ([], "2"),
    ],
    ids=str,
)
def test_the_version_that_is_recommended_sorts_last(versions: list[str], expected: str) -> None:
    assert versions == sorted(versions, key=natural_order)
    assert next_version(versions) == expected
    assert max([*versions, expected], key=natural_order) == expected


def test_what_is_recommended_is_then_served(checkpoint: Any, tmp_path: Path) -> None:
    import_checkpoint(checkpoint.folder, tmp_path, "tiny", version="v1")
    with pytest.raises(ImportRefused, match=r"--version v2$"):
        import_checkpoint(checkpoint.folder, tmp_path, "tiny", version="v1")
    import_checkpoint(checkpoint.folder, tmp_path, "tiny", version="v2")
    assert Store(tmp_path).manifest("tiny").version == "v2"
