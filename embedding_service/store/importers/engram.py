"""Family engram: one table for each Engram layer, in fp8 with its scales."""

from __future__ import annotations

import re

from embedding_service.checkpoint import (
    CONFIG_FILE,
    FP8_DTYPE,
    FP8_SCALE_DTYPE,
    PowerScales,
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

# DeepSeek's own names, vLLM's, SGLang's.
_TABLE = re.compile(
    r"((?:model\.|language_model\.)*layers\.(\d+)\.engram\.(?:embed|embed_tokens|multi_head_embedding))"
    r"\.(weight|scale|weight_scale_inv)"
)


class EngramImporter(FamilyImporter[EngramHasher]):
    """DeepSeek-V4.1-Flash and its kin.

    Each Engram layer has `layers.{l}.engram.embed.weight`, e4m3 [rows, engram_head_dim], and `.scale`, e8m0
    [rows, engram_head_dim / 32]. Or it has the weight alone, in fp32, fp16 or bf16. What vLLM saves is called
    `embed_tokens.weight` and `.weight_scale_inv`, what SGLang saves `multi_head_embedding.weight` and `.scale`. Their
    scales may be bytes or float32. All else stays with the worker. The folder must hold tokenizer.json, which decides
    which tokens share an id.
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
            match = _TABLE.fullmatch(name)
            if match and prefixes.setdefault(int(match[2]), match[1]) != match[1]:
                raise ImportRefused(
                    f"{self._checkpoint.folder} holds the table of layer {match[2]} twice, as "
                    f"{prefixes[int(match[2])]} and {match[1]}: remove one"
                )
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
        scales = take_shape(self._checkpoint, self._scale_name(prefix), rows, -(-dim // BLOCK))
        if scales.dtype not in (FP8_SCALE_DTYPE, "U8", "F32"):
            raise ImportRefused(
                f"{scales.file}: tensor {scales.name} has dtype {scales.dtype}, but scales of fp8 rows must be "
                f"{FP8_SCALE_DTYPE}, U8 or F32: convert the checkpoint first"
            )
        return ScaledTensor(values, (PowerScales(scales) if scales.dtype == "F32" else scales,), "fp8", dim)

    def _scale_name(self, prefix: str) -> str:
        """The scale's name, there or not. Raises ImportRefused for two."""
        names = [f"{prefix}.{name}" for name in ("scale", "weight_scale_inv")]
        found = [name for name in names if name in self._checkpoint.tensors]
        if len(found) > 1:
            raise ImportRefused(f"{self._checkpoint.folder} holds scales twice, as {' and '.join(found)}: remove one")
        return found[0] if found else names[0]
