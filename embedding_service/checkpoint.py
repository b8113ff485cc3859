"""A Hugging Face checkpoint folder, read in pieces: config.json and one or many safetensors files.

Imports and workers read it here, so that both take the same file for a tensor.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from embedding_service.errors import BadTensorFile, ImportRefused, StoreError
from embedding_service.foreign import printable, shown
from embedding_service.formats import get_format, kept_formats
from embedding_service.formats.fp8 import e8m0_values
from embedding_service.machine import open_file, read_object
from embedding_service.tensorfile import ITEM_BITS, TensorSpan, byte_view, read_spans, tensor_bytes

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_SHOWN = 8  # names in an error
FP8_DTYPE, FP8_SCALE_DTYPE = "F8_E4M3", "F8_E8M0"
NVFP4_DTYPE = "U8"  # two codes a byte
# What a scale of a whole table may be.
SCALE_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class SourceTensor:
    """One tensor of a checkpoint. A float matrix can be read by rows."""

    name: str
    file: Path
    span: TensorSpan

    @property
    def rows(self) -> int:
        """Rows of a matrix."""
        return self.span.shape[0]

    @property
    def dim(self) -> int:
        """Values of a row."""
        return self.span.shape[1]

    @property
    def dtype(self) -> str:
        """The safetensors dtype."""
        return self.span.dtype

    @property
    def bytes(self) -> int:
        """Bytes in the checkpoint."""
        return self.span.bytes

    @property
    def stored_as(self) -> str:
        """The row format that `read_stored` gives: `keep` in an import."""
        return kept_formats()[self.dtype]

    def first_rows(self, count: int) -> SourceTensor:
        """A matrix of its first rows alone: what follows them is padding."""
        shape = (count, self.dim)
        return replace(self, span=replace(self.span, shape=shape, bytes=tensor_bytes(self.dtype, shape)))

    def read_rows(self, first: int, count: int) -> torch.Tensor:
        """Rows [first, first + count), exactly: float Tensor[count, dim]. Raises StoreError."""
        row_format = get_format(self.stored_as)
        return row_format.decode(self.read_stored(first, count), self.dim, dtype=row_format.dtype)

    def read_stored(self, first: int, count: int) -> torch.Tensor:
        """The bytes of those rows: uint8 Tensor[count, row_bytes]. Raises StoreError.

        A plain read, because mapped pages would count as this process's memory.
        """
        row_bytes = self.dim * ITEM_BITS[self.dtype] // 8
        rows = torch.empty(count, row_bytes, dtype=torch.uint8)
        self.read_bytes(first * row_bytes, byte_view(rows))
        return rows

    def whole(self) -> torch.Tensor:
        """All of an int64 tensor. Raises StoreError."""
        values = torch.empty(self.span.shape, dtype=torch.int64)
        self.read_bytes(0, byte_view(values))
        return values

    def read_bytes(self, begin: int, target: memoryview) -> None:
        """Fill `target` with the tensor's bytes from `begin` on. Raises StoreError naming the file."""
        try:
            with open_file(self.file) as file:
                done = 0
                while done < len(target):
                    count = os.preadv(file.fileno(), [target[done:]], self.span.offset + begin + done)
                    if not count:
                        raise StoreError(f"{self.file} became shorter while tensor {self.name} was read")
                    done += count
        except OSError as error:
            raise StoreError(f"{self.file}: cannot read tensor {self.name}: {error.strerror}") from error


@dataclass(frozen=True)
class TableScale:
    """A tensor of one number, which scales every row of a table."""

    tensor: SourceTensor

    @property
    def bytes(self) -> int:
        """Bytes in the checkpoint."""
        return self.tensor.bytes

    def read_stored(self, first: int, count: int) -> torch.Tensor:
        """The number as float32, once for each row: uint8 Tensor[count, 4]. Raises StoreError."""
        number = torch.empty(self.tensor.bytes, dtype=torch.uint8)
        self.tensor.read_bytes(0, byte_view(number))
        return number.view(SCALE_DTYPES[self.tensor.dtype]).float().view(torch.uint8).expand(count, -1)


