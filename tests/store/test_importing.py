"""Importing: every row where it belongs, refusals that say what to do, and no half version ever."""

import json
import math
import os
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from embedding_service.errors import ImportRefused, InvalidRequest, StoreError
from embedding_service.formats import FORMATS, get_format
from embedding_service.ngram import NgramHasher
from embedding_service.store import Manifest, Store, importing, verify
from embedding_service.store.draft import open_draft
from embedding_service.store.importing import import_checkpoint
from embedding_service.tensorfile import PAGE_BYTES

Make = Callable[..., Any]
PART_BYTES = 64 << 10
NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def stored_rows(store: Path, manifest: Manifest) -> torch.Tensor:
    """All stored rows of the one table, read back with the safetensors library: uint8 [rows, row_bytes]."""
    folder = store / manifest.model / manifest.version
    parts = [load_file(folder / part.file)["rows"] for part in manifest.tables[0].parts]
    return torch.cat(parts).view(torch.uint8).view(-1, manifest.tables[0].row_bytes)


@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize("dtype", NAMES, ids=str)
def test_kept_rows_equal_the_stacked_heads_bit_for_bit(
    make_checkpoint: Make, tmp_path: Path, dtype: torch.dtype, files: int
) -> None:
    checkpoint = make_checkpoint(dtype).write(files)
    manifest = import_checkpoint(checkpoint.folder, tmp_path / "store", "tiny", dtype="keep", part_bytes=PART_BYTES)
    table = manifest.table("ngram")
    assert (table.rows, table.dim, table.dtype) == (*checkpoint.rows.shape, NAMES[dtype])
    # No part ends where a head does, so parts hold rows of two heads.
    assert len(table.parts) > 4
    assert torch.equal(stored_rows(tmp_path / "store", manifest), checkpoint.rows.view(torch.uint8))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16], ids=str)
def test_rows_of_any_dtype_are_the_source_rows_encoded(
    make_checkpoint: Make, tmp_path: Path, source: torch.dtype, name: str
) -> None:
    checkpoint = make_checkpoint(source).write()
    part_bytes = max(PART_BYTES, math.lcm(get_format(name).row_bytes(checkpoint.rows.shape[1]), PAGE_BYTES))
    manifest = import_checkpoint(checkpoint.folder, tmp_path / "store", "tiny", dtype=name, part_bytes=part_bytes)
    stored = stored_rows(tmp_path / "store", manifest)
    assert torch.equal(stored, get_format(name).encode(checkpoint.rows))
    values = get_format(name).decode(stored, manifest.tables[0].dim)
    if name == "int4":
        step = (checkpoint.rows.float().amax(1) - checkpoint.rows.float().amin(1)) / 15
        assert ((values - checkpoint.rows.float()).abs().amax(1) <= 0.52 * step + 0.1).all()
    elif name in ("fp32", "fp16", "bf16", "int8"):
        # The values are whole numbers that name head and row: nearest is exact, for int8 too.
        assert torch.equal(values.round(), checkpoint.rows.float())


def test_the_manifest_says_what_was_imported(checkpoint: Any, tmp_path: Path) -> None:
    manifest = import_checkpoint(checkpoint.folder, tmp_path / "store", "tiny")
    assert Store(tmp_path / "store").manifest("tiny") == manifest
    assert (manifest.model, manifest.version, manifest.family) == ("tiny", "1", "longcat")
    hasher = NgramHasher.from_params(manifest.family, manifest.hash_params)
    assert hasher.params() == NgramHasher.from_config(checkpoint.folder).params()
    assert hasher.tables[0].rows == manifest.tables[0].rows
    assert manifest.dense is not None and set(manifest.dense.tensors) == set(checkpoint.dense)
    assert manifest.provenance is not None
    assert manifest.provenance.source_bytes == checkpoint.rows.numel() * 2
    assert manifest.provenance.files == {"model.safetensors": (checkpoint.folder / "model.safetensors").stat().st_size}
    for part in manifest.tables[0].parts:
        verify(tmp_path / "store" / "tiny" / "1" / part.file, part)
    # Nothing but the version is left.
    assert sorted(path.name for path in (tmp_path / "store" / "tiny").iterdir()) == ["1"]
    assert sorted(path.name for path in (tmp_path / "store" / "tiny" / "1").iterdir()) == ["manifest.json", "ngram"]


