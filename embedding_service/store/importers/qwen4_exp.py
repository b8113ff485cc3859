"""Family qwen4_exp: one table for each PLE layer, in one tensor or in pieces."""

from __future__ import annotations

import re

from embedding_service.checkpoint import SourceTensor
from embedding_service.errors import ImportRefused
from embedding_service.ngram.base import TableShape, text_config
from embedding_service.ngram.qwen4_exp import Qwen4ExpHasher
from embedding_service.store.importers.base import (
    FamilyImporter,
    TableSource,
    check_one_dtype,
    row_dim,
    take_matrix,
)

_TABLE = re.compile(
    r"(?:model\.|language_model\.)*layers\.(\d+)\.ple\.ple_embedding\.ngram_embedding\.(?:shard_(\d+)\.)?weight"
)
# The published config class's own, for a config.json that leaves it out.
_DEFAULT_HIDDEN = 2048


class Qwen4ExpImporter(FamilyImporter[Qwen4ExpHasher]):
    """Qwen4-Exp models and Qwen3.8-Flash-Next.

    Each PLE layer has `...layers.{l}.ple.ple_embedding.ngram_embedding.weight`, or its rows in pieces
    `.shard_{p}.weight` with p = 0, 1, ... Rows are [all heads and padding, ple_embed_dim / heads]. All else stays with
    the worker.
    """

    hashes = Qwen4ExpHasher

    def is_table(self, tensor_name: str) -> bool:
        """Whole tables and pieces."""
        return _TABLE.fullmatch(tensor_name) is not None

    def tables(self) -> list[TableSource]:
        """One for each PLE layer, in the order of layers."""
        found: dict[int, dict[int | None, str]] = {layer: {} for layer in self._hasher.layers}
        for name in self._checkpoint.tensors:
            if match := _TABLE.fullmatch(name):
                if int(match[1]) not in found:
                    raise ImportRefused(
                        f"{self._checkpoint.folder} holds tensor {name}, but PLE layers of its config are "
                        f"{', '.join(map(str, found))}, counted from 0: ple_layer_ids is not this checkpoint's"
                    )
                found[int(match[1])][None if match[2] is None else int(match[2])] = name
        return [
            self._table(table, layer, found[layer])
            for layer, table in zip(self._hasher.layers, self._hasher.tables, strict=True)
        ]

    def _table(self, table: TableShape, layer: int, names: dict[int | None, str]) -> TableSource:
        keys = text_config(self._checkpoint.config)
        values = keys.get("ple_embed_dim") or keys.get("hidden_size", _DEFAULT_HIDDEN)
        dim = row_dim(self._checkpoint, "ple_embed_dim", values, self._hasher.num_heads)
        if None in names and len(names) == 1:
            return TableSource(table.name, (take_matrix(self._checkpoint, names[None], table.rows, dim),))
        pieces = [take_matrix(self._checkpoint, name, None, dim) for name in self._pieces(layer, names)]
        self._check_rows(pieces, table.rows, layer)
        check_one_dtype(pieces)
        return TableSource(table.name, tuple(pieces))

    def _pieces(self, layer: int, names: dict[int | None, str]) -> list[str]:
        """The names of pieces 0, 1, ..., none missing."""
        tensor = f"layers.{layer}.ple.ple_embedding.ngram_embedding"
        if None in names:
            raise ImportRefused(f"{self._checkpoint.folder} holds {tensor} both whole and in pieces: remove one")
        missing = [piece for piece in range(max(filter(None, names), default=0) + 1) if piece not in names]
        if missing:
            which = f"{tensor}.shard_{missing[0]}.weight" if names else f"{tensor}.weight, whole or in pieces"
            raise ImportRefused(f"{self._checkpoint.folder} lacks tensor {which}: is the checkpoint whole?")
        return [names[piece] for piece in range(len(names))]

    def _check_rows(self, pieces: list[SourceTensor], rows: int, layer: int) -> None:
        found = sum(piece.rows for piece in pieces)
        if found != rows:
            raise ImportRefused(
                f"{self._checkpoint.folder}: the {len(pieces)} pieces of layer {layer}'s table hold {found:,} rows, "
                f"but the config asks for {rows:,}: is the checkpoint whole?"
            )
