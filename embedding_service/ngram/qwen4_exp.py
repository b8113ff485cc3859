"""Family qwen4_exp: Qwen4-Exp models and Qwen3.8-Flash-Next, with a table for each layer of per-layer embeddings (PLE).

Source: module `qwen4_exp` of the transformers library (5.19 and later).
"""

from collections.abc import Mapping
from itertools import islice
from typing import Any

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
    MOST_WORD,
    check_heads,
    whole,
    wholes,
)
from embedding_service.ngram.xor import XorHash, multiplier_bound, primes_from

# The published config class's own. A config.json leaves out values that equal them.
_DEFAULTS = {
    "vocab_size": 248320,
    "ngram_size": 3,
    "heads_per_ngram": 8,
    "ngram_vocab_size_base": 20_000_000,
    "make_ngram_vocab_size_divisible_by": 128,
    "seed": 1234,
}
_MASK64 = 2**64 - 1
_GAMMA = 0x9E3779B97F4A7C15


class Qwen4ExpHasher(NgramHasher):
    """heads_per_ngram hash functions for each n-gram length n in 2..ngram_size, for each PLE layer l = 0, 1, ...

        rows of a head = the next prime >= ngram_vocab_size_base, counted on over the heads of all layers
        m[d] = 2 * (splitmix64(seed + 10007 * l + gamma * (d + 1)) mod half) + 1,    half = (2^63 - 1) // V // 2
        id at t = (xor over d < n of x[t-d] * m[d]) mod rows, plus the rows of the layer's heads before

    where x[t-d], the token d before t, counts as EOS once look-back has met an EOS, a NO_TOKEN or the sequence's start.
    A NO_TOKEN at t itself counts as EOS too, because the published code replaces padding by EOS. Of several EOS ids the
    first one counts, as there.

    PLE layer ids count from 1. `layers` counts from 0, as names of tensors do, and so do the tables: `layer_{l}`.
    """

    family = "qwen4_exp"
    model_types = ("qwen4_exp", "qwen4_exp_text")
    architectures = ("Qwen4ExpForConditionalGeneration", "Qwen4ExpForCausalLM", "Qwen4ExpModel", "Qwen4ExpTextModel")

    def __init__(
        self,
        *,
        vocab_size: int,
        ple_layer_ids: list[int],
        ngram_size: int,
        heads_per_ngram: int,
        ngram_vocab_size_base: int,
        make_ngram_vocab_size_divisible_by: int,
        seed: int,
        eos_token_id: int,
    ) -> None:
        vocab_size = whole("vocab_size", vocab_size, MOST_TOKENS)
        ple_layer_ids = wholes("ple_layer_ids", ple_layer_ids, MOST_LAYER, MOST_LAYERS)
        ngram_size = whole("ngram_size", ngram_size, MOST_ORDER)
        heads_per_ngram = whole("heads_per_ngram", heads_per_ngram, MOST_HEADS)
        ngram_vocab_size_base = whole("ngram_vocab_size_base", ngram_vocab_size_base, MOST_ROWS // MOST_HEADS)
        step = make_ngram_vocab_size_divisible_by = whole(
            "make_ngram_vocab_size_divisible_by", make_ngram_vocab_size_divisible_by, MOST_ROWS
        )
        seed = whole("seed", seed, 2 * MOST_WORD - 1)
        eos_token_id = whole("eos_token_id", eos_token_id, MOST_WORD - 1)
        self._params = {name: value for name, value in locals().items() if name not in ("self", "__class__", "step")}
        if min(vocab_size, heads_per_ngram, ngram_vocab_size_base, make_ngram_vocab_size_divisible_by) < 1:
            raise InvalidRequest(f"qwen4_exp needs sizes of 1 and more, got {shown(self._params)}")
        if ngram_size < 2 or not ple_layer_ids or min(ple_layer_ids) < 1 or not 0 <= eos_token_id < vocab_size:
            raise InvalidRequest(
                "qwen4_exp needs ngram_size >= 2, ple_layer_ids >= 1 and an eos_token_id below vocab_size, "
                f"got {shown(self._params)}"
            )
        layers = sorted(set(ple_layer_ids))
        heads = heads_per_ngram * (ngram_size - 1)
        check_heads("ple_layer_ids, ngram_size and heads_per_ngram", len(layers), heads)
        primes = primes_from(ngram_vocab_size_base)
        head_rows = [tuple(islice(primes, heads)) for _ in layers]
        tables = tuple(
            TableShape(f"layer_{layer - 1}", -(-sum(rows) // step) * step, rows)
            for layer, rows in zip(layers, head_rows, strict=True)
        )
        super().__init__(vocab_size, ngram_size - 1, tables)
        self.layers = tuple(layer - 1 for layer in layers)
        self._eos = eos_token_id
        half = multiplier_bound(vocab_size)
        # m[d] of each layer.
        self.multipliers = [
            [2 * (_splitmix64(seed + 10007 * layer + _GAMMA * (d + 1)) % half) + 1 for d in range(ngram_size)]
            for layer in range(len(layers))
        ]
        self._xor = XorHash(self.multipliers, head_rows)

    @classmethod
    def params_of(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """See the base class. Raises InvalidRequest for a model without PLE layers or EOS."""
        keys = {**_DEFAULTS, **text_config(config)}
        eos = keys.get("eos_token_id")
        eos = (eos or [None])[0] if isinstance(eos, (list, tuple)) else eos
        if not keys.get("ple_layer_ids") or eos is None:
            raise InvalidRequest(
                "this qwen4_exp config describes no n-gram tables: ple_layer_ids is "
                f"{shown(keys.get('ple_layer_ids'))}, eos_token_id {shown(eos)}"
            )
        return {**{key: keys[key] for key in _DEFAULTS}, "ple_layer_ids": keys["ple_layer_ids"], "eos_token_id": eos}

    def params(self) -> dict[str, Any]:
        """The config's own keys, with one EOS id."""
        return dict(self._params)

    def _hash(self, tokens: Tensor) -> Tensor:
        # [B, S, N], the token itself first, then older ones.
        grams = tokens.unfold(1, self.context_length + 1, 1).flip(-1)
        older = grams[..., 1:]
        ends = ((older == self._eos) | (older == NO_TOKEN)).cumsum(-1) > 0
        grams[..., 1:] = older.masked_fill(ends, self._eos)
        return self._xor.row_ids(grams.masked_fill(grams == NO_TOKEN, self._eos))


def _splitmix64(value: int) -> int:
    """The output of the generator SplitMix64 in state `value` (Steele, Lea and Flood, OOPSLA 2014)."""
    value = (value + _GAMMA) & _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)
