"""Sequences join and leave a batch: what that does to a transformers cache, with any kind of layers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

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


class BatchCache(ABC):
    """The cache of sequences that run together, in the order of their requests.

    Attributes:
        steps_back: Whether positions that a pass has added may be taken back, by a lower `cached` in the next pass.
    """

    steps_back: ClassVar[bool]

    @abstractmethod
    def inputs(self, cached: Sequence[int], counts: Sequence[int]) -> dict[str, Any]:
        """What a pass takes beside its tokens: the cache, a mask and positions.

        cached: positions that each sequence has so far. counts: its new tokens, which are right-padded to the most.
        """

    @abstractmethod
    def join(self, other: DynamicCache) -> None:
        """Take the one sequence of a cache that `new_cache` made, as the last row."""

    @abstractmethod
    def keep(self, rows: Sequence[int], longest: int) -> None:
        """Keep only these rows, in this order. None of them has more than `longest` positions."""


class PaddedCache(BatchCache):
    """Rows of different lengths, left-padded to the longest. Any kind of layers, none of which can step back.

    Tensors with a place for each position are padded: keys, values, an indexer's keys and positions, token ids. The
    state that a linear attention layer carries is not.

    cache: a new one, or that of one sequence.
    """

    steps_back = False

    def __init__(self, cache: DynamicCache, device: torch.device) -> None:
        self._cache, self._device = cache, device

    def inputs(self, cached: Sequence[int], counts: Sequence[int]) -> dict[str, Any]:
        """See `BatchCache`. All counts are the same."""
        new, before = counts[0], torch.tensor(cached)[:, None]
        width = int(before.max())
        mask = torch.arange(width + new) >= width - before
        return {
            "past_key_values": self._cache,
            "attention_mask": mask.long().to(self._device),
            "position_ids": (before + torch.arange(new)).to(self._device),
        }

    def join(self, other: DynamicCache) -> None:
        """See `BatchCache`."""
        for ours, theirs in zip(_layers(self._cache), _layers(other), strict=True):
            fill = NO_TOKEN if isinstance(ours, TokenLayer) else 0
            for name, rows, positions in _BY_POSITION:
                if getattr(ours, name, None) is not None:
                    both = (getattr(ours, name), getattr(theirs, name))
                    width = max(states.shape[positions] for states in both)
                    setattr(ours, name, torch.cat([_left_padded(s, positions, width, fill) for s in both], rows))
            for name in _CARRIED:
                states = getattr(ours, name, {})
                states.update({i: torch.cat([s, getattr(theirs, name)[i]]) for i, s in states.items() if s is not None})

    def keep(self, rows: Sequence[int], longest: int) -> None:
        """See `BatchCache`."""
        # Beam search's way to pick rows, which every kind of layer has.
        self._cache.reorder_cache(torch.LongTensor(rows))
        for layer in _layers(self._cache):
            for name, _, positions in _BY_POSITION:
                states = getattr(layer, name, None)
                if states is not None:
                    setattr(layer, name, states.narrow(positions, states.shape[positions] - longest, longest))


def _layers(cache: DynamicCache) -> list[Any]:
    return list(cache.layers)


def _left_padded(states: Tensor, dimension: int, width: int, fill: int) -> Tensor:
    """With `width` positions along a dimension."""
    before = [0, 0] * (states.dim() - 1 - dimension) + [width - states.shape[dimension], 0]
    return pad(states, before, value=fill)