def test_progress_counts_the_checkpoints_bytes(checkpoint: Any, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    import_checkpoint(
        checkpoint.folder, tmp_path / "s", "tiny", part_bytes=PART_BYTES, progress=lambda *call: calls.append(call)
    )
    total = checkpoint.rows.numel() * 2
    assert calls == sorted(calls) and calls[-1] == (total, total) and len(calls) > 4


# Refusals


def refused(checkpoint: Path, store: Path, message: str, **options: Any) -> None:
    """Import, expect ImportRefused with this message, and that the store is as it was."""
    before = sorted(store.rglob("*"))
    with pytest.raises(ImportRefused, match=message):
        import_checkpoint(checkpoint, store, "tiny", **options)
    assert sorted(store.rglob("*")) == before


def without(checkpoint: Any, *files: str) -> Any:
    for file in files:
        (checkpoint.folder / file).unlink()
    return checkpoint


def with_tensor(checkpoint: Any, name: str, tensor: torch.Tensor) -> Any:
    checkpoint.tables[name] = tensor
    return checkpoint.write()


def with_config(checkpoint: Any, **keys: Any) -> Any:
    checkpoint.config.update(keys)
    return checkpoint.write()


HEAD = "model.ngram_embeddings.embedders.{}.weight"


def test_what_is_not_a_checkpoint_is_refused(make_checkpoint: Make, tmp_path: Path) -> None:
    store = tmp_path / "store"
    refused(tmp_path / "nowhere", store, "nowhere is no folder of a checkpoint: there is none")
    refused(without(make_checkpoint(name="a").write(), "config.json").folder, store, "not a checkpoint.*config.json")
    no_weights = without(make_checkpoint(name="b").write(), "model.safetensors")
    refused(no_weights.folder, store, "neither model.safetensors nor model.safetensors.index.json")
    bad = make_checkpoint(name="c").write()
    (bad.folder / "config.json").write_text("{")
    refused(bad.folder, store, "config.json is not JSON")
    (bad.folder / "config.json").write_text("[1]")
    refused(bad.folder, store, "config.json is not a JSON object")


@pytest.mark.parametrize("size", [0, 4, 500, -1])
def test_a_truncated_file_is_refused(checkpoint: Any, tmp_path: Path, size: int) -> None:
    file = checkpoint.folder / "model.safetensors"
    os.truncate(file, size % file.stat().st_size)
    refused(checkpoint.folder, tmp_path / "store", r"model\.safetensors.*(cut short|not a safetensors)")


def test_an_index_that_does_not_match_its_files_is_refused(make_checkpoint: Make, tmp_path: Path) -> None:
    checkpoint = make_checkpoint().write(3)
    index = checkpoint.folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    (checkpoint.folder / "model-00001.safetensors").rename(checkpoint.folder / "elsewhere")
    refused(checkpoint.folder, tmp_path / "store", "names files that are not there: model-00001.safetensors")
    (checkpoint.folder / "elsewhere").rename(checkpoint.folder / "model-00001.safetensors")
    content["weight_map"]["model.extra.weight"] = "model-00000.safetensors"
    index.write_text(json.dumps(content))
    refused(checkpoint.folder, tmp_path / "store", "model-00000.safetensors holds tensor model.extra.weight")
    index.write_text("{}")
    refused(checkpoint.folder, tmp_path / "store", "no weight_map")


def test_another_family_is_refused(checkpoint: Any, tmp_path: Path) -> None:
    with_config(checkpoint, architectures=["LlamaForCausalLM"], model_type="llama")
    refused(checkpoint.folder, tmp_path / "store", "model_type 'llama'.*known families: engram, gemma, longcat")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"emb_neighbor_num": None}, "lacks emb_neighbor_num"),
        ({"hidden_size": None}, "hidden_size None"),
        ({"hidden_size": 63}, "hidden_size 63 cannot be shared by 4 heads"),
        ({"hidden_size": 128}, r"is \[6151, 16\], but the config asks for \[6151, 32\]"),
        ({"vocab_size": 301}, r"embedders.0.weight is \[6151, 16\], but the config asks for \[6171, 16\]"),
        ({"vocab_size": "many"}, "config.json"),
        ({"emb_split_num": 3, "hidden_size": 96}, "lacks tensor model.ngram_embeddings.embedders.4.weight"),
        ({"emb_split_num": 1, "hidden_size": 32}, "embedders.2.weight, but its config has 2 heads"),
    ],
    ids=str,
)
def test_a_config_of_another_geometry_is_refused(
    checkpoint: Any, tmp_path: Path, keys: dict[str, Any], message: str
) -> None:
    refused(with_config(checkpoint, **keys).folder, tmp_path / "store", message)


