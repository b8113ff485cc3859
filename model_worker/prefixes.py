"""Beginnings of prompts whose keys and values are kept, so that a common system prompt is run once.

A prompt is cut into blocks. A block's keys and values depend on all tokens before it, and on the tables that they had
their rows from. So a block is found by the block before it and its own tokens. Token ids are kept as another layer, so
the n-grams after a beginning look back into it.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from model_worker.batch_cache import new_cache
from model_worker.token_cache import TokenLayer

# Tokens of a block.
BLOCK = 64


@dataclass(frozen=True)
class _Block:
    """Keys and values [1, heads, BLOCK, dim] of each layer, None for a layer that has none of its own."""

    number: int
    states: list[tuple[Tensor, Tensor] | None]
    nbytes: int


class Prefixes:
    """Keeps blocks of prompts, and forgets those that were used least lately.

    config: the model's, whose layers must be of attention alone (`SlotCache.fits`). limit: bytes that it may take.
    """

    def __init__(self, config: Any, limit: int) -> None:
        self._config, self._limit = config, limit
        self._blocks: OrderedDict[tuple[object, tuple[int, ...]], _Block] = OrderedDict()
        self._numbers = count()
        self.nbytes = 0
        """Bytes of all that is kept."""

    def find(self, tables: str, prompt: list[int]) -> tuple[DynamicCache, int]:
        """A cache of as many first tokens as are kept, and how many. At least the last token is left to run.

        tables: what the rows are of, NAME@VERSION.
        """
        found = self._chain(tables, prompt, (len(prompt) - 1) // BLOCK)
        cache = new_cache(self._config)
        if found:
            layers = zip(*(block.states for block in found), strict=True)
            ours: list[Any] = cache.layers
            for number, states in enumerate(layers):
                if number == len(ours):
                    ours.append(TokenLayer())
                if states[0] is not None:
                    ours[number].update(*(torch.cat(each, 2) for each in zip(*states, strict=True)))
        return cache, len(found) * BLOCK

    def put(self, tables: str, prompt: list[int], cache: DynamicCache) -> None:
        """Keep the blocks of a prompt from the cache that it was run with."""
        blocks = len(prompt) // BLOCK
        found = self._chain(tables, prompt, blocks)
        before: object = found[-1].number if found else tables
        for index in range(len(found), blocks):
            span = slice(index * BLOCK, (index + 1) * BLOCK)
            states = [_cut(layer, span) for layer in cache.layers]
            nbytes = sum(each.nbytes for pair in states if pair for each in pair)
            block = _Block(next(self._numbers), states, nbytes)
            self._blocks[before, tuple(prompt[span])] = block
            self.nbytes += nbytes
            before = block.number
        self._chain(tables, prompt, blocks)
        while self.nbytes > self._limit:
            _, oldest = self._blocks.popitem(last=False)
            self.nbytes -= oldest.nbytes

    def _chain(self, tables: str, prompt: list[int], most: int) -> list[_Block]:
        """The blocks of a prompt that are kept, from the first. A later one is forgotten before those it builds on."""
        keys: list[tuple[object, tuple[int, ...]]] = []
        before: object = tables
        for index in range(most):
            key = (before, tuple(prompt[index * BLOCK : (index + 1) * BLOCK]))
            if key not in self._blocks:
                break
            keys.append(key)
            before = self._blocks[key].number
        for key in reversed(keys):
            self._blocks.move_to_end(key)
        return [self._blocks[key] for key in keys]


def _cut(layer: Any, span: slice) -> tuple[Tensor, Tensor] | None:
    """A copy, as a view would keep the whole prompt."""
    return None if layer.keys is None else (layer.keys[:, :, span].clone(), layer.values[:, :, span].clone())
