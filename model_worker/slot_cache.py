"""A batch's cache in which position p of a sequence lies in slot p of its row.

Each row has a length of its own, so rows may advance by different numbers of tokens and step back. Nothing is moved for
that: slots beyond a row's length are hidden by the mask, and the next pass writes over them. Memory grows by a quarter,
so a pass seldom copies what is there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, cache_utils
from transformers.cache_utils import DynamicLayer

from embedding_service.errors import InvalidRequest
from embedding_service.ngram import NO_TOKEN
from model_worker.batch_cache import BatchCache, new_cache
from model_worker.token_cache import TokenLayer

# Slots are added by this many at least.
_SLOTS = 64
_SLIDING = "sliding_attention"
# transformers 5.19, which vLLM pins, has no layers that read another one's.
_KEPT = (DynamicLayer, getattr(cache_utils, "DummyLayer", DynamicLayer))


class _Pass:
    """Where the running pass writes.

    at: int64 [B, S], the slot of each new token. width: slots that the pass reads. real: bool [B, S], not padding.
    """

    at: Tensor
    real: Tensor
    width = 0


class SlotLayer(DynamicLayer):
    """A layer's keys and values, [rows, heads, slots, dim] with rows and slots to spare."""

    keys: Any
    values: Any

    def __init__(self, running: _Pass) -> None:
        super().__init__()
        self._running = running

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the pass's [B, heads, S, dim]. Returns what it reads, [B, heads, width, dim]."""
        at, width = self._running.at, self._running.width
        count = len(at)
        self._make_room(key_states, value_states, count, width)
        rows = torch.arange(count, device=at.device)[:, None]
        self.keys[rows, :, at] = key_states.transpose(1, 2)
        self.values[rows, :, at] = value_states.transpose(1, 2)
        return self.keys[:count, :, :width], self.values[:count, :, :width]

    def take(self, row: int, other: Any) -> None:
        """A sequence that was run alone comes to this row."""
        if other.keys is None or other.values is None:  # a layer that reads another one's
            return
        length = other.keys.shape[2]
        self._make_room(other.keys, other.values, row + 1, length)
        self._write(row, other.keys[0], other.values[0])

    def move(self, row: int, to: int, length: int) -> None:
        """Put the first slots of a row into another one."""
        if self.is_initialized:
            self._write(to, self.keys[row, :, :length], self.values[row, :, :length])

    def _write(self, row: int, keys: Tensor, values: Tensor) -> None:
        """Give a row its first slots. The rest is 0, for a NaN that another sequence left there passes any mask."""
        for ours, theirs in ((self.keys, keys), (self.values, values)):
            ours[row, :, : theirs.shape[1]] = theirs
            ours[row, :, theirs.shape[1] :] = 0

    def of_row(self, row: int, length: int) -> DynamicLayer:
        """A copy of a row's first positions, as a layer of that sequence alone."""
        alone = TokenLayer() if isinstance(self, TokenLayer) else DynamicLayer()
        if self.is_initialized:
            alone.update(self.keys[row : row + 1, :, :length], self.values[row : row + 1, :, :length])
        return alone

    def get_seq_length(self) -> int:
        """The longest row's positions, with those of the running pass."""
        return self._running.width

    def _make_room(self, keys: Tensor, values: Tensor, rows: int, slots: int) -> None:
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
            self.keys, self.values = (each.new_zeros(0, each.shape[1], 0, each.shape[3]) for each in (keys, values))
        has_rows, _, has_slots, _ = self.keys.shape
        if rows > has_rows or slots > has_slots:
            rows = max(rows, 2 * has_rows) if rows > has_rows else has_rows
            slots = slots + slots // 4 + _SLOTS if slots > has_slots else has_slots
            self.keys, self.values = (_larger(each, rows, slots) for each in (self.keys, self.values))