def test_wrong_tensors_are_refused(make_checkpoint: Make, tmp_path: Path) -> None:
    store = tmp_path / "store"
    rows = make_checkpoint().tables[HEAD.format(1)].shape[0]
    double = with_tensor(make_checkpoint(name="a"), HEAD.format(1), torch.zeros(rows, 16, dtype=torch.float64))
    refused(double.folder, store, "embedders.1.weight has dtype F64; F32, F16, BF16 can be imported")
    mixed = with_tensor(make_checkpoint(name="b"), HEAD.format(1), torch.zeros(rows, 16))
    refused(mixed.folder, store, "embedders.1.weight is F32 but .*embedders.0.weight is BF16")
    flat = with_tensor(make_checkpoint(name="c"), HEAD.format(1), torch.zeros(rows * 16))
    refused(flat.folder, store, rf"is \[{rows * 16}\], but the config asks for \[{rows}, 16\]")


@pytest.mark.parametrize(("value", "reason"), [(float("nan"), "not finite"), (1e6, "overflows the fp16 scale or bias")])
def test_a_row_that_no_code_can_hold_is_refused_by_name(
    make_checkpoint: Make, tmp_path: Path, value: float, reason: str
) -> None:
    checkpoint = make_checkpoint()
    checkpoint.tables[HEAD.format(2)][4321] = value
    checkpoint.write()
    message = rf"tensor {HEAD.format(2)} row 4321 \(row {6151 + 6153 + 4321} of table ngram\) .*{reason}.*--dtype keep"
    refused(checkpoint.folder, tmp_path / "store", message)
    manifest = import_checkpoint(checkpoint.folder, tmp_path / "store", "tiny", dtype="keep")
    assert torch.equal(stored_rows(tmp_path / "store", manifest), checkpoint.rows.view(torch.uint8))


def test_a_remote_store_takes_the_room_of_one_part_here(
    checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = import_checkpoint(checkpoint.folder, tmp_path / "store", "whole").tables[0]
    assert len(whole.parts) > 2
    real, free = shutil.disk_usage(tmp_path), whole.parts[0].bytes + PAGE_BYTES
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: real._replace(free=free))
    refused(checkpoint.folder, tmp_path / "store", "no disk space")
    assert import_checkpoint(checkpoint.folder, "memory://room-of-a-part", "tiny").tables[0].parts == whole.parts
    free -= 1
    with pytest.raises(ImportRefused, match="no disk space"):
        import_checkpoint(checkpoint.folder, "memory://less-room", "tiny")


