"""Family engram: one table for each Engram layer, in fp8 with its scales."""

from __future__ import annotations

import re

from embedding_service.checkpoint import (
    CONFIG_FILE,
    FP8_DTYPE,
    FP8_SCALE_DTYPE,
    ScaledTensor,
    SourceMatrix,
)
from embedding_service.errors import ImportRefused
from embedding_service.foreign import shown
from embedding_service.formats.fp8 import BLOCK
from embedding_service.ngram.base import text_config
from embedding_service.ngram.engram import EngramHasher
from embedding_service.ngram.token_map import TOKENIZER_FILE
from embedding_service.store.importers.base import FamilyImporter, TableSource, take_matrix, take_shape

_TABLE = re.compile(r"((?:model\.|language_model\.)*layers\.(\d+)\.engram\.embed)\.(weight|scale)")


class EngramImporter(FamilyImporter[EngramHasher]):
    """DeepSeek-V4.1-Flash and its kin.

    Each Engram layer has `layers.{l}.engram.embed.weight`, e4m3 [rows, engram_head_dim], and `.scale`, e8m0
    [rows, engram_head_dim / 32]. Or it has the weight alone, in fp32, fp16 or bf16. All else stays with the worker. The
    folder must hold tokenizer.json, which decides which tokens share an id.
    """

    hashes = EngramHasher
    needs = (CONFIG_FILE, TOKENIZER_FILE)

    def is_table(self, tensor_name: str) -> bool:
        """Values and scales."""
        return _TABLE.fullmatch(tensor_name) is not None

    def tables(self) -> list[TableSource]:
        """One for each Engram layer, in the config's order."""
        prefixes: dict[int, str] = {}
        for name in self._checkpoint.tensors:
            if match := _TABLE.fullmatch(name):
                prefixes[int(match[2])] = match[1]
        if unknown := sorted(set(prefixes) - set(self._hasher.layers)):
            raise ImportRefused(
                f"{self._checkpoint.folder} holds tensor {prefixes[unknown[0]]}.weight, but Engram layers of its "
                f"config are {', '.join(map(str, self._hasher.layers))}: engram_layer_ids is not this checkpoint's"
            )
        return [
            TableSource(table.name, (self._matrix(prefixes.get(layer, f"layers.{layer}.engram.embed"), table.rows),))
            for layer, table in zip(self._hasher.layers, self._hasher.tables, strict=True)
        ]

    def _matrix(self, prefix: str, rows: int) -> SourceMatrix:
        dim = text_config(self._checkpoint.config).get("engram_head_dim")
        if type(dim) is not int or dim < 1:
            raise ImportRefused(f"{self._checkpoint.folder}/config.json: engram_head_dim is {shown(dim)}")
        values = take_shape(self._checkpoint, f"{prefix}.weight", rows, dim)
        if values.dtype != FP8_DTYPE:
            return take_matrix(self._checkpoint, f"{prefix}.weight", rows, dim)
        scales = take_shape(self._checkpoint, f"{prefix}.scale", rows, -(-dim // BLOCK))
        if scales.dtype != FP8_SCALE_DTYPE:
            raise ImportRefused(
                f"{scales.file}: tensor {scales.name} has dtype {scales.dtype}, but scales of fp8 rows must be "
                f"{FP8_SCALE_DTYPE}: convert the checkpoint first"
            )
        return ScaledTensor(values, scales)
