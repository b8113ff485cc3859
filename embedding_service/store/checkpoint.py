"""A Hugging Face checkpoint folder, read in pieces: config.json and one or many safetensors files."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from embedding_service.errors import ImportRefused, StoreError
from embedding_service.store.tensorfile import BadTensorFile, TensorSpan, byte_view, read_spans

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

FLOAT_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class SourceTensor:
    """One tensor of a checkpoint."""

    name: str
    file: Path
    span: TensorSpan

    def read_rows(self, first: int, count: int) -> torch.Tensor:
        """Rows [first, first + count) of a float matrix, as they are: Tensor[count, dim]. Raises StoreError.

        A plain read, no mapping: mapped pages would count as this process's memory.
        """
        rows = torch.empty(count, self.span.shape[1], dtype=FLOAT_DTYPES[self.span.dtype])
        self.read_bytes(first * (self.span.bytes // self.span.shape[0]), byte_view(rows))
        return rows

    def read_bytes(self, begin: int, target: memoryview) -> None:
        """Fill `target` with the tensor's bytes from `begin` on. Raises StoreError naming the file."""
        try:
            with self.file.open("rb", buffering=0) as file:
                done = 0
                while done < len(target):
                    count = os.preadv(file.fileno(), [target[done:]], self.span.offset + begin + done)
                    if not count:
                        raise StoreError(f"{self.file} became shorter while tensor {self.name} was read")
                    done += count
        except OSError as error:
            raise StoreError(f"{self.file}: cannot read tensor {self.name}: {error.strerror}") from error


class Checkpoint:
    """The config and the tensors of a checkpoint folder. Raises ImportRefused unless it is one, and whole."""

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise ImportRefused(f"{folder} is not a checkpoint: it is no folder")
        self.folder = folder
        self.config: dict[str, Any] = _read_json(folder / CONFIG_FILE)
        self.tensors: dict[str, SourceTensor] = self._read_tensors()

    def files(self) -> list[Path]:
        """The safetensors files, in the order of their names."""
        return sorted({tensor.file for tensor in self.tensors.values()})

    def _read_tensors(self) -> dict[str, SourceTensor]:
        # As transformers does it: the single file goes before an index.
        if (self.folder / WEIGHTS_FILE).exists():
            return _tensors_of(self.folder / WEIGHTS_FILE)
        if not (self.folder / INDEX_FILE).exists():
            raise ImportRefused(
                f"{self.folder} is not a checkpoint that can be read: it has neither {WEIGHTS_FILE} nor {INDEX_FILE}. "
                "Save the model in the safetensors format"
            )
        return self._read_indexed()

    def _read_indexed(self) -> dict[str, SourceTensor]:
        index = self.folder / INDEX_FILE
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise ImportRefused(f"{index} has no weight_map from tensor names to files")
        files = sorted(set(weight_map.values()))
        missing = [file for file in files if not (self.folder / file).is_file()]
        if missing:
            raise ImportRefused(f"{index} names files that are not there: {', '.join(missing)}. Download them again")
        held = {file: _tensors_of(self.folder / file) for file in files}
        for name, file in weight_map.items():
            if name not in held[file]:
                raise ImportRefused(f"{index} says that {file} holds tensor {name}, but it does not")
        return {name: held[file][name] for name, file in weight_map.items()}


def _tensors_of(file: Path) -> dict[str, SourceTensor]:
    try:
        return {name: SourceTensor(name, file, span) for name, span in read_spans(file).items()}
    except BadTensorFile as error:
        raise ImportRefused(f"{error}. Download it again") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ImportRefused(f"{path.parent} is not a checkpoint: it has no {path.name}") from None
    except OSError as error:
        raise ImportRefused(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise ImportRefused(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ImportRefused(f"{path} is not a JSON object")
    return content