def test_a_table_larger_than_the_disk_is_refused_at_once(checkpoint: Any, tmp_path: Path) -> None:
    """A sparse file: it takes no space, but its rows would."""
    free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    ratio = 2 * free // (300 * 4 * 16)
    header, begin = {}, 0
    for head in range(4):
        rows = 300 * ratio + 2 * head + 1
        end = begin + rows * 16 * 2
        header[HEAD.format(head)] = {"dtype": "BF16", "shape": [rows, 16], "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header).encode()
    file = checkpoint.folder / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(file, 8 + len(text) + begin)
    with_config_only = {**checkpoint.config, "ngram_vocab_size_ratio": ratio}
    (checkpoint.folder / "config.json").write_text(json.dumps(with_config_only))
    refused(checkpoint.folder, tmp_path / "store", "no disk space: .* needs [0-9,]+ bytes, [0-9,]+ are free")


@pytest.mark.parametrize(
    "options",
    [{"dtype": "int5"}, {"version": "a/b"}, {"part_bytes": 100}, {"version": "."}],
    ids=str,
)
def test_wrong_options_are_refused(checkpoint: Any, tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest):
        import_checkpoint(checkpoint.folder, tmp_path / "store", "tiny", **options)
    assert not (tmp_path / "store").exists() or not list((tmp_path / "store").iterdir())


# Versions, interruptions, two at once


def test_a_taken_name_is_refused_and_a_new_version_goes_beside(make_checkpoint: Make, tmp_path: Path) -> None:
    store = tmp_path / "store"
    checkpoint = make_checkpoint().write()
    first = import_checkpoint(checkpoint.folder, store, "tiny", dtype="keep")
    refused(checkpoint.folder, store, "name taken.*--name, or add a version to it with --version 2")
    checkpoint.tables[HEAD.format(0)] += 1
    checkpoint.write()
    second = import_checkpoint(checkpoint.folder, store, "tiny", dtype="keep", version="10")
    assert Store(store).versions("tiny") == ["1", "10"]
    assert Store(store).manifest("tiny") == second
    assert Store(store).manifest("tiny", "1") == first
    assert torch.equal(stored_rows(store, second), checkpoint.rows.view(torch.uint8))
    assert not torch.equal(stored_rows(store, first), stored_rows(store, second))
    refused(checkpoint.folder, store, "--version 11")


def test_a_failure_halfway_leaves_the_earlier_version_alone(make_checkpoint: Make, tmp_path: Path) -> None:
    store = tmp_path / "store"
    checkpoint = make_checkpoint().write()
    first = import_checkpoint(checkpoint.folder, store, "tiny", part_bytes=PART_BYTES)
    rows = stored_rows(store, first)
    checkpoint.tables[HEAD.format(3)][6000] = float("inf")
    checkpoint.write()
    with pytest.raises(ImportRefused, match="row 6000"):
        import_checkpoint(checkpoint.folder, store, "tiny", version="2", part_bytes=PART_BYTES)
    assert Store(store).models() == ["tiny"] and Store(store).versions("tiny") == ["1"]
    assert Store(store).manifest("tiny") == first
    assert torch.equal(stored_rows(store, first), rows)


KILLED = """
import os, signal, sys
from embedding_service.store.importing import import_checkpoint
from embedding_service.tensorfile import PAGE_BYTES
def progress(done, total):
    if done > total * 0.6:
        os.kill(os.getpid(), signal.SIGKILL)
import_checkpoint(sys.argv[1], sys.argv[2], "tiny", part_bytes=int(sys.argv[3]), progress=progress)
"""


def kill_halfway(checkpoint: Any, store: Path) -> dict[Path, tuple[int, int]]:
    """Run an import that is killed; return inode and time of the parts it had finished."""
    run = subprocess.run(
        [sys.executable, "-c", KILLED, str(checkpoint.folder), str(store), str(PART_BYTES)], check=False
    )
    assert run.returncode == -signal.SIGKILL
    assert Store(store).models() == []
    parts = sorted((store / "tiny" / ".1.importing" / "ngram").glob("*.safetensors"))
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in parts}