class SlotTokens(SlotLayer, TokenLayer):
    """The token ids of all rows."""

    def context(self, length: int) -> Tensor | None:
        """int64 [B, length], the tokens before each row's new ones; NO_TOKEN before a sequence starts."""
        at = self._running.at
        # A pass that begins all of its sequences has written nothing yet.
        empty = at.new_zeros(1, 1, 0, 1)
        self._make_room(empty, empty[..., :0], len(at), self._running.width)
        before = at[:, :1] + torch.arange(-length, 0, device=at.device)
        found = self.keys[: len(at), 0, :, 0].gather(1, before.clamp(min=0))
        return found.masked_fill(before < 0, NO_TOKEN)


class SlotCache(DynamicCache, BatchCache):
    """See this file's head. For models with attention layers alone (`fits`).

    config: the model's. dtype, device: of its values.
    """

    steps_back = True

    def __init__(self, config: Any, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self._pass = _Pass()
        self._rows = 0
        self.layers: list[Any] = []
        self._dtype, self._device = dtype, device
        text = config.get_text_config()
        kinds = getattr(text, "layer_types", None) or ()
        self._window: int | None = text.sliding_window if _SLIDING in kinds else None

    @staticmethod
    def fits(config: Any) -> bool:
        """Whether all of a model's layers keep keys and values for each position, and nothing else."""
        return all(type(layer) in _KEPT for layer in new_cache(config).layers)

    @staticmethod
    def check_fits(config: Any) -> None:
        """Raises InvalidRequest: a batch of the model cannot step back."""
        if not SlotCache.fits(config):
            raise InvalidRequest(
                f"the cache of a {config.model_type} model cannot step back over wrong drafts: use --speculate off"
            )

    def inputs(self, cached: Sequence[int], counts: Sequence[int]) -> dict[str, Any]:
        """See `BatchCache`. The mask is [B, 1, S, slots], or one for each kind of attention."""
        new = torch.arange(max(counts))
        at = torch.tensor(cached)[:, None] + new
        self._pass.at, self._pass.width = at.to(self._device), max(cached) + len(new)
        self._pass.real = (new < torch.tensor(counts)[:, None]).to(self._device)
        distance = at[:, None, :, None] - torch.arange(self._pass.width)
        mask: Any = self._mask(distance >= 0)
        if self._window is not None:
            near = self._mask((distance >= 0) & (distance < self._window))
            mask = {"full_attention": mask, _SLIDING: near}
        return {"past_key_values": self, "attention_mask": mask, "position_ids": self._pass.at}

    def _mask(self, visible: Tensor) -> Tensor:
        mask = torch.zeros(visible.shape, dtype=self._dtype)
        return mask.masked_fill(~visible, torch.finfo(self._dtype).min).to(self._device)

    def without_padding(self, tokens: Tensor) -> Tensor:
        """The running pass's int64 [B, S] tokens, with NO_TOKEN in place of padding."""
        return tokens.masked_fill(~self._pass.real, NO_TOKEN)

    def join(self, other: DynamicCache) -> None:
        """See `BatchCache`."""
        if not self._rows:
            self.layers = []
        for number, theirs in enumerate(other.layers):
            if number == len(self.layers):
                self.layers.append(self.new_token_layer() if isinstance(theirs, TokenLayer) else SlotLayer(self._pass))
            self.layers[number].take(self._rows, theirs)
        self._rows += 1

    def new_token_layer(self) -> SlotTokens:
        """Room for token ids, beside the keys and values."""
        return SlotTokens(self._pass)

    def of_row(self, row: int, length: int) -> DynamicCache:
        """A copy of a row's first positions, as a cache of that sequence alone."""
        alone = DynamicCache()
        alone.layers = [layer.of_row(row, length) for layer in self.layers]
        return alone

    def keep(self, rows: Sequence[int], longest: int) -> None:
        """See `BatchCache`. Each row comes from its own place or from a later one."""
        for to, row in enumerate(rows):
            if row != to:
                for layer in self.layers:
                    layer.move(row, to, longest)
        self._rows = len(rows)


def _larger(states: Tensor, rows: int, slots: int) -> Tensor:
    """The same in a tensor with more rows and slots. What was not there before is 0, so that it may be masked."""
    heads, dim = states.shape[1], states.shape[3]
    larger = states.new_zeros(rows, heads, slots, dim)
    larger[: states.shape[0], :, : states.shape[2]] = states
    return larger
