"""Splitting a checkpoint in two: the tables for the service, and the rest for a worker.

A worker that loads OUT/dense never has the tables on its disk or in its memory.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from embedding_service.checkpoint import INDEX_FILE, WEIGHTS_FILE, Checkpoint, SourceTensor, file_below
from embedding_service.errors import ImportRefused, StoreError
from embedding_service.store.draft import check_disk_space
from embedding_service.store.importers import find_importer
from embedding_service.store.progress import Meter, Progress
from embedding_service.tensorfile import header_bytes

SHARD_BYTES = 5_000_000_000
_COPY_BYTES = 4 << 20
# Weights in any form. They are never copied as files, only tensor by tensor.
_WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"}


def split_checkpoint(
    checkpoint: str | Path, out: str | Path, *, shard_bytes: int = SHARD_BYTES, progress: Progress | None = None
) -> None:
    """Write `out`/tables (the tables, the config and what else their family needs) and `out`/dense (all the rest).

    `out`/dense has config and tokenizer too. Both are checkpoint folders, and `import` takes the first as it takes the
    whole. Files hold at most `shard_bytes`, unless one tensor is larger. `out` appears only when all is written.
    Raises ImportRefused: not a checkpoint, unknown family, missing or misshapen tensor, no disk space, `out` is there
    and not empty. StoreError: failed midway.
    """
    source, out = Checkpoint(Path(checkpoint)), Path(out)
    importer = find_importer(source)
    importer.tables()  # a checkpoint that could not be imported is refused now, not after the split
    tables = [tensor for tensor in source.tensors.values() if importer.is_table(tensor.name)]
    dense = [tensor for tensor in source.tensors.values() if not importer.is_table(tensor.name)]
    if not dense:
        raise ImportRefused(f"{source.folder} holds nothing but tables: import it as it is")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ImportRefused(f"{out} is there already and not an empty folder: choose another")

    total = sum(tensor.span.bytes for tensor in source.tensors.values())
    meter = Meter(total, progress)
    small_files = _small_files(source.folder)
    partial = out.absolute().with_name(f".{out.name}.splitting")
    try:
        shutil.rmtree(partial, ignore_errors=True)  # of a split that was killed
        partial.mkdir(parents=True)
        check_disk_space(partial, total, "Free some, or choose another disk")
        _write_half(partial / "dense", dense, shard_bytes, meter)
        _write_half(partial / "tables", tables, shard_bytes, meter)
        _copy_files(source.folder, small_files, partial / "dense")
        _copy_files(source.folder, [Path(name) for name in importer.needs], partial / "tables")
        partial.rename(out)
    except OSError as error:
        raise StoreError(f"splitting into {out} failed, nothing of it is left: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _small_files(folder: Path) -> list[Path]:
    """Config, tokenizer, code, licence: every file that holds no weights, relative to the folder."""
    files = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    return [
        file
        for file in files
        if file.suffix not in _WEIGHT_SUFFIXES
        and not file.name.endswith(".index.json")
        and not any(name.startswith(".") for name in file.parts)
    ]


def _copy_files(source: Path, files: list[Path], target: Path) -> None:
    for file in files:
        file_below(source, str(file))
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source / file, target / file)


def _write_half(folder: Path, tensors: list[SourceTensor], shard_bytes: int, meter: Meter) -> None:
    """Write tensors as one model.safetensors or as shards with an index, named as transformers names them."""
    folder.mkdir()
    shards = list(_shards(tensors, shard_bytes))
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        name = WEIGHTS_FILE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(folder / name, shard, meter)
        weight_map.update({tensor.name: name for tensor in shard})
    if len(shards) > 1:
        total = sum(tensor.span.bytes for tensor in tensors)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2))


def _shards(tensors: list[SourceTensor], shard_bytes: int) -> Iterator[list[SourceTensor]]:
    shard: list[SourceTensor] = []
    for tensor in tensors:
        if shard and sum(held.span.bytes for held in shard) + tensor.span.bytes > shard_bytes:
            yield shard
            shard = []
        shard.append(tensor)
    yield shard


def _write_shard(path: Path, tensors: list[SourceTensor], meter: Meter) -> None:
    buffer = memoryview(bytearray(_COPY_BYTES))
    with path.open("wb") as file:
        file.write(header_bytes({tensor.name: (tensor.span.dtype, tensor.span.shape) for tensor in tensors}))
        for tensor in tensors:
            for begin in range(0, tensor.span.bytes, _COPY_BYTES):
                chunk = buffer[: min(_COPY_BYTES, tensor.span.bytes - begin)]
                tensor.read_bytes(begin, chunk)
                file.write(chunk)
                meter.add(len(chunk))
        file.flush()
        os.fsync(file.fileno())
