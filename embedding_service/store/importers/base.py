"""What an importer says of its family's checkpoints: which tensors, stacked in which order, are which table."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

from embedding_service.checkpoint import CONFIG_FILE, Checkpoint, SourceMatrix, SourceTensor, file_below
from embedding_service.errors import ImportRefused, InvalidRequest, StoreError
from embedding_service.foreign import shown
from embedding_service.formats import kept_formats

# Only here does the store know another package. A family's geometry is written down once, with its hashing.
from embedding_service.ngram import NgramHasher

Hasher = TypeVar("Hasher", bound=NgramHasher)


@dataclass(frozen=True)
class TableSource:
    """One table in a checkpoint: matrices of one dtype and dim, whose rows are stacked in this order."""

    name: str
    tensors: tuple[SourceMatrix, ...]

    @property
    def rows(self) -> int:
        """Rows of the table."""
        return sum(tensor.rows for tensor in self.tensors)

    @property
    def dim(self) -> int:
        """Values of a row."""
        return self.tensors[0].dim

    @property
    def dtype(self) -> str:
        """The safetensors dtype."""
        return self.tensors[0].dtype

    @property
    def stored_as(self) -> str:
        """The row format that the rows have already."""
        return self.tensors[0].stored_as

    @property
    def bytes(self) -> int:
        """Bytes in the checkpoint."""
        return sum(tensor.bytes for tensor in self.tensors)


class Importer(ABC):
    """Finds tables in a checkpoint.

    Attributes:
        family: The n-gram family that looks rows of these tables up. Empty for none.
        hash_params: What NgramHasher.from_params takes, JSON-able.
    """

    family: str
    hash_params: dict[str, Any]
    # The small files that the tables need beside them to be imported.
    needs: ClassVar[tuple[str, ...]] = (CONFIG_FILE,)

    @abstractmethod
    def is_table(self, tensor_name: str) -> bool:
        """Whether a tensor holds rows of a table. All others stay with the worker."""

    @abstractmethod
    def tables(self) -> list[TableSource]:
        """The tables, every tensor checked. Raises ImportRefused for a missing tensor, a wrong shape or dtype."""


class FamilyImporter(Importer, Generic[Hasher]):
    """The tables of an n-gram family. A family is one subclass in one file, named in `importers.IMPORTERS`.

    Raises ImportRefused for a config that describes no tables, and for a tokenizer that does not fit the family.

    Attributes:
        hashes: The family's hasher class. It decides whether a checkpoint is the family's.
    """

    hashes: type[Hasher]

    @classmethod
    def recognizes(cls, config: Mapping[str, Any]) -> bool:
        """Whether a checkpoint with this config is of this family."""
        return cls.hashes.recognizes(config)

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        for name in self.needs:
            file_below(checkpoint.folder, name)
        try:
            params = self.hashes.params_of(checkpoint.config)
            self._hasher = self.hashes(**params, **self.hashes.params_of_tokenizer(checkpoint.folder))
        except (InvalidRequest, StoreError, TypeError) as error:
            raise ImportRefused(f"{checkpoint.folder / CONFIG_FILE}: {error}") from error
        self.family = self.hashes.family
        self.hash_params = self._hasher.params()


def row_dim(checkpoint: Checkpoint, key: str, values: object, heads: int) -> int:
    """The values of each of `heads` rows, which have `values` in all. Raises ImportRefused, naming the config's key."""
    if type(values) is not int or values < heads or values % heads:
        raise ImportRefused(f"{checkpoint.folder}/config.json: {key} {shown(values)} cannot be shared by {heads} heads")
    return values // heads


def take_matrix(checkpoint: Checkpoint, name: str, rows: int | None, dim: int) -> SourceTensor:
    """Return a tensor that must be float [rows, dim]. None takes any number of rows. Raises ImportRefused."""
    tensor = take_shape(checkpoint, name, rows, dim)
    if tensor.dtype not in kept_formats():
        raise ImportRefused(
            f"{tensor.file}: tensor {name} has dtype {tensor.dtype}; "
            f"{', '.join(kept_formats())} can be imported: convert the checkpoint first"
        )
    return tensor


def take_shape(checkpoint: Checkpoint, name: str, rows: int | None, dim: int) -> SourceTensor:
    """Return a tensor that must be [rows, dim] of any dtype. Raises ImportRefused, saying what is wrong."""
    if name not in checkpoint.tensors:
        raise ImportRefused(f"{checkpoint.folder} lacks tensor {name}: is the checkpoint whole?")
    tensor = checkpoint.tensors[name]
    shape = tensor.span.shape
    if len(shape) != 2 or shape[1] != dim or shape[0] != (shape[0] if rows is None else rows):
        raise ImportRefused(
            f"{tensor.file}: tensor {name} is {list(shape)}, but the config asks for "
            f"[{'rows' if rows is None else rows}, {dim}]"
        )
    return tensor


def check_one_dtype(tensors: Sequence[SourceMatrix]) -> None:
    """Raise ImportRefused if the tensors of one table differ in dtype. No bound would hold for all its rows."""
    for tensor in tensors:
        if tensor.dtype != tensors[0].dtype:
            raise ImportRefused(
                f"{tensor.file}: tensor {tensor.name} is {tensor.dtype} but {tensors[0].name} is "
                f"{tensors[0].dtype}: convert the checkpoint to one dtype first"
            )
