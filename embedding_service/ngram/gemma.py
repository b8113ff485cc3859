"""Family gemma: Gemma 3n and Gemma 4 with per-layer embeddings, one row a token for all layers.

Source: modules `gemma3n` and `gemma4` of the transformers library (5.19 and later).
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from embedding_service.errors import InvalidRequest
from embedding_service.foreign import shown
from embedding_service.ngram.base import NgramHasher, TableShape, text_config
from embedding_service.ngram.bounds import MOST_TOKENS, whole

# The published config classes' own. A config.json leaves out values that equal them.
_DEFAULTS = {"vocab_size_per_layer_input": 262_144, "hidden_size_per_layer_input": 256}
_GEMMA_3N = {**_DEFAULTS, "vocab_size": 262_400, "num_hidden_layers": 35}
_GEMMA_4 = {**_DEFAULTS, "vocab_size": 262_144, "num_hidden_layers": 30}


def gemma_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config's keys, and the defaults of its generation. Raises InvalidRequest: no per-layer embeddings."""
    keys = text_config(config)
    names = [keys.get("model_type"), config.get("model_type"), *(config.get("architectures") or ())]
    keys = {**(_GEMMA_4 if any("gemma4" in str(name).lower() for name in names) else _GEMMA_3N), **keys}
    if not keys["hidden_size_per_layer_input"]:
        raise InvalidRequest(
            "this Gemma has no per-layer embeddings: hidden_size_per_layer_input is "
            f"{shown(keys['hidden_size_per_layer_input'])}"
        )
    return keys


class GemmaHasher(NgramHasher):
    """A token's row is its id. No token before it matters.

    Tokens that the table does not have, such as those of images and sounds, read row 0, as in the published code.
    """

    family = "gemma"
    model_types = ("gemma3n", "gemma3n_text", "gemma4", "gemma4_text")
    architectures = (
        "Gemma3nForCausalLM",
        "Gemma3nForConditionalGeneration",
        "Gemma4ForCausalLM",
        "Gemma4ForConditionalGeneration",
    )

    def __init__(self, *, vocab_size: int, vocab_size_per_layer_input: int) -> None:
        vocab_size = whole("vocab_size", vocab_size, MOST_TOKENS)
        rows = whole("vocab_size_per_layer_input", vocab_size_per_layer_input, MOST_TOKENS)
        if min(vocab_size, rows) < 1:
            raise InvalidRequest(f"gemma needs sizes of 1 and more, got {vocab_size} and {rows}")
        super().__init__(vocab_size, context_length=0, tables=(TableShape("per_layer", rows, (rows,)),))

    @classmethod
    def params_of(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """See the base class. Raises InvalidRequest for a Gemma without per-layer embeddings."""
        keys = gemma_keys(config)
        return {key: keys[key] for key in ("vocab_size", "vocab_size_per_layer_input")}

    def params(self) -> dict[str, Any]:
        """The config's own keys."""
        return {"vocab_size": self.vocab_size, "vocab_size_per_layer_input": self.tables[0].rows}

    def _hash(self, tokens: Tensor) -> Tensor:
        rows = self.tables[0].rows
        return tokens.where((tokens >= 0) & (tokens < rows), 0)[:, :, None, None]