@pytest.mark.slow
def test_a_killed_import_goes_on_where_it_was(make_checkpoint: Make, tmp_path: Path) -> None:
    store = tmp_path / "store"
    checkpoint = make_checkpoint().write()
    finished = kill_halfway(checkpoint, store)
    assert len(finished) >= 3
    spoilt = list(finished)[1]
    os.truncate(spoilt, spoilt.stat().st_size - 1)

    calls: list[int] = []
    manifest = import_checkpoint(
        checkpoint.folder, store, "tiny", part_bytes=PART_BYTES, progress=lambda done, total: calls.append(done)
    )
    assert torch.equal(stored_rows(store, manifest), get_format("int8").encode(checkpoint.rows))
    for path, (inode, time) in finished.items():
        stat = (store / "tiny" / "1" / "ngram" / path.name).stat()
        # Finished parts were kept as they were; the one that had been damaged was made again.
        assert ((stat.st_ino, stat.st_mtime_ns) == (inode, time)) == (path != spoilt)
    assert [path.name for path in (store / "tiny").iterdir()] == ["1"]


@pytest.mark.slow
@pytest.mark.parametrize("change", ["dtype", "part size", "checkpoint", "config"])
def test_an_import_of_something_else_begins_again(make_checkpoint: Make, tmp_path: Path, change: str) -> None:
    store = tmp_path / "store"
    checkpoint = make_checkpoint().write()
    kill_halfway(checkpoint, store)
    options: dict[str, Any] = {"dtype": "int8", "part_bytes": PART_BYTES}
    if change == "dtype":
        options["dtype"] = "int4"
    elif change == "part size":
        options["part_bytes"] *= 2
    elif change == "checkpoint":
        checkpoint.tables[HEAD.format(0)] += 1
        checkpoint.write()
    else:
        with_config(checkpoint, eos_token_id=3)
    manifest = import_checkpoint(checkpoint.folder, store, "tiny", **options)
    assert torch.equal(stored_rows(store, manifest), get_format(options["dtype"]).encode(checkpoint.rows))
    files = sorted(path.name for path in (store / "tiny" / "1" / "ngram").iterdir())
    assert files == [Path(part.file).name for part in manifest.tables[0].parts]


