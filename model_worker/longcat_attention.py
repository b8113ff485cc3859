"""LongCat's attention for few new tokens after many, in the engine's batches.

A cache holds a latent of each position. transformers makes the keys and values of all positions from the latents again
in each pass. For one new token that is nearly all of the pass's work. Here the queries are brought to the latents
instead, once for each new token, and the values are made from the sum of latents. The result is the same, but for
float rounding. (DeepSeek-V2, arXiv 2405.04434, section 2.1.2, calls that absorbing the matrices.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.longcat_flash.modeling_longcat_flash import (
    LongcatFlashMLA,
    apply_rotary_pos_emb_interleave,
)

from model_worker.slot_cache import SlotCache


class LatentAttention(LongcatFlashMLA):
    """transformers' attention, but for passes over a `SlotCache` for which this way is less work."""

    def forward(  # type: ignore[override]  # transformers names three of two results
        self,
        hidden_states: Tensor,
        position_embeddings: Any,
        attention_mask: Tensor | None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """[B, S, hidden] -> the same. As `LongcatFlashMLA.forward`."""
        new = hidden_states.shape[1]
        if isinstance(past_key_values, SlotCache) and attention_mask is not None and self._is_less_work(new):
            return self._attend(hidden_states, position_embeddings, attention_mask, past_key_values), None
        found: Any = super().forward(hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs)
        return found  # type: ignore[no-any-return]

    def _is_less_work(self, new: int) -> bool:
        """For each position: a latent becomes a key and a value, or new tokens meet latents in place of both."""
        width = self.qk_nope_head_dim + self.v_head_dim
        return new * (2 * self.kv_lora_rank - width) < self.kv_lora_rank * width

    def _attend(self, states: Tensor, positions: tuple[Tensor, Tensor], mask: Tensor, cache: SlotCache) -> Tensor:
        batch, new, _ = states.shape
        rank, rotated = self.kv_lora_rank, self.qk_rope_head_dim
        queries = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(states)))
        queries = queries.view(batch, new, -1, self.qk_head_dim).transpose(1, 2) * self.mla_scale_q_lora
        query, query_place = queries.split([self.qk_nope_head_dim, rotated], -1)
        latent, place = self.kv_a_proj_with_mqa(states)[:, None].split([rank, rotated], -1)
        latent = self.kv_a_layernorm(latent) * self.mla_scale_kv_lora
        query_place, place = apply_rotary_pos_emb_interleave(query_place, place, *positions)
        latents, places = (each[:, 0] for each in cache.update(latent, place, self.layer_idx))  # [B, slots, *]

        up = self.kv_b_proj.weight.view(-1, self.qk_nope_head_dim + self.v_head_dim, rank)
        to_keys, to_values = up.split([self.qk_nope_head_dim, self.v_head_dim], 1)
        # All heads meet the same latents, so they are one matrix: [B, heads * S, rank].
        scores = (query @ to_keys).flatten(1, 2) @ latents.mT
        scores = scores.baddbmm_(query_place.flatten(1, 2), places.mT).unflatten(1, (-1, new))
        weights = (scores * self.scaling + mask).softmax(-1, dtype=torch.float32).to(states.dtype)
        summed = (weights.flatten(1, 2) @ latents).unflatten(1, (-1, new))  # [B, heads, S, rank]
        return self.o_proj((summed @ to_values.mT).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def use_latents(model: nn.Module) -> None:
    """Let the attentions of a model go this way in the engine's batches. Others run as before."""
    for module in model.modules():
        if type(module) is LongcatFlashMLA:
            module.__class__ = LatentAttention
