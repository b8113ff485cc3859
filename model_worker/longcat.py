"""Family longcat: transformers' LongCat-Flash with its n-gram tables elsewhere.

The input embedding of a token is (word + sum_i P_i e_i) / (1 + heads). e_i is the row that head i of the n-gram tables
gives, and P_i is that head's projection. Source: "Scaling Embeddings Outperforms Scaling Experts in Language Models"
(arXiv 2601.21204) and the code published with LongCat-Flash-Lite. The words, the projections and the transformer live
here. The rows come from a `RowSource`: the embedding service, or `LocalTables` as the reference.
"""

from __future__ import annotations

import re
import time
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, LongcatFlashConfig, LongcatFlashForCausalLM, PreTrainedModel

from embedding_service.client.handles import Collect
from embedding_service.client.remote import RemoteModule, wire_dtype
from embedding_service.errors import InvalidRequest, StoreError
from embedding_service.ngram import NO_TOKEN, NgramHasher
from model_worker.checkpoint import CheckpointTensors, refuse_tensors
from model_worker.family import WorkerFamily
from model_worker.longcat_attention import use_latents
from model_worker.longcat_mtp import DRAFT_TENSORS, LongcatDrafter
from model_worker.rows import Lookups, RowSource, Tables, check_same_hash
from model_worker.slot_cache import SlotCache
from model_worker.token_cache import TokenLayer, token_layer

ARCHITECTURE = "LongcatFlashNgramForCausalLM"
WORDS = ("model.embed_tokens.weight", "model.ngram_embeddings.word_embeddings.weight")
TABLE = "model.ngram_embeddings.embedders.{}.weight"
PROJECTION = "model.ngram_embeddings.post_projs.{}.weight"

_NGRAM_TENSORS = "model.ngram_embeddings."
# An expert's projection. A checkpoint may hold it for the zero experts too, which compute nothing.
_EXPERT_GATE_OR_UP = re.compile(r"\.mlp\.experts\.(\d+)\.(?:gate|up)_proj\.weight$")
# Keys of a published config that say what this file settles itself.
_OWN_CONFIG_KEYS = ("model_type", "architectures", "auto_map", "transformers_version")
# Of LongcatFlashModel.forward, in their order.
_FORWARD_ARGUMENTS = ("input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds", "use_cache")