@dataclass(frozen=True)
class PowerScales:
    """float32 scales [rows, blocks] that are powers of two."""

    tensor: SourceTensor

    @property
    def bytes(self) -> int:
        """Bytes in the checkpoint."""
        return self.tensor.bytes

    def read_stored(self, first: int, count: int) -> torch.Tensor:
        """Them as e8m0: uint8 Tensor[count, blocks]. Raises StoreError for one that is no power of two."""
        scales = self.tensor.read_stored(first, count).view(torch.float32)
        exponents = (scales.view(torch.int32) >> 23).clamp_min(0).to(torch.uint8)
        wrong = (e8m0_values()[exponents.int()] != scales).any(1)
        if wrong.any():
            row = int(wrong.int().argmax())
            raise StoreError(
                f"{self.tensor.file}: tensor {self.tensor.name} has a scale in row {first + row:,} that is no power of "
                "two, so that fp8 cannot hold it: convert the table to bf16 first"
            )
        return exponents


@dataclass(frozen=True)
class ScaledTensor:
    """A quantized matrix in several tensors, which together are rows of format `stored_as`.

    Attributes:
        values: Codes, [rows, bytes].
        scales: What scales them, in the order in which the format lays it behind the codes.
        stored_as: The row format.
        dim: Values of a row.
    """

    values: SourceTensor
    scales: tuple[SourceTensor | TableScale | PowerScales, ...]
    stored_as: str
    dim: int

    @property
    def name(self) -> str:
        """That of the values."""
        return self.values.name

    @property
    def file(self) -> Path:
        """That of the values."""
        return self.values.file

    @property
    def rows(self) -> int:
        """Rows of the matrix."""
        return self.values.rows

    @property
    def dtype(self) -> str:
        """The safetensors dtype of the values."""
        return self.values.dtype

    @property
    def bytes(self) -> int:
        """Bytes of all in the checkpoint."""
        return self.values.bytes + sum(scale.bytes for scale in self.scales)

    def read_rows(self, first: int, count: int) -> torch.Tensor:
        """Rows [first, first + count), exactly: float32 Tensor[count, dim]. Raises StoreError."""
        return get_format(self.stored_as).decode(self.read_stored(first, count), self.dim)

    def read_stored(self, first: int, count: int) -> torch.Tensor:
        """Those rows as the format lays them: uint8 Tensor[count, row_bytes]. Raises StoreError."""
        return torch.cat([each.read_stored(first, count) for each in (self.values, *self.scales)], 1)


SourceMatrix = SourceTensor | ScaledTensor


