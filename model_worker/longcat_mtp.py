"""LongCat's draft layer (multi-token prediction): a checkpoint's `model.mtp.*`, which guesses the token after the next.

At position t it has the main model's last hidden state there and the token at t + 1, and guesses the token at t + 2.
For a further guess it takes its own hidden state in place of the main model's. Its words are its own, without n-grams.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.models.longcat_flash.modeling_longcat_flash import (
    LongcatFlashMLA,
    LongcatFlashMLP,
    LongcatFlashRMSNorm,
)

from model_worker.checkpoint import CheckpointTensors, refuse_tensors
from model_worker.longcat_attention import use_latents
from model_worker.slot_cache import SlotCache

# How the names of its tensors begin.
DRAFT_TENSORS = "model.mtp."


class DraftLayer(nn.Module):
    """The layer, as published. config: the main model's."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.embed_tokens = nn.Embedding(config.vocab_size, hidden)
        self.enorm, self.hnorm = LongcatFlashRMSNorm(hidden, eps), LongcatFlashRMSNorm(hidden, eps)
        self.eh_proj = nn.Linear(2 * hidden, hidden, bias=False)
        self.input_layernorm = LongcatFlashRMSNorm(hidden, eps)
        self.self_attn = LongcatFlashMLA(config, layer_idx=0)
        self.post_attention_layernorm = LongcatFlashRMSNorm(hidden, eps)
        self.mlp = LongcatFlashMLP(config, config.ffn_hidden_size)
        self.norm = LongcatFlashRMSNorm(hidden, eps)

    def forward(self, tokens: Tensor, hidden: Tensor, rotary: Any, mask: Tensor | None, cache: Any) -> Tensor:
        """int64 [B, S] tokens after [B, S, hidden] states -> the states [B, S, hidden] that the main head reads."""
        states = self.eh_proj(torch.cat([self.enorm(self.embed_tokens(tokens)), self.hnorm(hidden)], -1))
        attended, _ = self.self_attn(self.input_layernorm(states), rotary, mask, cache)
        states = states + attended
        states = states + self.mlp(self.post_attention_layernorm(states))
        return self.norm(states)  # type: ignore[no-any-return]


def load_draft_layer(files: CheckpointTensors, config: Any) -> DraftLayer:
    """Raises StoreError: a tensor of it is missing, or not known, or has another shape."""
    with torch.device("meta"):
        layer = DraftLayer(config)
    expected = layer.state_dict()
    unknown = {name for name in files.names if name.startswith(DRAFT_TENSORS)} - {
        published_name(name) for name in expected
    }
    refuse_tensors(files.folder, "unexpected", unknown)
    tensors = {name: files.tensor(published_name(name)) for name in expected}
    misshapen = [published_name(name) for name, tensor in tensors.items() if tensor.shape != expected[name].shape]
    refuse_tensors(files.folder, "mismatched", misshapen)
    layer.load_state_dict(tensors, assign=True)
    return layer


def published_name(name: str) -> str:
    """What a checkpoint calls a tensor of `DraftLayer`."""
    module = name.partition(".")[0]
    if module in ("embed_tokens", "norm"):
        return DRAFT_TENSORS + name
    if module in ("enorm", "hnorm"):
        return f"{DRAFT_TENSORS}layers.0.{module}.m.weight"
    return f"{DRAFT_TENSORS}layers.0.{'transformer_layer.' if module == 'mlp' else ''}{name}"


@dataclass
class DraftRun:
    """A prompt that is run: keys and values of its first `done` places, the main model's last state [1, hidden]."""

    slots: SlotCache
    done: int = 0
    last: Tensor = field(default_factory=lambda: torch.empty(0))


