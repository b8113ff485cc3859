"""Family qwen4_exp: transformers' Qwen4-Exp with the tables of its per-layer embeddings (PLE) elsewhere.

The model's own code hashes the tokens and carries its look-back in its cache. Only the modules that held the tables are
replaced. Rows depend on nothing but the token ids, even those of a layer deep in the model. So the rows of all PLE
layers are asked for before the first layer runs, in one lookup in the background.
"""

from __future__ import annotations

import re
import time
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.qwen4_exp import modeling_qwen4_exp as published
from transformers.models.qwen4_exp.configuration_qwen4_exp import Qwen4ExpConfig, Qwen4ExpTextConfig

from embedding_service.client.handles import Collect
from embedding_service.client.remote import RemoteModule, wire_dtype
from embedding_service.errors import InvalidRequest
from embedding_service.ngram import NO_TOKEN, NgramHasher
from model_worker.checkpoint import CheckpointTensors, load_published, published_classes, tensors_but
from model_worker.family import WorkerFamily
from model_worker.rows import Lookups, RowSource, RowsToCome, Tables, check_same_hash

_TABLE_TENSOR = re.compile(r"\.ple_embedding\.ngram_embedding\.")
# The published model's draft layers for speculative decoding, which transformers' class leaves out too.
_DRAFT_TENSORS = "mtp."
# Where the model's PLE layers keep the last tokens, among the states of a cache layer.
_TOKENS_STATE = 2
# Of Qwen4ExpTextModel.forward, in their order.
_FORWARD_ARGUMENTS = (
    "input_ids",
    "attention_mask",
    "position_ids",
    "past_key_values",
    "inputs_embeds",
    "use_cache",
    "ple_input_ids",
)

# The model's code asks for the device of a table's weight.
_NOWHERE = torch.empty(0, device="meta")


