"""Family qwen4_exp: one table for each PLE layer, in one tensor or in pieces."""

from __future__ import annotations

import re
from collections.abc import Sequence

from embedding_service.checkpoint import (
    CONFIG_FILE,
    FP8_DTYPE,
    NVFP4_DTYPE,
    SCALE_DTYPES,
    ScaledTensor,
    SourceMatrix,
    TableScale,
)
from embedding_service.errors import ImportRefused
from embedding_service.formats.scaled import BLOCK as NVFP4_BLOCK
from embedding_service.ngram.base import TableShape, text_config
from embedding_service.ngram.qwen4_exp import Qwen4ExpHasher
from embedding_service.store.importers.base import (
    FamilyImporter,
    TableSource,
    check_one_dtype,
    row_dim,
    take_matrix,
    take_shape,
)

_TABLE = re.compile(
    r"(?:model\.|language_model\.)*layers\.(\d+)\.ple\.ple_embedding\.ngram_embedding\."
    r"(?:shard_(\d+)\.)?(weight|weight_scale|weight_scale_2)"
)
_MULTIPLIERS = re.compile(r"(?:model\.|language_model\.)*layers\.(\d+)\.ple\.ple_embedding\.layer_multipliers")
# The published config class's own, for a config.json that leaves it out.
_DEFAULT_HIDDEN = 2048


