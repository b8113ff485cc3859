"""`inspect` and `gc`, typed as a person types them."""

import fcntl
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from support.overlays import rows_file
from typer.testing import CliRunner

from embedding_service.cli import app
from embedding_service.errors import StoreError
from embedding_service.formats import get_format
from embedding_service.store.draft import open_draft
from embedding_service.store.garbage import find_garbage, remove
from embedding_service.store.manifest import Part, Table
from embedding_service.store.parts import NewPart, PartWriter
from embedding_service.store.publishing import publish_rows, rollback
from embedding_service.store.store import Store


@pytest.fixture
def own(store: Path, tmp_path: Path) -> Path:
    """A store with int8@1, and int8@2 to int8@4 over it."""
    shutil.copytree(store / "int8", tmp_path / "store" / "int8", copy_function=os.link)
    own = tmp_path / "store"
    publish_rows(own, "int8", rows_file(tmp_path / "rows", np.array([5, 9]), 7))
    rollback(own, "int8")
    publish_rows(own, "int8", rows_file(tmp_path / "more", np.array([6]), 7))
    return own


def typed(*arguments: object, code: int = 0) -> list[str]:
    """What a command prints, line by line."""
    result = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.output.splitlines()


def test_a_store_is_shown_and_verified(own: Path) -> None:
    lines = typed("inspect", own)
    assert [line.partition(":")[0] for line in lines] == ["int8@1", "int8@2", "int8@3", "int8@4"]
    assert "x 16 int8" in lines[0] and "parts" in lines[0]
    assert "2 rows over int8@1" in lines[1] and "0 rows over int8@1" in lines[2]
    [answer] = map(json.loads, typed("inspect", own, "--json", "--verify"))
    assert (answer["versions"][1]["base"], answer["versions"][1]["replaced_rows"]) == ("int8@1", 2)
    assert answer["problems"] == []
    assert typed("inspect", own, "--verify")[-1] == "every file of 4 versions is what its checksum says"
    (own.parent / "empty").mkdir()
    assert typed("inspect", own.parent / "empty", code=0)[0].startswith("no model in ")
    for command in ("inspect", "gc"):
        with pytest.raises(NotADirectoryError, match="is a file, and a store is a folder"):
            typed(command, own.parent / "rows")


@pytest.mark.parametrize("version", ["1", "2"])
def test_one_wrong_byte_is_found(own: Path, version: str) -> None:
    """In a part of a whole version, and in the rows that one replaces."""
    file = max((own / "int8" / version / "ngram").iterdir(), key=lambda path: path.stat().st_size)
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.unlink()  # a link to the store of other tests
    file.write_bytes(data)
    lines = typed("inspect", own, "--verify", code=1)
    [problem] = [line for line in lines if line.startswith("problem: ")]
    assert problem.startswith(f"problem: int8@{version}: ") and file.name in problem
    assert not any(line.startswith("problem") for line in typed("inspect", own))


def test_what_newer_versions_have_replaced_goes_but_no_base(own: Path) -> None:
    lines = typed("gc", own, "--keep", 1)
    assert [line.partition(":")[0] for line in lines[:-1]] == [
        "would remove version int8@2",
        "would remove version int8@3",
    ]
    assert lines[-1].endswith("in all: say --yes to remove them")
    assert Store(own).versions("int8") == ["1", "2", "3", "4"]
    log = own.parent / "audit.jsonl"
    assert typed("gc", own, "--keep", 1, "--yes", "--audit", log)[0].startswith("removed version int8@2")
    assert Store(own).versions("int8") == ["1", "4"]
    assert sorted(path.name for path in (own / "int8").iterdir()) == ["1", "4"]
    assert [json.loads(line)["model"] for line in log.read_text().splitlines()] == ["int8@2", "int8@3"]
    assert typed("gc", own, "--keep", 1) == ["nothing can go"]
    assert typed("inspect", own, "--verify")[-1] == "every file of 2 versions is what its checksum says"


def test_the_base_of_another_model_or_of_a_branch_stays(own: Path) -> None:
    publish_rows(own, "int8@1", rows_file(own.parent / "legal", np.array([6]), 7), name="int8+legal")
    for version in ("2", "3", "4"):
        shutil.rmtree(own / "int8" / version)
    shutil.copytree(own / "int8" / "1", own / "int8" / "5")
    manifest = own / "int8" / "5" / "manifest.json"
    text = manifest.read_text().replace('"version":"1"', '"version":"5"').replace('"version": "1"', '"version": "5"')
    manifest.unlink()
    manifest.write_text(text)
    assert typed("gc", own, "--keep", 1) == ["nothing can go"]
    shutil.rmtree(own / "int8+legal")
    assert typed("gc", own, "--keep", 1)[0].startswith("would remove version int8@1: ")