class LongcatDrafter:
    """Guesses for a batch with the draft layer. Its keys and values lie in slots of their own.

    model: the attached model. The layer takes its dtype and device, its head, its positions.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model: Any = model
        layer: Any = load_draft_layer(CheckpointTensors(str(model.config.name_or_path)), model.config)
        self._layer = layer.to(device=model.device, dtype=model.dtype).eval()
        use_latents(self._layer)
        self.nbytes = sum(tensor.nbytes for tensor in layer.state_dict().values())
        """Bytes of the layer's own tensors."""
        self._slots: SlotCache | None = None
        # What the layer has yet to see of each sequence: the main model's [n, hidden] states at its last n positions.
        self._fresh: list[Tensor] = []
        self.hidden = torch.empty(0)
        """[B, S, hidden], the main model's last states in the pass that was run just now."""
        self._model.model.register_forward_hook(self._keep_hidden)

    def _keep_hidden(self, body: Any, args: Any, output: Any) -> None:
        self.hidden = output.last_hidden_state

    def prefill(self, run: DraftRun | None, prompt: Sequence[int], hidden: Tensor) -> DraftRun:
        """Run a prompt's next chunk, at whose places the main model has the last states [n, hidden]. run: its first."""
        run = run or self._begin()
        tokens = prompt[run.done + 1 : run.done + 1 + len(hidden)]  # what follows the whole prompt is not known yet
        if tokens:
            self._run([tokens], hidden[None, : len(tokens)], run.slots.inputs([run.done], [len(tokens)]))
        run.done += len(tokens)
        run.last = hidden[-1:].clone()
        return run

    def _begin(self) -> DraftRun:
        empty = DynamicCache()
        empty.layers = [DynamicLayer()]
        run = DraftRun(self._new_slots())
        run.slots.join(empty)
        return run

    def _new_slots(self) -> SlotCache:
        return SlotCache(self._model.config, self._model.dtype, self._model.device)

    def join(self, run: DraftRun) -> None:
        """A sequence joins as the last row. Its whole prompt has been run."""
        if self._slots is None:
            self._slots = self._new_slots()
        self._slots.join(run.slots.of_row(0, run.done))
        self._fresh.append(run.last)

    def checked(self, kept: Sequence[int]) -> None:
        """A pass was checked, in which each sequence kept so many of its places."""
        self._fresh = [self.hidden[row, :count] for row, count in enumerate(kept)]

    def keep(self, rows: Sequence[int], longest: int) -> None:
        """See `BatchCache`."""
        assert self._slots is not None
        self._fresh = [self._fresh[row] for row in rows]
        self._slots.keep(rows, longest)

    def forget(self) -> None:
        """No sequence runs any more."""
        self._fresh, self._slots = [], None

    def guess(self, completions: Sequence[Sequence[int]], cached: Sequence[int], most: int) -> list[list[int]]:
        """The next `most` tokens of each sequence, by its tokens so far and the positions that the main model has."""
        assert self._slots is not None
        counts = [len(fresh) for fresh in self._fresh]
        cached = [end - count for end, count in zip(cached, counts, strict=True)]
        tokens = [list(completion[-count:]) for completion, count in zip(completions, counts, strict=True)]
        hidden = nn.utils.rnn.pad_sequence(self._fresh, batch_first=True)
        guesses: list[list[int]] = [[] for _ in completions]
        while True:
            states = self._run(tokens, hidden, self._slots.inputs(cached, counts))
            last = states[torch.arange(len(states)), torch.tensor(counts) - 1]
            found = self._model.lm_head(last).argmax(-1).tolist()
            for guess, token in zip(guesses, found, strict=True):
                guess.append(token)
            if len(guesses[0]) == most:
                return guesses
            cached = [ahead + count for ahead, count in zip(cached, counts, strict=True)]
            tokens, hidden, counts = [[token] for token in found], last[:, None], [1] * len(found)

    def _run(self, tokens: Sequence[Sequence[int]], hidden: Tensor, inputs: dict[str, Any]) -> Tensor:
        longest = max(map(len, tokens))
        ids = torch.tensor([[*each, *[0] * (longest - len(each))] for each in tokens], device=hidden.device)
        rotary = self._model.model.rotary_emb(hidden, inputs["position_ids"])
        return self._layer(ids, hidden, rotary, inputs["attention_mask"], inputs["past_key_values"])  # type: ignore[no-any-return]