class Qwen4ExpImporter(FamilyImporter[Qwen4ExpHasher]):
    """Qwen4-Exp models and Qwen3.8-Flash-Next.

    Each PLE layer has `...layers.{l}.ple.ple_embedding.ngram_embedding.weight`, or its rows in pieces
    `.shard_{p}.weight` with p = 0, 1, ... Rows are [all heads and padding, ple_embed_dim / heads]. Quantized builds
    have `.weight_scale` beside it (fp8), or `.weight_scale` and `.weight_scale_2` (NVFP4). A scale of the whole table
    has no piece in its name. All else stays with the worker.
    """

    hashes = Qwen4ExpHasher

    def is_table(self, tensor_name: str) -> bool:
        """Whole tables, pieces, and their scales."""
        return _TABLE.fullmatch(tensor_name) is not None

    def tables(self) -> list[TableSource]:
        """One for each PLE layer, in the order of layers."""
        self._check_multipliers()
        found: dict[int, dict[tuple[str, int | None], str]] = {layer: {} for layer in self._hasher.layers}
        for name in self._checkpoint.tensors:
            if match := _TABLE.fullmatch(name):
                if int(match[1]) not in found:
                    raise ImportRefused(
                        f"{self._checkpoint.folder} holds tensor {name}, but PLE layers of its config are "
                        f"{', '.join(map(str, found))}, counted from 0: ple_layer_ids is not this checkpoint's"
                    )
                found[int(match[1])][match[3], None if match[2] is None else int(match[2])] = name
        return [
            self._table(table, layer, found[layer])
            for layer, table in zip(self._hasher.layers, self._hasher.tables, strict=True)
        ]

    def _check_multipliers(self) -> None:
        """A checkpoint may bring the hash's multipliers. Rows would be wrong if its config gave others."""
        for name, tensor in self._checkpoint.tensors.items():
            match = _MULTIPLIERS.fullmatch(name)
            if match is None or int(match[1]) not in self._hasher.layers:
                continue
            expected = self._hasher.multipliers[self._hasher.layers.index(int(match[1]))]
            if tensor.dtype != "I64" or tensor.whole().tolist() != expected:
                raise ImportRefused(
                    f"{tensor.file}: tensor {name} is not {expected}, which vocab_size, ngram_size and seed of "
                    f"{CONFIG_FILE} give: take the config that the checkpoint was saved with"
                )

    def _table(self, table: TableShape, layer: int, names: dict[tuple[str, int | None], str]) -> TableSource:
        keys = text_config(self._checkpoint.config)
        values = keys.get("ple_embed_dim") or keys.get("hidden_size", _DEFAULT_HIDDEN)
        dim = row_dim(self._checkpoint, "ple_embed_dim", values, self._hasher.num_heads)
        pieces = [piece for kind, piece in names if kind == "weight"]
        if pieces == [None]:
            return TableSource(table.name, (self._matrix(names, None, table.rows, dim),))
        self._check_pieces(layer, pieces)
        matrices = [self._matrix(names, piece, None, dim) for piece in range(len(pieces))]
        self._check_rows(matrices, table.rows, layer)
        check_one_dtype(matrices)
        return TableSource(table.name, tuple(matrices))

    def _matrix(
        self, names: dict[tuple[str, int | None], str], piece: int | None, rows: int | None, dim: int
    ) -> SourceMatrix:
        """One tensor of rows with its scales. The dtype of the values says how they are scaled."""
        name = names["weight", piece]
        dtype = self._checkpoint.tensors[name].dtype
        if dtype == FP8_DTYPE:
            values = take_shape(self._checkpoint, name, rows, dim)
            return ScaledTensor(values, (self._table_scale(names, "weight_scale", piece),), "fp8_rowwise", dim)
        if dtype == NVFP4_DTYPE and dim % NVFP4_BLOCK == 0:
            values = take_shape(self._checkpoint, name, rows, dim // 2)
            scales = take_shape(
                self._checkpoint, names.get(("weight_scale", piece), f"{name}_scale"), values.rows, dim // NVFP4_BLOCK
            )
            if scales.dtype != FP8_DTYPE:
                raise ImportRefused(f"{scales.file}: tensor {scales.name} has dtype {scales.dtype}, not {FP8_DTYPE}")
            scale = self._table_scale(names, "weight_scale_2", piece)
            return ScaledTensor(values, (scales, scale), "nvfp4", dim)
        return take_matrix(self._checkpoint, name, rows, dim)

    def _table_scale(self, names: dict[tuple[str, int | None], str], kind: str, piece: int | None) -> TableScale:
        """A piece's own number, or else the table's."""
        name = names.get((kind, piece)) or names.get((kind, None))
        if name is None:
            weight = names["weight", piece]
            raise ImportRefused(
                f"{self._checkpoint.folder} holds tensor {weight} in {self._checkpoint.tensors[weight].dtype}, but no "
                f"{kind} beside it: is the checkpoint whole?"
            )
        tensor = self._checkpoint.tensors[name]
        if tensor.dtype not in SCALE_DTYPES or tensor.span.shape not in ((), (1,)):
            raise ImportRefused(
                f"{tensor.file}: tensor {name} is {tensor.dtype} {list(tensor.span.shape)}, but a scale of the whole "
                f"table is one number of {', '.join(SCALE_DTYPES)}: convert the checkpoint first"
            )
        return TableScale(tensor)

    def _check_pieces(self, layer: int, pieces: list[int | None]) -> None:
        """Pieces 0, 1, ..., none missing."""
        tensor = f"layers.{layer}.ple.ple_embedding.ngram_embedding"
        if None in pieces:
            raise ImportRefused(f"{self._checkpoint.folder} holds {tensor} both whole and in pieces: remove one")
        missing = [piece for piece in range(max(filter(None, pieces), default=0) + 1) if piece not in pieces]
        if missing:
            which = f"{tensor}.shard_{missing[0]}.weight" if pieces else f"{tensor}.weight, whole or in pieces"
            raise ImportRefused(f"{self._checkpoint.folder} lacks tensor {which}: is the checkpoint whole?")

    def _check_rows(self, pieces: Sequence[SourceMatrix], rows: int, layer: int) -> None:
        found = sum(piece.rows for piece in pieces)
        if found != rows:
            raise ImportRefused(
                f"{self._checkpoint.folder}: the {len(pieces)} pieces of layer {layer}'s table hold {found:,} rows, "
                f"but the config asks for {rows:,}: is the checkpoint whole?"
            )
