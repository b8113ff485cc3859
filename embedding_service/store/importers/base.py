"""What an importer must say about its family's checkpoints: which tensors, stacked in which order, are which table."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from embedding_service.errors import ImportRefused
from embedding_service.store.checkpoint import FLOAT_DTYPES, Checkpoint, SourceTensor


@dataclass(frozen=True)
class TableSource:
    """One table as it lies in a checkpoint: matrices of one dtype and dim, their rows stacked in this order."""

    name: str
    tensors: tuple[SourceTensor, ...]

    @property
    def rows(self) -> int:
        """Rows of the table."""
        return sum(tensor.span.shape[0] for tensor in self.tensors)

    @property
    def dim(self) -> int:
        """Values of a row."""
        return self.tensors[0].span.shape[1]

    @property
    def dtype(self) -> str:
        """The safetensors dtype."""
        return self.tensors[0].span.dtype

    @property
    def bytes(self) -> int:
        """Bytes in the checkpoint."""
        return sum(tensor.span.bytes for tensor in self.tensors)


class Importer(ABC):
    """Finds a family's tables in a checkpoint. A family is one subclass in one file, named in `importers.IMPORTERS`."""

    family: ClassVar[str]

    @classmethod
    @abstractmethod
    def recognizes(cls, config: Mapping[str, Any]) -> bool:
        """Whether a checkpoint with this config is of this family."""

    @abstractmethod
    def __init__(self, checkpoint: Checkpoint) -> None:
        """Raises ImportRefused for a config that does not describe tables."""

    @abstractmethod
    def hash_params(self) -> dict[str, Any]:
        """What NgramHasher.from_params takes, JSON-able."""

    @abstractmethod
    def is_table(self, tensor_name: str) -> bool:
        """Whether a tensor holds rows of a table; all others stay with the worker."""

    @abstractmethod
    def tables(self) -> list[TableSource]:
        """The tables, every tensor checked. Raises ImportRefused for a missing tensor, a wrong shape or dtype."""


def take_matrix(checkpoint: Checkpoint, name: str, rows: int, dim: int) -> SourceTensor:
    """Return a tensor that must be float [rows, dim]. Raises ImportRefused saying what is the matter."""
    if name not in checkpoint.tensors:
        raise ImportRefused(f"{checkpoint.folder} lacks tensor {name}: is the checkpoint whole?")
    tensor = checkpoint.tensors[name]
    if tensor.span.shape != (rows, dim):
        raise ImportRefused(
            f"{tensor.file}: tensor {name} is {list(tensor.span.shape)}, but the config asks for [{rows}, {dim}]"
        )
    if tensor.span.dtype not in FLOAT_DTYPES:
        raise ImportRefused(
            f"{tensor.file}: tensor {name} has dtype {tensor.span.dtype}; "
            f"{', '.join(FLOAT_DTYPES)} can be imported: convert the checkpoint first"
        )
    return tensor


def check_one_dtype(tensors: list[SourceTensor]) -> None:
    """Raise ImportRefused if tensors that make one table differ in dtype: no bound would hold for all its rows."""
    for tensor in tensors:
        if tensor.span.dtype != tensors[0].span.dtype:
            raise ImportRefused(
                f"{tensor.file}: tensor {tensor.name} is {tensor.span.dtype} but {tensors[0].name} is "
                f"{tensors[0].span.dtype}: convert the checkpoint to one dtype first"
            )
