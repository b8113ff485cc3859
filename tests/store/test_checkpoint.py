"""Which files of a checkpoint folder are read: those that transformers would read, and none from elsewhere."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from embedding_service.checkpoint import Checkpoint, LooseTensors, tensor_files
from embedding_service.errors import ImportRefused
from embedding_service.store import Store
from embedding_service.store.importing import import_checkpoint
from embedding_service.store.split import split_checkpoint
from model_worker.checkpoint import CheckpointTensors

Make = Callable[..., Any]
INDEX = "model.safetensors.index.json"


def value_read(tensor: Any) -> float:
    """The first value of a float32 tensor of an import's reader."""
    return float(tensor.read_rows(0, 1)[0, 0])


def folder_of(path: Path, **files: float) -> Path:
    """A checkpoint folder with files that each hold a matrix "t" of that value."""
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    for name, value in files.items():
        save_file({"t": torch.full((2, 2), value)}, path / f"{name}.safetensors")
    return path


def index_of(folder: Path, **files: Any) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, 1.0),  # the single file, whatever an index beside it says
        ({"transformers_weights": "other.safetensors"}, 2.0),
        ({"transformers_weights": INDEX}, 2.0),
    ],
    ids=str,
)
def test_imports_and_workers_take_the_file_that_transformers_takes(
    tmp_path: Path, config: dict[str, str], expected: float
) -> None:
    folder = folder_of(tmp_path / "c", model=1.0, other=2.0)
    (folder / "config.json").write_text(json.dumps(config))
    index_of(folder, t="other.safetensors")
    assert value_read(Checkpoint(folder).tensors["t"]) == expected
    assert float(CheckpointTensors(folder).tensor("t")[0, 0]) == expected


def test_transformers_itself_takes_the_single_file(tmp_path: Path) -> None:
    """What the rule above stands on."""
    from transformers import BertConfig, BertModel

    config = BertConfig(vocab_size=8, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4)
    model, older = BertModel(config), BertModel(config)
    older.save_pretrained(tmp_path / "older")
    model.save_pretrained(tmp_path / "both")
    (tmp_path / "older" / "model.safetensors").rename(tmp_path / "both" / "model-00001-of-00001.safetensors")
    names = model.state_dict()
    index_of(tmp_path / "both", **dict.fromkeys(names, "model-00001-of-00001.safetensors"))
    loaded = BertModel.from_pretrained(tmp_path / "both").state_dict()
    assert all(torch.equal(loaded[name], names[name]) for name in names)
    name = "embeddings.word_embeddings.weight"
    assert torch.equal(Checkpoint(tmp_path / "both").tensors[name].read_rows(0, 8), names[name])


@pytest.mark.parametrize(
    "file", ["../secret.safetensors", "sub/../../secret.safetensors", "/ABSOLUTE", "link", "a\0b", "loop"]
)
def test_an_index_cannot_name_what_lies_elsewhere(tmp_path: Path, file: str) -> None:
    folder = folder_of(tmp_path / "c")
    folder_of(tmp_path / "elsewhere", secret=3.0)
    shutil.copy(tmp_path / "elsewhere" / "secret.safetensors", tmp_path / "secret.safetensors")
    (folder / "link").symlink_to("../elsewhere/secret.safetensors")
    (folder / "loop").symlink_to("loop")
    index_of(folder, t=file.replace("/ABSOLUTE", str(tmp_path / "secret.safetensors")))
    for reader in (Checkpoint, LooseTensors, CheckpointTensors):
        with pytest.raises(ImportRefused, match="from elsewhere; only files below the folder are read") as caught:
            reader(folder)
        assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", ["model.safetensors", INDEX, "config.json"])
def test_nor_are_links_out_of_the_folder_read(tmp_path: Path, name: str) -> None:
    folder = folder_of(tmp_path / "c", weights=1.0)
    outside = folder_of(tmp_path / "outside", model=1.0)
    index_of(outside, t="weights.safetensors")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(outside / name)
    with pytest.raises(ImportRefused, match="from elsewhere"):
        Checkpoint(folder)
    inside = folder_of(tmp_path / "inside", weights=1.0)
    (inside / "model.safetensors").symlink_to("weights.safetensors")
    assert value_read(Checkpoint(inside).tensors["t"]) == 1.0


def test_a_snapshot_of_a_hubs_cache_is_read_through_its_links(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "0123"
    folder_of(blobs, part=4.0)
    index_of(blobs, t="part.safetensors")
    snapshot.mkdir(parents=True)
    for name in ("config.json", INDEX, "part.safetensors"):
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    assert value_read(Checkpoint(snapshot).tensors["t"]) == 4.0
    (tmp_path / "shortcut").symlink_to(snapshot)
    assert float(CheckpointTensors(tmp_path / "shortcut").tensor("t")[0, 0]) == 4.0
    # Not through a cache's folder that leads elsewhere itself.
    blobs.rename(tmp_path / "away")
    blobs.symlink_to(tmp_path / "away")
    with pytest.raises(ImportRefused, match="from elsewhere"):
        Checkpoint(snapshot)


@pytest.mark.parametrize("weight_map", [None, [], {"t": None}, {"t": ["x"]}, "x"], ids=str)
def test_an_index_without_a_map(tmp_path: Path, weight_map: object) -> None:
    folder = folder_of(tmp_path / "c")
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ImportRefused, match="no weight_map from tensor names to files: download it again"):
        tensor_files(folder, {})


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a": ' * 100_000, "\ud800", "nul", '{"a": 1' + "0" * 5000 + "}"], ids=range(5)
)
def test_a_config_that_is_no_json(tmp_path: Path, text: str) -> None:
    folder = folder_of(tmp_path / "c", model=1.0)
    (folder / "config.json").write_text(text, errors="surrogatepass")
    with pytest.raises(ImportRefused, match=r"config\.json is not"):
        Checkpoint(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", INDEX])
def test_a_fifo_is_not_waited_for(tmp_path: Path, name: str) -> None:
    folder = folder_of(tmp_path / "c", model=1.0)
    if name == INDEX:
        (folder / "model.safetensors").unlink()
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    for reader in (Checkpoint, CheckpointTensors):
        with pytest.raises(ImportRefused, match="it is no regular file"):
            reader(folder)


def test_a_split_copies_no_file_from_elsewhere(make_checkpoint: Make, tmp_path: Path) -> None:
    checkpoint = make_checkpoint().write()
    (tmp_path / "secret").write_text("secret")
    (checkpoint.folder / "notes.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(ImportRefused, match=r"'notes.txt' from elsewhere"):
        split_checkpoint(checkpoint.folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_rows_and_dense_part_of_a_folder_with_an_older_index_are_of_one_file(
    make_checkpoint: Make, tmp_path: Path
) -> None:
    checkpoint = make_checkpoint(torch.float32).write(3)
    for tensors in (checkpoint.tables, checkpoint.dense):
        for tensor in tensors.values():
            tensor += 1
    save_file({**checkpoint.dense, **checkpoint.tables}, checkpoint.folder / "model.safetensors")
    manifest = import_checkpoint(checkpoint.folder, tmp_path / "s", "tiny", dtype="keep")
    part = Store(tmp_path / "s").part_path(manifest, manifest.tables[0].parts[0])
    assert part.read_bytes().endswith(checkpoint.rows[: manifest.tables[0].parts[0].rows].numpy().tobytes())
    worker = CheckpointTensors(checkpoint.folder)
    assert all(torch.equal(worker.tensor(name), tensor) for name, tensor in checkpoint.dense.items())