class Checkpoint:
    """The config and the tensors of a checkpoint folder. Raises ImportRefused unless it is a whole one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config: dict[str, Any] = read_config(folder)
        self.tensors: dict[str, SourceTensor] = self._read_tensors()

    def files(self) -> list[Path]:
        """The safetensors files, in the order of their names."""
        return sorted({tensor.file for tensor in self.tensors.values()})

    def _read_tensors(self) -> dict[str, SourceTensor]:
        names = tensor_files(self.folder, self.config)
        files = sorted(set(names.values()))
        if missing := [printable(file.name) for file in files if not file.is_file()]:
            more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
            names_missing = ", ".join(missing[:_SHOWN])
            raise ImportRefused(
                f"the index of {self.folder} names files that are not there: {names_missing}{more}. Download them again"
            )
        held = {file: _tensors_of(file) for file in files}
        for name, file in names.items():
            if name not in held[file]:
                raise ImportRefused(
                    f"the index of {self.folder} says that {printable(file.name)} holds tensor {printable(name)}, but "
                    "it does not. Download both again"
                )
        return {name: held[file][name] for name, file in names.items()}


class LooseTensors(Checkpoint):
    """The tensors of any safetensors file, or of a folder of them. It needs no config.

    Raises ImportRefused if there are none.
    """

    def __init__(self, path: Path) -> None:
        self.folder = path
        self.config = {}
        self.tensors = self._read_folder() if path.is_dir() else _tensors_of(path)

    def _read_folder(self) -> dict[str, SourceTensor]:
        if (self.folder / WEIGHTS_FILE).exists() or (self.folder / INDEX_FILE).exists():
            return self._read_tensors()
        tensors: dict[str, SourceTensor] = {}
        for file in sorted(self.folder.glob("*.safetensors")):
            for name, tensor in _tensors_of(file_below(self.folder, file.name)).items():
                if name in tensors:
                    raise ImportRefused(
                        f"both {tensors[name].file} and {file} hold a tensor {printable(name)}: name one of the files"
                    )
                tensors[name] = tensor
        if not tensors:
            raise ImportRefused(f"{self.folder} holds no safetensors file")
        return tensors


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a checkpoint folder. Raises ImportRefused."""
    if not folder.is_dir():
        remedy = (
            "a single file's matrices can be imported with --generic TENSOR"
            if folder.exists()
            else "there is none. Download it first if it is on a model hub"
        )
        raise ImportRefused(f"{folder} is no folder of a checkpoint: {remedy}")
    return read_json(folder, CONFIG_FILE)


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """A JSON file of a checkpoint that holds an object. Raises ImportRefused."""
    path = file_below(folder, name)
    try:
        return read_object(path)
    except FileNotFoundError:
        raise ImportRefused(f"{folder} is not a checkpoint: it has no {name}") from None
    except OSError as error:
        raise ImportRefused(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise ImportRefused(f"{path} {error}") from error


def tensor_files(folder: Path, config: dict[str, Any]) -> dict[str, Path]:
    """Each tensor's name, and the file of the checkpoint that it is taken from. The file may be missing.

    The order is that of transformers: first what the config names, then the single file, then an index.
    Raises ImportRefused if there is none of them, or it cannot be read.
    """
    named = config.get("transformers_weights")
    known = [named] if isinstance(named, str) else [WEIGHTS_FILE, INDEX_FILE]
    for name in known:
        if (path := file_below(folder, name)).exists():
            return _indexed_files(folder, name) if name.endswith(".json") else dict.fromkeys(_tensors_of(path), path)
    absent = f"neither {WEIGHTS_FILE} nor {INDEX_FILE}" if len(known) > 1 else f"no {printable(known[0])}"
    raise ImportRefused(
        f"{folder} is not a checkpoint that can be read: it has {absent}. Save the model in the safetensors format"
    )


def file_below(folder: Path, name: str) -> Path:
    """The path of a file of a checkpoint, there or not.

    Raises ImportRefused for a file elsewhere, directly or by a link. A hub's snapshot, models--X/snapshots/REVISION,
    may link to models--X/blobs.
    """
    path, here = folder / name, folder.resolve()
    snapshots = [each for each in here.parents if each.name == "snapshots" and each.parent.name.startswith("models--")]
    allowed = [here, *(each.with_name("blobs") for each in snapshots)]
    try:
        if any(path.resolve().is_relative_to(each) for each in allowed):
            return path
    except (OSError, ValueError, RuntimeError):  # links in a circle, a NUL in the name
        pass
    raise ImportRefused(
        f"{folder} takes {shown(name)} from elsewhere; only files below the folder are read: copy the file into it"
    )


def _indexed_files(folder: Path, name: str) -> dict[str, Path]:
    weight_map = read_json(folder, name).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise ImportRefused(f"{folder / name} has no weight_map from tensor names to files: download it again")
    paths = {file: file_below(folder, file) for file in sorted(set(weight_map.values()))}
    return {tensor: paths[file] for tensor, file in weight_map.items()}


def _tensors_of(file: Path) -> dict[str, SourceTensor]:
    try:
        return {name: SourceTensor(name, file, span) for name, span in read_spans(file).items()}
    except BadTensorFile as error:
        raise ImportRefused(f"{error}. Download it again") from error