class TableSource(RowSource, Protocol):
    """Where rows come from: an `EmbeddingClient`, or tables in this process as the reference."""

    def lookup(self, table: str, ids: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
        """Rows of `model/table`: int64 [*] -> [*, dim]."""


class Prefetch:
    """The rows of all PLE layers for the current forward pass, asked for in the background.

    source: gives the rows.
    name: the model's name in the source.
    """

    def __init__(self, source: TableSource, name: str, dim: int) -> None:
        self.tables = Tables(source, name)
        self.hasher = source.hasher(name)
        self.lookups = Lookups(self.tables, table_values=dim * sum(table.rows for table in self.hasher.tables))
        # The row ids [B, S, L, H] that were asked for, and their rows [B, S, L, H, dim] to come.
        self._asked: tuple[Tensor, RowsToCome] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy knows nothing of a lookup under way. It looks rows up itself."""
        return {**self.__dict__, "_asked": None}

    def start(self, tokens: Tensor, context: Tensor | None, dtype: torch.dtype) -> None:
        """Ask for the rows of int64 [B, S] tokens after [B, C] others, as `dtype`; NO_TOKEN is padding."""
        tokens, context = tokens.cpu(), None if context is None else context.cpu()
        self.lookups.asked(tokens.numel())
        rows = self.tables.prefetch_ngrams(tokens, context, wire_dtype(dtype))
        self._asked = self.hasher.row_ids(tokens, context), rows

    def forget(self) -> None:
        """Another forward pass begins."""
        self._asked = None

    def rows(self, layer: int, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """The rows of int64 [B, S, H] ids of the table of PLE layer 0, 1, ..., on their device, as `dtype`.

        The ids are the model's own. If others were asked for, their rows are not used, and these are looked up now.
        Raises EmbeddingServiceError: whatever the source raises.
        """
        ids, device = ids.cpu(), ids.device
        before = time.perf_counter()
        asked = self._asked
        if asked is not None and torch.equal(asked[0][:, :, layer], ids):
            rows = asked[1].result()[:, :, layer]
        else:
            self.lookups.asked(ids.shape[0] * ids.shape[1])
            rows = self.tables.lookup(self.hasher.tables[layer].name, ids, wire_dtype(dtype))
        self.lookups.waited(time.perf_counter() - before)
        return rows.to(device, dtype)


class RemoteTable(RemoteModule):
    """Stands in place of the nn.Embedding that held one PLE layer's table. Gradients are as `RemoteModule` says."""

    def __init__(self, prefetch: Prefetch, layer: int, dim: int, dtype: torch.dtype) -> None:
        super().__init__(dtype)
        self.prefetch, self.layer, self._dim = prefetch, layer, dim
        self.weight = _NOWHERE

    @property
    def dtype(self) -> torch.dtype:
        """The rows' dtype. The table's stand-in is converted with the model."""
        return self._stand_in.dtype

    def forward(self, ids: Tensor) -> Tensor:
        """int64 [B, S, H] -> [B, S, H, dim]."""
        return self._look_up(ids, None, self.dtype)

    def _ask(self, ids: Tensor, context: Tensor | None, dtype: torch.dtype) -> Tensor:
        return self.prefetch.rows(self.layer, ids, dtype)

    def _trained(self, ids: Tensor, context: Tensor | None) -> Collect | None:
        session_of = getattr(self.prefetch.tables.source, "session_of", None)
        session = session_of(self.prefetch.tables.name) if session_of else None
        table = self.prefetch.hasher.tables[self.layer].name
        return partial(session.add_gradients, table, ids.clone()) if session else None

    def _width(self) -> int:
        return self._dim

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return repr(f"{self.prefetch.tables.name}/{self.prefetch.hasher.tables[self.layer].name}")


class _NoTable(nn.Module):
    """The place where a table will be attached."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.embedding_dim = dim
        self.weight = _NOWHERE

    def forward(self, ids: Tensor) -> Tensor:
        """Raises InvalidRequest: there are no rows."""
        raise InvalidRequest("this model was loaded without its n-gram tables: give it them with model_worker.attach")


class _TablesElsewhere:
    """Loads on the meta device, as transformers does, and drops the tables before anything is allocated."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        for embedding in _ple_embeddings(self):
            embedding.ngram_embedding = _NoTable(embedding.ngram_embedding.embedding_dim)


# They have the published names, because transformers writes a class's name into what it saves.
class Qwen4ExpForCausalLM(_TablesElsewhere, published.Qwen4ExpForCausalLM):  # type: ignore[misc]
    """The text model, its tables elsewhere."""


class Qwen4ExpForConditionalGeneration(_TablesElsewhere, published.Qwen4ExpForConditionalGeneration):  # type: ignore[misc]
    """The model with vision, its tables elsewhere."""


_CLASSES: dict[str, tuple[Any, Any]] = {
    "Qwen4ExpForCausalLM": (Qwen4ExpForCausalLM, Qwen4ExpTextConfig),
    "Qwen4ExpForConditionalGeneration": (Qwen4ExpForConditionalGeneration, Qwen4ExpConfig),
}


def read_config(files: CheckpointTensors) -> Any:
    """The config that transformers has. Raises InvalidRequest: another architecture."""
    _, config_class = published_classes(files, _CLASSES)
    return config_class.from_dict(files.config)


def dense_tensors(files: CheckpointTensors, config: Any) -> dict[str, Any]:
    """All tensors but the tables and the draft layers, not read yet. Raises StoreError: some are not there."""
    return tensors_but(files, lambda name: _TABLE_TENSOR.search(name) or name.startswith(_DRAFT_TENSORS))


def load_model(checkpoint: str | Path, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The dense part of a Qwen4-Exp checkpoint as a transformers model, ready for `attach`.

    The n-gram tables are never read nor allocated. A file that holds nothing else is not opened.

    checkpoint: the whole checkpoint's folder, or its dense half.
    dtype: of the weights. None takes the stored dtype of the word embeddings.
    Raises InvalidRequest: another architecture.
    StoreError: tensors are missing, have other shapes than the config says, or are not known.
    """
    files = CheckpointTensors(checkpoint)
    model_class, _ = published_classes(files, _CLASSES)
    config = read_config(files)
    tensors = dense_tensors(files, config)
    return load_published(files, model_class, config, tensors, dtype)


def attach(hf_model: PreTrainedModel, client: TableSource, name: str) -> Lookups:
    """See `model_worker.attach`."""
    bodies = [module for module in hf_model.modules() if isinstance(module, published.Qwen4ExpTextModel)]
    embeddings = _ple_embeddings(hf_model)
    if len(bodies) != 1 or not embeddings:
        raise InvalidRequest(f"this {type(hf_model).__name__} has no PLE layer, so there is no table to attach")
    if any(isinstance(each.ngram_embedding, RemoteTable) for each in embeddings):
        raise InvalidRequest("the model's tables are attached already: attach once, to a freshly loaded model")
    body: Any = bodies[0]
    check_same_hash(NgramHasher.from_config(body.config), client.hasher(name), name)
    dim = embeddings[0].ngram_embedding.embedding_dim
    prefetch = Prefetch(client, name, dim)
    _check_dim(prefetch, dim)
    for embedding in embeddings:
        dtype = body.embed_tokens.weight.dtype
        embedding.ngram_embedding = RemoteTable(prefetch, embedding.ple_layer_index, dim, dtype)
    # A module's hook, not this call's: a copied model asks for itself.
    body.register_forward_pre_hook(partial(_prefetch, embeddings[0]), with_kwargs=True)
    return prefetch.lookups


class Qwen4ExpFamily(WorkerFamily):
    """Qwen4-Exp models and Qwen3.8-Flash-Next."""

    architectures = tuple(_CLASSES)
    models = published.Qwen4ExpPreTrainedModel
    table_tensors = re.compile(r"\.ngram_embedding\.")
    read_config = staticmethod(read_config)
    dense_tensors = staticmethod(dense_tensors)
    load_model = staticmethod(load_model)
    attach = staticmethod(attach)


@torch.compiler.disable
def _prefetch(embedding: Any, body: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before Qwen4ExpTextModel.forward: ask for the rows that it will need. If it is not clear which, ask for none.

    embedding: the model's first PLE embedding.
    """
    arguments = {**dict(zip(_FORWARD_ARGUMENTS, args, strict=False)), **kwargs}
    table: RemoteTable = embedding.ngram_embedding
    prefetch, layer = table.prefetch, embedding.layer_idx
    prefetch.forget()
    tokens, mask = arguments.get("ple_input_ids"), arguments.get("attention_mask")
    tokens = arguments.get("input_ids") if tokens is None else tokens
    if tokens is None or not tokens.numel():
        return
    if isinstance(mask, Tensor) and mask.dim() == 2 and tokens.shape[1] > 1:
        tokens = tokens.masked_fill(mask[:, -tokens.shape[1] :] == 0, NO_TOKEN)
    cache = arguments.get("past_key_values")
    context = None if cache is None else cache.get_conv_state(layer, state_idx=_TOKENS_STATE)
    prefetch.start(tokens.long(), context, table.dtype)


def _ple_embeddings(model: Any) -> list[Any]:
    """The modules that hash and hold a table each, in the order of their layers."""
    return [module for module in model.modules() if isinstance(module, published.Qwen4ExpTextNGramEmbedding)]


def _check_dim(prefetch: Prefetch, dim: int) -> None:
    """Look one token up. That proves that the source answers, with rows that fit."""
    rows = prefetch.tables.lookup_ngrams(torch.zeros(1, 1, dtype=torch.int64), None, torch.float32)
    if rows.shape[-1] != dim:
        raise InvalidRequest(
            f"rows of {prefetch.tables.name!r} are {rows.shape[-1]} values wide; this model takes {dim}"
        )
