"""Splitting a checkpoint: nothing lost, nothing twice, each half a checkpoint."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from embedding_service.errors import ImportRefused, StoreError
from embedding_service.store.importing import import_checkpoint
from embedding_service.store.split import split_checkpoint

Make = Callable[..., Any]


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint folder, found as transformers finds it, with the safetensors library."""
    index = folder / "model.safetensors.index.json"
    files = ["model.safetensors"]
    if index.exists():
        weight_map = json.loads(index.read_text())["weight_map"]
        files = sorted(set(weight_map.values()))
    tensors = {}
    for file in files:
        with safe_open(folder / file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (not a mapping)
                assert not index.exists() or weight_map[name] == file
                tensors[name] = opened.get_tensor(name)
    return tensors


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert sorted(found) == sorted(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@pytest.mark.parametrize(("files", "shard_bytes"), [(1, 5_000_000_000), (3, 5_000_000_000), (1, 250_000)])
def test_every_tensor_is_in_its_half_bit_for_bit(
    make_checkpoint: Make, tmp_path: Path, files: int, shard_bytes: int
) -> None:
    checkpoint = make_checkpoint().write(files)
    out = tmp_path / "out"
    split_checkpoint(checkpoint.folder, out, shard_bytes=shard_bytes)
    assert_equal(tensors_of(out / "dense"), checkpoint.dense)
    assert_equal(tensors_of(out / "tables"), checkpoint.tables)
    assert (out / "tables" / "model.safetensors.index.json").exists() == (shard_bytes == 250_000)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "out"]


def test_small_files_go_with_the_worker_and_weights_do_not(checkpoint: Any, tmp_path: Path) -> None:
    (checkpoint.folder / "code").mkdir()
    (checkpoint.folder / "code" / "modeling.py").write_text("x = 1")
    (checkpoint.folder / ".cache").mkdir()
    (checkpoint.folder / ".cache" / "lock").write_text("")
    (checkpoint.folder / "pytorch_model.bin").write_bytes(b"weights once more")
    split_checkpoint(checkpoint.folder, tmp_path / "out")
    dense = sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert dense == [
        "dense/code/modeling.py",
        "dense/config.json",
        "dense/model.safetensors",
        "dense/tokenizer.json",
        "tables/config.json",
        "tables/model.safetensors",
    ]
    assert (tmp_path / "out/dense/tokenizer.json").read_text() == (checkpoint.folder / "tokenizer.json").read_text()


def test_the_tables_half_imports_as_the_whole_does(make_checkpoint: Make, tmp_path: Path) -> None:
    checkpoint = make_checkpoint().write(2)
    split_checkpoint(checkpoint.folder, tmp_path / "out")
    whole = import_checkpoint(checkpoint.folder, tmp_path / "store", "whole", part_bytes=64 << 10)
    half = import_checkpoint(tmp_path / "out" / "tables", tmp_path / "store", "half", part_bytes=64 << 10)
    assert half.tables == whole.tables and half.hash_params == whole.hash_params
    assert half.dense is not None and half.dense.tensors == ()


def test_what_is_there_is_not_overwritten(checkpoint: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    split_checkpoint(checkpoint.folder, out)  # empty: nothing to lose
    before = tensors_of(out / "dense")
    with pytest.raises(ImportRefused, match="out is there already and not an empty folder"):
        split_checkpoint(checkpoint.folder, out)
    assert_equal(tensors_of(out / "dense"), before)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ImportRefused, match="file is there already"):
        split_checkpoint(checkpoint.folder, tmp_path / "file")
    with pytest.raises(ImportRefused, match="holds nothing but tables"):
        split_checkpoint(out / "tables", tmp_path / "again")


def test_a_split_into_the_checkpoint_itself_does_not_copy_itself(checkpoint: Any) -> None:
    split_checkpoint(checkpoint.folder, checkpoint.folder / "split")
    files = sorted(path.name for path in (checkpoint.folder / "split" / "dense").rglob("*"))
    assert files == ["config.json", "model.safetensors", "tokenizer.json"]


def test_a_checkpoint_that_cannot_be_imported_is_not_split(checkpoint: Any, tmp_path: Path) -> None:
    del checkpoint.tables["model.ngram_embeddings.embedders.1.weight"]
    checkpoint.write()
    with pytest.raises(ImportRefused, match=r"lacks tensor model.ngram_embeddings.embedders.1.weight"):
        split_checkpoint(checkpoint.folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_failure_midway_leaves_nothing(checkpoint: Any, tmp_path: Path) -> None:
    file = checkpoint.folder / "model.safetensors"
    with pytest.raises(StoreError, match="became shorter"):
        split_checkpoint(
            checkpoint.folder, tmp_path / "out", progress=lambda done, total: file.write_bytes(file.read_bytes()[:5000])
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint"]


def test_progress_ends_at_the_whole(checkpoint: Any, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    split_checkpoint(checkpoint.folder, tmp_path / "out", progress=lambda *call: calls.append(call))
    total = sum(t.numel() * t.element_size() for t in {**checkpoint.dense, **checkpoint.tables}.values())
    assert calls == sorted(calls) and calls[-1] == (total, total)
