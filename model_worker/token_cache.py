"""The KV cache carries the token ids it was made from, so that n-grams can look back over it.

The ids lie in one more layer of transformers' `DynamicCache`. transformers reorders beams of a cache, repeats, selects,
crops and copies it. It does so to every layer. So look-back never comes from another sequence than the keys and values.
"""

from __future__ import annotations

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from embedding_service.errors import InvalidRequest


class TokenLayer(DynamicLayer):
    """A cache layer whose keys are token ids, [B, 1, S, 1] int64. Its values are empty."""

    def append(self, tokens: Tensor) -> None:
        """Add LongTensor[B, S] at the end; NO_TOKEN marks padding."""
        keys = tokens[:, None, :, None]
        self.update(keys, keys[..., :0])

    def tokens(self) -> Tensor | None:
        """All token ids, LongTensor[B, S]. None while there are none."""
        return self.keys[:, 0, :, 0] if self.keys is not None and self.keys.numel() else None

    def context(self, length: int) -> Tensor | None:
        """int64 [B, C], the last tokens, at most `length`. None while there are none."""
        tokens = self.tokens()
        return None if tokens is None else tokens[:, -length:]


def token_layer(cache: object, model_layers: int) -> TokenLayer:
    """The token ids of a cache. An empty cache gets its token layer here.

    cache: a `DynamicCache`, as `generate` makes by default.
    model_layers: key-value layers of the model.
    Raises InvalidRequest: another class of cache, or one that holds positions whose tokens are not known.
    """
    if not isinstance(cache, DynamicCache):
        raise InvalidRequest(
            f"{type(cache).__name__} is not supported with remote n-gram tables: use transformers' DynamicCache "
            "(the default; leave out cache_implementation)"
        )
    layer = cache.layers[-1] if cache.layers else None
    if not isinstance(layer, TokenLayer):
        cache.layers.extend(DynamicLayer() for _ in range(model_layers - len(cache.layers)))
        layer = getattr(cache, "new_token_layer", TokenLayer)()
        cache.layers.append(layer)
    if layer.get_seq_length() != cache.get_seq_length():
        raise InvalidRequest(
            f"the KV cache holds {cache.get_seq_length()} positions but the token ids of {layer.get_seq_length()}: "
            "it was filled before attach() or by a call that failed; start with a new cache"
        )
    return layer
