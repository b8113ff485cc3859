"""Family longcat: one tensor for each head, stacked into the one table "ngram"."""

from __future__ import annotations

import re

from embedding_service.errors import ImportRefused
from embedding_service.ngram.longcat import LongcatHasher
from embedding_service.store.importers.base import (
    FamilyImporter,
    TableSource,
    check_one_dtype,
    row_dim,
    take_matrix,
)

_HEAD = re.compile(r"model\.ngram_embeddings\.embedders\.(\d+)\.weight")


class LongcatImporter(FamilyImporter[LongcatHasher]):
    """LongCat-Flash-Lite and its kin.

    `model.ngram_embeddings.embedders.{i}.weight`, [rows of head i, hidden_size / heads], one for each head i. Words and
    projections (`post_projs`) stay with the worker.
    """

    hashes = LongcatHasher

    def is_table(self, tensor_name: str) -> bool:
        """Heads only."""
        return _HEAD.fullmatch(tensor_name) is not None

    def tables(self) -> list[TableSource]:
        """The heads in order."""
        table = self._hasher.tables[0]
        dim = row_dim(
            self._checkpoint, "hidden_size", self._checkpoint.config.get("hidden_size"), self._hasher.num_heads
        )
        self._refuse_further_heads(len(table.head_rows))
        heads = [
            take_matrix(self._checkpoint, f"model.ngram_embeddings.embedders.{head}.weight", rows, dim)
            for head, rows in enumerate(table.head_rows)
        ]
        check_one_dtype(heads)
        return [TableSource(table.name, tuple(heads))]

    def _refuse_further_heads(self, heads: int) -> None:
        for name in self._checkpoint.tensors:
            match = _HEAD.fullmatch(name)
            if match and int(match[1]) >= heads:
                raise ImportRefused(
                    f"{self._checkpoint.folder} holds tensor {name}, but its config has {heads} heads: "
                    "emb_neighbor_num or emb_split_num is not this checkpoint's"
                )
