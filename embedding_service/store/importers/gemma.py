"""Family gemma: the one table of per-layer embeddings."""

from __future__ import annotations

import re

from embedding_service.errors import ImportRefused
from embedding_service.foreign import shown
from embedding_service.ngram.gemma import GemmaHasher, gemma_keys
from embedding_service.store.importers.base import FamilyImporter, TableSource, take_matrix
from embedding_service.store.manifest import MOST_DIM

_TABLE = re.compile(r"(?:model\.|language_model\.)*embed_tokens_per_layer\.weight")


class GemmaImporter(FamilyImporter[GemmaHasher]):
    """Gemma 3n and Gemma 4 (E2B, E4B): `...embed_tokens_per_layer.weight`.

    It is [vocab_size_per_layer_input, num_hidden_layers * hidden_size_per_layer_input]. The rows are not scaled, as in
    the checkpoint: the model multiplies them.
    """

    hashes = GemmaHasher

    def is_table(self, tensor_name: str) -> bool:
        """The one table."""
        return _TABLE.fullmatch(tensor_name) is not None

    def tables(self) -> list[TableSource]:
        """The one table."""
        keys = gemma_keys(self._checkpoint.config)
        sizes = [keys[name] for name in ("num_hidden_layers", "hidden_size_per_layer_input")]
        if not all(type(size) is int and 0 < size <= MOST_DIM for size in sizes):
            raise ImportRefused(
                f"{self._checkpoint.folder}/config.json: num_hidden_layers and hidden_size_per_layer_input are "
                f"{shown(sizes[0])} and {shown(sizes[1])}"
            )
        names = [name for name in self._checkpoint.tensors if self.is_table(name)]
        if len(names) != 1:
            found = f"holds {' and '.join(names)}: remove one" if names else "lacks embed_tokens_per_layer.weight"
            raise ImportRefused(f"{self._checkpoint.folder} {found}")
        [table] = self._hasher.tables
        return [TableSource(table.name, (take_matrix(self._checkpoint, names[0], table.rows, sizes[0] * sizes[1]),))]