def test_nothing_goes_while_something_cannot_be_read(own: Path) -> None:
    (own / "int8" / "4" / "manifest.json").write_bytes(b"{")
    with pytest.raises(StoreError, match="nothing is removed, for what cannot be read may need it"):
        typed("gc", own, "--keep", 1, "--yes")
    assert Store(own).versions("int8") == ["1", "2", "3", "4"]
    [problem] = [line for line in typed("inspect", own, code=1) if line.startswith("problem")]
    assert "int8/4" in problem


def test_imports_that_were_broken_off_go_if_asked_for_and_not_while_they_run(own: Path) -> None:
    for name in (".7.importing", ".8.importing", ".9.removing"):
        (own / "int8" / name).mkdir()
        (own / "int8" / name / "lock").touch()
        (own / "int8" / name / "part").write_bytes(bytes(5000))
    with (own / "int8" / ".8.importing" / "lock").open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert [line.partition(":")[0] for line in typed("gc", own, "--keep", 4, "--yes")] == ["removed rest int8@9"]
        lines = typed("gc", own, "--keep", 4, "--yes", "--drafts")
    assert lines == ["removed draft int8@7: 4.9 KiB"]
    assert (own / "int8" / ".8.importing").exists()
    [answer] = map(json.loads, typed("gc", own, "--keep", 4, "--drafts", "--json"))
    assert [each["name"] for each in answer["would_remove"]] == ["int8@8"]


def test_an_import_that_goes_on_stays_and_one_that_lost_something_is_not_published(own: Path) -> None:
    """One went on between gc's look and its removal, and published a version without parts."""
    store, shape = Store(own), store_table(Store(own))
    with open_draft(store, "int8", "7") as draft:
        draft.resume("job")
        draft.keep(write_part(draft.folder, shape))
    [found] = find_garbage(store, 4, drafts=True)
    with open_draft(store, "int8", "7") as draft:
        draft.resume("job")
        assert not remove(store, found)
        part = draft.finished("t/part-00000.safetensors")
        assert isinstance(part, Part)
        manifest = store.manifest("int8", "1").model_copy(
            update={"version": "7", "tables": (shape.model_copy(update={"parts": (part,)}),)}
        )
        (draft.folder / part.file).rename(own / "part")
        with pytest.raises(StoreError, match=r"int8@7 is not published: somebody removed t/part-00000.safetensors whi"):
            draft.publish(manifest)
        (own / "part").rename(draft.folder / part.file)
        draft.folder.rename(own / "folder")
        with pytest.raises(StoreError, match=r"int8@7 is not published: somebody removed .*7.importing while"):
            draft.publish(manifest)
        (own / "folder").rename(draft.folder)
        draft.publish(manifest)
    assert not remove(store, found)
    assert store.manifest("int8", "7") == manifest


def test_a_removal_that_was_cut_off_is_no_hindrance(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The version's name was used again, and gc failed at it for good."""
    publish_rows(own, "int8@1", rows_file(own.parent / "again", np.array([5]), 7), version="0")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", cut_off)
        typed("gc", own, "--keep", 4, "--yes", code=130)
    publish_rows(own, "int8@1", rows_file(own.parent / "again", np.array([6]), 7), version="0")
    kinds = sorted(line.partition(" int8@0")[0] for line in typed("gc", own, "--keep", 4, "--yes"))
    assert kinds == ["removed rest", "removed version"]
    assert sorted(path.name for path in (own / "int8").iterdir()) == ["1", "2", "3", "4"]


def cut_off(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def store_table(store: Store) -> Table:
    """The shape of a table of one part."""
    like = store.manifest("int8", "1").tables[0]
    return like.model_copy(update={"name": "t", "rows": like.parts[0].rows})


def write_part(folder: Path, table: Table) -> Part:
    """A part of that table."""
    row_format = get_format(table.dtype)
    with PartWriter(folder, NewPart("t", 0, 0, table.rows, table.dim, row_format)) as writer:
        writer.write(row_format.encode(torch.zeros(table.rows, table.dim)))
        return writer.finish()
