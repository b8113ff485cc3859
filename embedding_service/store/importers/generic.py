"""No family: any matrix becomes a table that is looked up by row id."""

from __future__ import annotations

from collections.abc import Mapping

from embedding_service.checkpoint import Checkpoint
from embedding_service.errors import ImportRefused
from embedding_service.formats import kept_formats
from embedding_service.store.importers.base import Importer, TableSource
from embedding_service.store.manifest import check_name

_SHOWN = 20


class GenericImporter(Importer):
    """The matrices that the user names. It is not in `IMPORTERS`, because it recognizes nothing by itself.

    Args:
        wanted: Tensor name -> table name.
    """

    def __init__(self, checkpoint: Checkpoint, wanted: Mapping[str, str]) -> None:
        names = [check_name(table) for table in wanted.values()]
        if not names or len(set(names)) < len(names):
            raise ImportRefused(f"give each matrix a table name of its own, not {', '.join(names) or 'none'}")
        self.family, self.hash_params = "", {}
        self._checkpoint = checkpoint
        self._wanted = wanted

    def is_table(self, tensor_name: str) -> bool:
        """Those asked for."""
        return tensor_name in self._wanted

    def tables(self) -> list[TableSource]:
        """A table for each matrix."""
        return [self._table(tensor, table) for tensor, table in self._wanted.items()]

    def _table(self, name: str, table: str) -> TableSource:
        tensor = self._checkpoint.tensors.get(name)
        if tensor is None:
            raise ImportRefused(f"{self._checkpoint.folder} has no tensor {name!r}; {self._known()}")
        shape = tensor.span.shape
        if len(shape) != 2 or not all(shape) or tensor.dtype not in kept_formats():
            raise ImportRefused(
                f"{tensor.file}: tensor {name} is {tensor.dtype} {list(shape)}; a table must be a matrix of "
                f"{', '.join(kept_formats())}; {self._known()}"
            )
        return TableSource(table, (tensor,))

    def _known(self) -> str:
        matrices = [
            name
            for name, tensor in sorted(self._checkpoint.tensors.items())
            if len(tensor.span.shape) == 2 and all(tensor.span.shape) and tensor.dtype in kept_formats()
        ]
        more = f" and {len(matrices) - _SHOWN} more" if len(matrices) > _SHOWN else ""
        return f"it has the matrices {', '.join(matrices[:_SHOWN])}{more}" if matrices else "it has no matrix"
