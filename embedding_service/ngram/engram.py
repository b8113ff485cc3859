"""Family engram: DeepSeek-V4.1-Flash and its kin (`DeepseekV41ForCausalLM`), with a table for each Engram layer.

Source: `engram.py` in the code published with DeepSeek-V4.1-Flash.
"""

from collections.abc import Mapping
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from embedding_service.errors import InvalidRequest
from embedding_service.foreign import shown
from embedding_service.ngram.base import NO_TOKEN, NgramHasher, TableShape, text_config
from embedding_service.ngram.bounds import (
    MOST_HEADS,
    MOST_LAYER,
    MOST_LAYERS,
    MOST_ORDER,
    MOST_ROWS,
    MOST_TOKENS,
    check_heads,
    whole,
    wholes,
)
from embedding_service.ngram.token_map import pack, token_map_of, unpack
from embedding_service.ngram.xor import XorHash, multiplier_bound, primes_from

_KEYS = (
    "engram_layer_ids",
    "engram_max_ngram_size",
    "engram_n_heads",
    "engram_vocab_size",
    "engram_num_embeddings",
    "engram_pad_token_id",
    "engram_compressed_vocab_size",
)


class EngramHasher(NgramHasher):
    """engram_n_heads hash functions for each n-gram length n in 2..engram_max_ngram_size, for each Engram layer.

        c = compressed id of a token (`token_map`),  C = how many there are
        rows of a head = the next prime >= engram_vocab_size, counted on over the heads of all layers
        m[0], m[1], ... = 2 * numpy.random.default_rng(10007 * layer_id).integers(0, (2^63 - 1) // C // 2) + 1
        id at t = (xor over d < n of c[t-d] * m[d]) mod rows, plus the rows of the layer's heads before

    where c[t-d] is the pad token's once look-back has met a NO_TOKEN or the sequence's start. EOS ends nothing.
    Published code calls tokens of images dead. Pass them as NO_TOKEN.

    The table of layer i is named `layer_{i}`. `token_map` is the text that `token_map.pack` makes of a map.
    """

    family = "engram"
    model_types = ("deepseek_v41", "deepseek_v41_text")
    architectures = ("DeepseekV41ForCausalLM",)

    def __init__(
        self,
        *,
        engram_layer_ids: list[int],
        engram_max_ngram_size: int,
        engram_n_heads: int,
        engram_vocab_size: int,
        engram_num_embeddings: list[int],
        engram_pad_token_id: int,
        engram_compressed_vocab_size: int,
        token_map: str,
    ) -> None:
        engram_layer_ids = wholes("engram_layer_ids", engram_layer_ids, MOST_LAYER, MOST_LAYERS)
        engram_max_ngram_size = whole("engram_max_ngram_size", engram_max_ngram_size, MOST_ORDER)
        engram_n_heads = whole("engram_n_heads", engram_n_heads, MOST_HEADS)
        engram_vocab_size = whole("engram_vocab_size", engram_vocab_size, MOST_ROWS // MOST_HEADS)
        engram_num_embeddings = wholes("engram_num_embeddings", engram_num_embeddings, MOST_ROWS, MOST_LAYERS)
        engram_pad_token_id = whole("engram_pad_token_id", engram_pad_token_id, MOST_TOKENS)
        engram_compressed_vocab_size = whole("engram_compressed_vocab_size", engram_compressed_vocab_size, MOST_TOKENS)
        self._params = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        compressed = unpack(token_map)
        if int(compressed.max()) + 1 != engram_compressed_vocab_size:
            raise InvalidRequest(
                f"the tokenizer gives {int(compressed.max()) + 1} compressed ids, the config asks for "
                f"engram_compressed_vocab_size {engram_compressed_vocab_size}: is it this model's tokenizer?"
            )
        if not engram_layer_ids or engram_max_ngram_size < 2 or engram_n_heads < 1:
            raise InvalidRequest(
                "engram needs engram_layer_ids, engram_max_ngram_size >= 2 and engram_n_heads >= 1, got "
                f"{shown(engram_layer_ids)}, {engram_max_ngram_size} and {engram_n_heads}"
            )
        if min(engram_layer_ids) < 0 or len(set(engram_layer_ids)) < len(engram_layer_ids):
            raise InvalidRequest(f"engram_layer_ids must be different layers from 0 on, got {shown(engram_layer_ids)}")
        if not 0 <= engram_pad_token_id < len(compressed):
            raise InvalidRequest(f"engram_pad_token_id {engram_pad_token_id} is none of {len(compressed)} tokens")
        heads = engram_n_heads * (engram_max_ngram_size - 1)
        check_heads("engram_layer_ids, engram_max_ngram_size and engram_n_heads", len(engram_layer_ids), heads)
        primes = primes_from(engram_vocab_size)
        head_rows = [tuple(islice(primes, heads)) for _ in engram_layer_ids]
        super().__init__(
            len(compressed),
            engram_max_ngram_size - 1,
            _tables(engram_layer_ids, engram_num_embeddings, head_rows),
        )
        self.layers = tuple(engram_layer_ids)
        bound = multiplier_bound(engram_compressed_vocab_size)
        self._xor = XorHash(
            [_multipliers(layer, bound, engram_max_ngram_size) for layer in engram_layer_ids], head_rows
        )
        # One more at the end: index NO_TOKEN, -1, gives the pad token's id.
        pad = compressed[engram_pad_token_id]
        self._pad = int(pad)
        self._compressed = {compressed.device: torch.cat((compressed, pad.view(1)))}

    @classmethod
    def params_of(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """See the base class. Raises InvalidRequest if keys are missing."""
        keys = text_config(config)
        missing = [key for key in _KEYS if keys.get(key) is None]
        if missing:
            raise InvalidRequest(f"this config describes no Engram tables: it lacks {', '.join(missing)}")
        return {key: keys[key] for key in _KEYS}

    @classmethod
    def params_of_tokenizer(cls, tokenizer: object) -> dict[str, Any]:
        """The compressed vocabulary. Raises what `token_map_of` does."""
        return {"token_map": pack(token_map_of(tokenizer))}

    def params(self) -> dict[str, Any]:
        """The config's own keys, and the packed map."""
        return dict(self._params)

    def _hash(self, tokens: Tensor) -> Tensor:
        size = self.context_length + 1
        alive = (tokens != NO_TOKEN).unfold(1, size, 1).flip(-1).cumprod(-1)
        grams = self._compressed_on(tokens.device)[tokens].unfold(1, size, 1).flip(-1)
        return self._xor.row_ids(grams.masked_fill(alive == 0, self._pad))

    def _compressed_on(self, device: torch.device) -> Tensor:
        if device not in self._compressed:
            self._compressed[device] = self._compressed[torch.device("cpu")].to(device)
        return self._compressed[device]


def _multipliers(layer: int, bound: int, count: int) -> list[int]:
    draws = np.random.default_rng(10007 * layer).integers(0, bound, size=count, dtype=np.int64)
    return [2 * int(draw) + 1 for draw in draws]


def _tables(layers: list[int], rows: list[int], head_rows: list[tuple[int, ...]]) -> tuple[TableShape, ...]:
    if len(rows) != len(layers) or any(given < sum(heads) for given, heads in zip(rows, head_rows, strict=True)):
        raise InvalidRequest(
            f"engram_num_embeddings {shown(rows)} does not fit layers {shown(layers)}, whose heads need "
            f"{shown([sum(heads) for heads in head_rows])} rows"
        )
    return tuple(
        TableShape(f"layer_{layer}", given, heads) for layer, given, heads in zip(layers, rows, head_rows, strict=True)
    )