class LocalTables:
    """The tables of a checkpoint in this process: the reference that the service is compared with.

    checkpoint: a folder that holds the n-gram tables.
    Raises StoreError: the folder is no checkpoint, or lacks a table.
    """

    def __init__(self, checkpoint: str | Path) -> None:
        files = CheckpointTensors(checkpoint)
        self._hasher = NgramHasher.from_config(files.config)
        self._rows = torch.cat([files.tensor(TABLE.format(head)) for head in range(self._hasher.num_heads)])
        self.table_bytes = self._rows.nbytes

    def lookup_ngrams(
        self, model: str, token_ids: Tensor, context: Tensor | None = None, *, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """See `RowSource`. There is only one model, so `model` is ignored."""
        return nn.functional.embedding(self._hasher.row_ids(token_ids, context), self._rows).to(dtype)

    def prefetch_ngrams(
        self, model: str, token_ids: Tensor, context: Tensor | None = None, *, dtype: torch.dtype = torch.float32
    ) -> Future[Tensor]:
        """See `RowSource`. They are there at once."""
        rows: Future[Tensor] = Future()
        rows.set_result(self.lookup_ngrams(model, token_ids, context, dtype=dtype))
        return rows

    def hasher(self, model: str) -> NgramHasher:
        """See `RowSource`."""
        return self._hasher


class NgramRows(RemoteModule):
    """Stands in place of the tables and looks up the rows of tokens. Gradients are as `RemoteModule` says.

    source: gives the rows.
    name: the model's name in the source.
    dim: values of a row.
    """

    def __init__(self, source: RowSource, name: str, dim: int) -> None:
        super().__init__()
        self.tables = Tables(source, name)
        self.hasher = source.hasher(name)
        self._dim = dim
        self.lookups = Lookups(self.tables, table_values=dim * sum(table.rows for table in self.hasher.tables))

    def forward(self, tokens: Tensor, context: Tensor | None, like: Tensor) -> Tensor:
        """int64 [B, S] tokens after [B, C] others -> [B, S, heads * dim], of the dtype and device of `like`."""
        return self._look_up(tokens.to(like.device), context, like.dtype)

    def _ask(self, ids: Tensor, context: Tensor | None, dtype: torch.dtype) -> Tensor:
        before = time.perf_counter()
        context = None if context is None else context.cpu()
        rows = self.tables.lookup_ngrams(ids.cpu(), context, wire_dtype(dtype))
        self.lookups.asked(ids.numel())
        self.lookups.waited(time.perf_counter() - before)
        return rows.to(ids.device, dtype).flatten(-3)

    def _trained(self, ids: Tensor, context: Tensor | None) -> Collect | None:
        session_of = getattr(self.tables.source, "session_of", None)
        session = session_of(self.tables.name) if session_of else None
        return partial(session.add_ngram_gradients, ids.clone(), context) if session else None

    def _width(self) -> int:
        return self._dim * self.hasher.num_tables * self.hasher.num_heads

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return repr(self.tables.name)


class NgramEmbedding(nn.Module):
    """The fused input embedding without the words: rows of a source, through the projections.

    projections: [heads, hidden, dim], P_i of each head.
    source: gives the rows.
    name: the model's name in the source.
    """

    def __init__(self, projections: Tensor, source: RowSource, name: str) -> None:
        super().__init__()
        heads, hidden, dim = projections.shape
        # One matrix for all heads: sum_i P_i e_i = [P_0 .. P_n] [e_0 .. e_n].
        side_by_side = projections.transpose(0, 1).reshape(hidden, heads * dim)
        self.projection = nn.Linear(heads * dim, hidden, bias=False, device="meta")
        self.projection.weight = nn.Parameter(side_by_side, requires_grad=projections.requires_grad)
        self.rows = NgramRows(source, name, dim)

    def forward(self, words: Tensor, tokens: Tensor, context: Tensor | None = None) -> Tensor:
        """Fuse.

        words: [B, S, hidden], the word embeddings of the tokens.
        tokens: int64 [B, S], NO_TOKEN for padding.
        context: int64 [B, C], the tokens before them; None at a sequence's start.
        Returns [B, S, hidden], in the dtype of the words.
        Raises EmbeddingServiceError: whatever the source raises.
        """
        rows = self.rows(tokens, context, self.projection.weight)
        return (words + self.projection(rows)) / (1 + self.rows.hasher.num_heads)


def read_config(files: CheckpointTensors) -> LongcatFlashConfig:
    """The config that transformers has for the dense part. The n-gram keys stay on it as plain attributes."""
    flash = {key: value for key, value in files.config.items() if key not in _OWN_CONFIG_KEYS}
    if "num_layers" in flash:
        # Each layer holds two attention sublayers. Published configs do not agree which of the two this key counts.
        flash.pop("num_hidden_layers", None)
    return LongcatFlashConfig.from_dict(flash)


def dense_tensors(files: CheckpointTensors, config: LongcatFlashConfig) -> dict[str, Any]:
    """The tensors of the dense part, under transformers' names, not read yet.

    Raises StoreError: some are not there.
    """
    experts = config.num_layers * config.n_routed_experts
    if experts > len(files.names):
        raise StoreError(
            f"{files.folder} does not fit its config.json: that has {experts:,} experts, for {len(files.names)} tensors"
        )
    tensors = {name: files.slice(name) for name in _transformer_names(files, config)}
    refuse_tensors(files.folder, "missing", _expert_names(config) - tensors.keys())
    return tensors | {WORDS[0]: files.slice(_words_name(files))}


def load_model(checkpoint: str | Path, dtype: torch.dtype | None = None) -> LongcatFlashForCausalLM:
    """The dense part of a LongCat n-gram checkpoint as a transformers model, ready for `attach`.

    The n-gram tables are never read. A file that holds nothing else is not opened.

    checkpoint: the whole checkpoint's folder, or its dense half.
    dtype: of the weights. None takes the stored dtype of the word embeddings.
    Raises InvalidRequest: another architecture.
    StoreError: tensors are missing, have other shapes than the config says, or are not known.
    """
    files = CheckpointTensors(checkpoint)
    if ARCHITECTURE not in files.architectures:
        raise InvalidRequest(f"{checkpoint} is a checkpoint of {files.architectures}; expected {ARCHITECTURE}")
    config = read_config(files)
    tensors = dense_tensors(files, config)
    try:
        # Other shapes are let through only to be named below. transformers' own refusal does not name them.
        loaded: Any = _FlashWithoutZeroExperts.from_pretrained(
            None,
            generation_config=files.generation_config(),
            config=config,
            state_dict=tensors,
            dtype=dtype or tensors[WORDS[0]][:1].dtype,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except RuntimeError as error:
        raise StoreError(f"the tensors of {checkpoint} do not fit its config.json: {error}") from error
    model, report = loaded
    for kind in ("missing", "unexpected", "mismatched"):
        refuse_tensors(checkpoint, kind, report[f"{kind}_keys"])
    model.config.name_or_path = str(checkpoint)
    return model


def attach(hf_model: PreTrainedModel, client: RowSource, name: str) -> Lookups:
    """See `model_worker.attach`."""
    if not isinstance(hf_model, LongcatFlashForCausalLM):
        raise InvalidRequest(f"cannot attach to a {type(hf_model).__name__}: only LongcatFlashForCausalLM so far")
    body = hf_model.model
    if hasattr(body, "ngram_embeddings"):
        raise InvalidRequest(
            "the model has n-gram embeddings already: attach once, to one loaded by model_worker.longcat.load_model"
        )
    if not hf_model.config.name_or_path:
        raise InvalidRequest("the model was not loaded from a checkpoint, so its projections cannot be found: load it")
    files = CheckpointTensors(hf_model.config.name_or_path)
    _check_words(files, body.embed_tokens.weight)
    check_same_hash(NgramHasher.from_config(files.config), client.hasher(name), name)
    embedding = NgramEmbedding(_projections(files).to(body.embed_tokens.weight), client, name)
    _check_dim(embedding, body.embed_tokens.weight)
    body.ngram_embeddings = embedding
    body.register_forward_pre_hook(_fuse_input, with_kwargs=True)
    use_latents(body)
    return embedding.rows.lookups


class LongcatFamily(WorkerFamily):
    """LongCat-Flash-Lite and its kin."""

    architectures = (ARCHITECTURE,)
    models = LongcatFlashForCausalLM
    table_tensors = re.compile(r"\.embedders\.")
    read_config = staticmethod(read_config)
    dense_tensors = staticmethod(dense_tensors)
    load_model = staticmethod(load_model)
    attach = staticmethod(attach)
    draft_tensors = DRAFT_TENSORS

    @staticmethod
    def drafter(hf_model: PreTrainedModel) -> LongcatDrafter:
        """See `WorkerFamily`."""
        return LongcatDrafter(hf_model)


def _fuse_input(body: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]]:
    """Before LongcatFlashModel.forward: token ids become fused embeddings, and the cache learns the tokens."""
    kwargs = {**dict(zip(_FORWARD_ARGUMENTS, args, strict=False)), **kwargs}
    input_ids = kwargs.pop("input_ids", None)
    if input_ids is None or kwargs.get("inputs_embeds") is not None:
        raise InvalidRequest("n-grams need token ids: give input_ids, not inputs_embeds")
    cache = kwargs.get("past_key_values")
    if isinstance(cache, SlotCache):
        tokens = cache.without_padding(input_ids)
    else:
        tokens = _without_padding(input_ids, kwargs.get("attention_mask"))
    history = _history(body, kwargs)
    context = None if history is None else history.context(body.ngram_embeddings.rows.hasher.context_length)
    kwargs["inputs_embeds"] = body.ngram_embeddings(body.embed_tokens(input_ids), tokens, context)
    if history is not None:
        history.append(tokens)
    return (), kwargs


def _history(body: Any, kwargs: dict[str, Any]) -> TokenLayer | None:
    """The token layer of the call's cache (made here if the model is to make one), None without a cache."""
    use_cache = kwargs.get("use_cache")
    if use_cache is None:
        use_cache = body.config.use_cache
    if kwargs.get("past_key_values") is None:
        if not use_cache:
            return None
        kwargs["past_key_values"] = DynamicCache(config=body.config)
    return token_layer(kwargs["past_key_values"], body.config.num_hidden_layers)


def _without_padding(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """The token ids, with NO_TOKEN in place of padding."""
    if attention_mask is None:
        return input_ids
    if attention_mask.dim() != 2:
        raise InvalidRequest(
            f"attention_mask must be [batch, length], got {list(attention_mask.shape)}: n-grams must know the padding"
        )
    return input_ids.masked_fill(attention_mask[:, -input_ids.shape[1] :] == 0, NO_TOKEN)


class _FlashWithoutZeroExperts(LongcatFlashForCausalLM):
    """LongcatFlashForCausalLM with room for the experts that have weights only.

    Published checkpoints hold no weights for the zero (identity) experts. transformers 5.23 asks for their gate and up
    projections, and refuses the checkpoint without them. Its forward never reads those.
    """

    def __init__(self, config: LongcatFlashConfig) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            experts = layer.mlp.experts
            if experts.gate_up_proj is not None:
                experts.gate_up_proj = nn.Parameter(experts.gate_up_proj[: config.n_routed_experts].clone())


def _transformer_names(files: CheckpointTensors, config: LongcatFlashConfig) -> list[str]:
    """All tensors except the n-gram embedding's, the words, the draft layers and those of zero experts."""

    def needed(name: str) -> bool:
        expert = _EXPERT_GATE_OR_UP.search(name)
        return not (
            name.startswith((_NGRAM_TENSORS, DRAFT_TENSORS))
            or name in WORDS
            or (expert and int(expert[1]) >= config.n_routed_experts)
        )

    return sorted(filter(needed, files.names))


def _expert_names(config: LongcatFlashConfig) -> set[str]:
    """The tensors of the experts. transformers merges them, and would not name a missing one."""
    return {
        f"model.layers.{layer}.mlp.experts.{expert}.{projection}_proj.weight"
        for layer in range(config.num_layers)
        for expert in range(config.n_routed_experts)
        for projection in ("gate", "up", "down")
    }


def _words_name(files: CheckpointTensors) -> str:
    for name in WORDS:
        if name in files.names:
            return name
    raise StoreError(f"{files.folder} has no word embeddings: neither {WORDS[0]} nor {WORDS[1]}")


def _projections(files: CheckpointTensors) -> Tensor:
    """[heads, hidden, dim]."""
    heads = NgramHasher.from_config(files.config).num_heads
    return torch.stack([files.tensor(PROJECTION.format(head)) for head in range(heads)])


def _check_words(files: CheckpointTensors, words: Tensor) -> None:
    """Only one of the two names is known to transformers. Under the other it would have made random words."""
    stored = files.slice(_words_name(files))[:1].to(words)
    if _words_name(files) != WORDS[0] and not torch.equal(stored, words[:1]):
        raise InvalidRequest(
            f"{files.folder} keeps its words in {WORDS[1]}, which from_pretrained does not read: "
            "load the model with model_worker.longcat.load_model"
        )


def _check_dim(embedding: NgramEmbedding, words: Tensor) -> None:
    """Look one token up. That proves that the source answers, with rows that fit the projections."""
    tables = embedding.rows.tables
    rows = tables.lookup_ngrams(torch.zeros(1, 1, dtype=torch.int64), None, words.dtype)
    width, hidden = rows[0, 0].numel(), words.shape[1]
    if embedding.projection.weight.shape != (hidden, width):
        raise InvalidRequest(
            f"a token's rows of {tables.name!r} are {width} values wide; the projections of this checkpoint take "
            f"{embedding.projection.in_features}"
        )