def test_all_of_a_version_is_on_disk_before_it_has_its_name(
    checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that loses its power then has all of it, or none. A part is on disk before the journal says so."""
    fsync, rename, published = os.fsync, os.rename, []
    synced: dict[int, int] = {}  # bytes that are on disk, by inode

    def note_sync(file: int) -> None:
        fsync(file)
        synced[os.fstat(file).st_ino] = os.fstat(file).st_size
        if Path(f"/proc/self/fd/{file}").readlink().name == "journal":
            assert_synced((tmp_path / "store").rglob("*.safetensors"))

    def note_name(source: Any, target: Any) -> None:
        if Path(source).is_dir():
            published.append(target)
            whole = [path for path in Path(source).rglob("*") if path.name != "lock"]
            assert len(whole) > 6
            assert_synced([Path(source), *whole])
        rename(source, target)

    def assert_synced(paths: Iterable[Path]) -> None:
        assert not [path for path in paths if synced.get(path.stat().st_ino) != path.stat().st_size]

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "rename", note_name)
    import_checkpoint(checkpoint.folder, tmp_path / "store", "tiny", dtype="fp32", part_bytes=PART_BYTES)
    assert len(published) == 1 and Path(published[0]).parent.stat().st_ino in synced


def test_a_full_disk_is_named_and_the_import_goes_on_later(checkpoint: Any, tmp_path: Path) -> None:
    """The third part is led to /dev/full, where the kernel says what a full disk says."""
    store = tmp_path / "store"
    target = store / "tiny" / ".1.importing" / "ngram" / "part-00002.partial"

    def lead_astray(done: int, total: int) -> None:
        if target.parent.exists() and not target.is_symlink():
            target.symlink_to("/dev/full")

    with pytest.raises(StoreError, match=r"the disk is full\. Finished parts are kept: run the same import again"):
        import_checkpoint(checkpoint.folder, store, "tiny", part_bytes=PART_BYTES, progress=lead_astray)
    kept = {path.name: path.stat().st_ino for path in target.parent.iterdir()}
    assert sorted(kept) == ["part-00000.safetensors", "part-00001.safetensors"]
    manifest = import_checkpoint(checkpoint.folder, store, "tiny", part_bytes=PART_BYTES)
    assert torch.equal(stored_rows(store, manifest), get_format("int8").encode(checkpoint.rows))
    assert (store / "tiny" / "1" / "ngram" / "part-00000.safetensors").stat().st_ino == kept["part-00000.safetensors"]


def test_a_source_that_shrinks_under_an_import_is_an_error(checkpoint: Any, tmp_path: Path) -> None:
    file = checkpoint.folder / "model.safetensors"
    with pytest.raises(StoreError, match="became shorter while tensor"):
        import_checkpoint(
            checkpoint.folder,
            tmp_path / "store",
            "tiny",
            part_bytes=PART_BYTES,
            progress=lambda done, total: os.truncate(file, 5000),
        )
    assert Store(tmp_path / "store").models() == []


def test_of_two_imports_at_once_the_second_is_refused(checkpoint: Any, tmp_path: Path) -> None:
    store = tmp_path / "store"
    with open_draft(Store(store), "tiny", "1"):
        refused(checkpoint.folder, store, "another import of tiny@1 is running")
        import_checkpoint(checkpoint.folder, store, "tiny", version="2")
    assert Store(store).versions("tiny") == ["2"]
    import_checkpoint(checkpoint.folder, store, "tiny")


def test_an_unwritable_store_is_refused(checkpoint: Any, tmp_path: Path) -> None:
    (tmp_path / "store").write_text("a file")
    with pytest.raises(ImportRefused, match="cannot write to"):
        import_checkpoint(checkpoint.folder, tmp_path / "store", "tiny")


def test_a_folder_that_others_may_write_to_is_not_used(
    checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its name in the folder for temporary files is known. A link there led to a file that was then emptied."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    url, theirs = f"simplecache::file://{tmp_path}/store", tmp_path / "theirs"
    theirs.write_text("theirs")
    with open_draft(Store(url), "tiny", "1") as draft:
        folder = draft.folder
    folder.chmod(0o777)
    (folder / "lock").unlink()
    (folder / "lock").symlink_to(theirs)
    with pytest.raises(ImportRefused, match=r"others may write to .*embedding-service-import-.*set TMPDIR"):
        import_checkpoint(checkpoint.folder, url, "tiny")
    assert theirs.read_text() == "theirs"
    shutil.rmtree(folder)
    import_checkpoint(checkpoint.folder, url, "tiny")


def test_more_parts_than_a_manifest_holds_are_refused_before_one_is_written(
    checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importing, "MOST_PARTS", 3)
    with pytest.raises(InvalidRequest, match=r"parts are too many: choose a --part-size that makes at most 3$"):
        import_checkpoint(checkpoint.folder, tmp_path / "store", "tiny", part_bytes=PART_BYTES)
    assert not (tmp_path / "store").exists()


def test_files_that_are_in_the_way_are_not_touched(checkpoint: Any, tmp_path: Path) -> None:
    mine = tmp_path / "store" / "tiny" / "1" / "notes.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    refused(checkpoint.folder, tmp_path / "store", "name taken")
    assert mine.read_text() == "mine"


@pytest.mark.slow
def test_an_import_takes_less_memory_than_four_parts(tmp_path: Path) -> None:
    from benchmarks.import_memory import make_checkpoint, watch_import

    part_bytes = 8 << 20
    make_checkpoint(tmp_path, 0.15)
    _, added = watch_import(tmp_path, tmp_path / "store", "int8", part_bytes)
    assert len(Store(tmp_path / "store").manifest("bench").tables[0].parts) > 8
    assert 0 < added["resident in all"] <= 4 * part_bytes, added
