"""Family longcat: one tensor for each head, stacked into the one table "ngram"."""

from __future__ import annotations

import re

from embedding_service.checkpoint import SourceTensor
from embedding_service.errors import ImportRefused
from embedding_service.ngram.longcat import LongcatHasher
from embedding_service.store.importers.base import (
    FamilyImporter,
    TableSource,
    check_one_dtype,
    row_dim,
    take_matrix,
)

# LongCat-Flash-Lite's names, and those of LongCat-Flash-Lite-Sparse and LongCat-2.0.
_HEAD = re.compile(r"(?:model\.)?(?:ngram_embeddings\.embedders\.|oe_embed_tokens)(\d+)\.weight")
_USUAL_NAME = "model.ngram_embeddings.embedders.{}.weight"


class LongcatImporter(FamilyImporter[LongcatHasher]):
    """LongCat-Flash-Lite and its kin.

    `model.ngram_embeddings.embedders.{i}.weight` or `model.oe_embed_tokens{i}.weight`, [rows of head i, hidden_size /
    heads], one for each head i. `model.` may be absent. More rows than the head has are padding. Words and projections
    (`post_projs`, `oe_embed_proj`) stay with the worker.
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
        names = self._names(len(table.head_rows))
        self._refuse_other_geometry([names[head] for head in sorted(names)], table.head_rows)
        heads = [
            self._head(names.get(head, _USUAL_NAME.format(head)), rows, dim)
            for head, rows in enumerate(table.head_rows)
        ]
        check_one_dtype(heads)
        return [TableSource(table.name, tuple(heads))]

    def _head(self, name: str, rows: int, dim: int) -> SourceTensor:
        """The rows that are hashed to. Raises ImportRefused where there are fewer."""
        held = self._checkpoint.tensors.get(name)
        if held is not None and len(held.span.shape) == 2 and held.rows > rows:
            return take_matrix(self._checkpoint, name, None, dim).first_rows(rows)
        return take_matrix(self._checkpoint, name, rows, dim)

    def _refuse_other_geometry(self, names: list[str], rows: tuple[int, ...]) -> None:
        """Heads that grow by 2 rows each are not padded. Larger ones than the config's are another model's."""
        held = [(self._checkpoint.tensors[name].span.shape or (0,))[0] for name in names]
        others = range(held[0], held[0] + 2 * len(held), 2) if held else []
        if len(held) > 1 and held == [*others] and held[0] > rows[0]:
            raise ImportRefused(
                f"{self._checkpoint.folder}: tensor {names[0]} has {held[0]:,} rows, but the config asks for "
                f"{rows[0]:,}: vocab_size or ngram_vocab_size_ratio is not this checkpoint's"
            )

    def _names(self, heads: int) -> dict[int, str]:
        """The tensor of each head. Raises ImportRefused for a head of two names, and for one too many."""
        names: dict[int, str] = {}
        for name in self._checkpoint.tensors:
            match = _HEAD.fullmatch(name)
            if match is None:
                continue
            head = int(match[1])
            if head >= heads:
                raise ImportRefused(
                    f"{self._checkpoint.folder} holds tensor {name}, but its config has {heads} heads: "
                    "emb_neighbor_num or emb_split_num is not this checkpoint's"
                )
            if head in names:
                raise ImportRefused(
                    f"{self._checkpoint.folder} holds head {head} twice, as {names[head]} and {name}: remove one"
                )
            names[head] = name
        return names
