"""Sequences join and leave a batch: what that does to a transformers cache, with any kind of layers.

Rows of different lengths are left-padded to the longest. Tensors with a place for each position are padded: keys,
values, an indexer's keys and positions, token ids. The state that a linear attention layer carries is not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from embedding_service.ngram import NO_TOKEN
from model_worker.token_cache import TokenLayer

# The tensors with positions that a cache layer may have: name, dimension of the sequences, dimension of the positions.
_BY_POSITION = (("keys", 0, 2), ("values", 0, 2), ("indexer_keys", 0, 1), ("indexer_position_ids", 1, 2))
# Tensors by number, [B, ...], the past of convolutions and recurrences.
_CARRIED = ("conv_states", "recurrent_states")


def new_cache(config: Any) -> DynamicCache:
    """A model's empty cache.

    Layers with a sliding window keep all positions, as the mask hides those before the window. What such a layer drops
    by itself would be of the longest sequence of a batch, and shorter ones would lose positions that they need.
    """
    cache = DynamicCache(config=config)
    cache.layers = [DynamicLayer() if isinstance(layer, DynamicSlidingWindowLayer) else layer for layer in cache.layers]
    return cache


def join(first: DynamicCache | None, second: DynamicCache) -> DynamicCache:
    """One cache with the sequences of both, `first`'s before `second`'s, left-padded to the longer of the two."""
    if first is None:
        return second
    for ours, theirs in zip(_layers(first), _layers(second), strict=True):
        fill = NO_TOKEN if isinstance(ours, TokenLayer) else 0
        for name, rows, positions in _BY_POSITION:
            if getattr(ours, name, None) is not None:
                both = (getattr(ours, name), getattr(theirs, name))
                width = max(states.shape[positions] for states in both)
                setattr(ours, name, torch.cat([_left_padded(s, positions, width, fill) for s in both], rows))
        for name in _CARRIED:
            states = getattr(ours, name, {})
            states.update({i: torch.cat([s, getattr(theirs, name)[i]]) for i, s in states.items() if s is not None})
    return first


def keep(cache: DynamicCache, rows: list[int], width: int) -> None:
    """Keep only these sequences of a cache, and their last `width` positions. The rest is padding in all of them."""
    # Beam search's way to pick rows, which every kind of layer has.
    cache.reorder_cache(torch.LongTensor(rows))
    for layer in _layers(cache):
        for name, _, positions in _BY_POSITION:
            states = getattr(layer, name, None)
            if states is not None:
                setattr(layer, name, states.narrow(positions, states.shape[positions] - width, width))


def _layers(cache: DynamicCache) -> list[Any]:
    return list(cache.layers)


def _left_padded(states: Tensor, dimension: int, width: int, fill: int) -> Tensor:
    """With `width` positions along a dimension."""
    before = [0, 0] * (states.dim() - 1 - dimension) + [width - states.shape[dimension], 0]
    return pad(states, before, value=fill)
