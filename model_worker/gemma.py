"""Families gemma3n and gemma4: transformers' Gemma with the table of its per-layer embeddings elsewhere.

The published model looks a token's row up, parts it among the layers, and scales it. Only the module that held the
table is replaced.
"""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.gemma3n import modeling_gemma3n as gemma3n
from transformers.models.gemma3n.configuration_gemma3n import Gemma3nConfig, Gemma3nTextConfig
from transformers.models.gemma4 import modeling_gemma4 as gemma4
from transformers.models.gemma4.configuration_gemma4 import Gemma4Config, Gemma4TextConfig

from embedding_service.client.remote import RemoteEmbedding, wire_dtype
from embedding_service.errors import InvalidRequest
from embedding_service.ngram import NgramHasher
from model_worker.checkpoint import CheckpointTensors, load_published, published_classes, tensors_but
from model_worker.family import WorkerFamily
from model_worker.rows import Lookups, Tables, check_same_hash

_TABLE = "embed_tokens_per_layer"


class RemotePerLayer(RemoteEmbedding):
    """Stands in place of the scaled nn.Embedding that held the per-layer embeddings.

    scale: what the published module multiplies rows with.
    """

    def __init__(self, client: Any, table: str, dtype: torch.dtype, scale: float, lookups: Lookups) -> None:
        super().__init__(client, table, dtype)
        self.scale, self.lookups = scale, lookups

    def forward(self, ids: Tensor) -> Tensor:
        """int64 [*] -> [*, layers * values], scaled."""
        return super().forward(ids) * torch.tensor(self.scale).to(self.dtype)

    def _ask(self, ids: Tensor, context: Tensor | None, dtype: torch.dtype) -> Tensor:
        self.lookups.asked(ids.numel())
        before = time.perf_counter()
        rows = self.lookups.tables.lookup(self.table.rpartition("/")[2], ids, wire_dtype(dtype))
        self.lookups.waited(time.perf_counter() - before)
        return rows.to(dtype)


class _NoTable(nn.Module):
    """The place where the table will be attached."""

    def forward(self, ids: Tensor) -> Tensor:
        """Raises InvalidRequest: there are no rows."""
        raise InvalidRequest("this model was loaded without its per-layer table: give it one with model_worker.attach")


class _TableElsewhere:
    """Loads on the meta device, as transformers does, and drops the table before anything is allocated."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        setattr(_body(self), _TABLE, _NoTable())


# They have the published names, because transformers writes a class's name into what it saves.
class Gemma3nForCausalLM(_TableElsewhere, gemma3n.Gemma3nForCausalLM):  # type: ignore[misc]
    """The text model of Gemma 3n, its table elsewhere."""


class Gemma3nForConditionalGeneration(_TableElsewhere, gemma3n.Gemma3nForConditionalGeneration):  # type: ignore[misc]
    """Gemma 3n with vision and hearing, its table elsewhere."""


class Gemma4ForCausalLM(_TableElsewhere, gemma4.Gemma4ForCausalLM):  # type: ignore[misc]
    """The text model of Gemma 4, its table elsewhere."""


class Gemma4ForConditionalGeneration(_TableElsewhere, gemma4.Gemma4ForConditionalGeneration):  # type: ignore[misc]
    """Gemma 4 with vision and hearing, its table elsewhere."""


_CLASSES: dict[str, tuple[Any, Any]] = {
    "Gemma3nForCausalLM": (Gemma3nForCausalLM, Gemma3nTextConfig),
    "Gemma3nForConditionalGeneration": (Gemma3nForConditionalGeneration, Gemma3nConfig),
    "Gemma4ForCausalLM": (Gemma4ForCausalLM, Gemma4TextConfig),
    "Gemma4ForConditionalGeneration": (Gemma4ForConditionalGeneration, Gemma4Config),
}


def read_config(files: CheckpointTensors) -> Any:
    """The config that transformers has. Raises InvalidRequest: another architecture, or no per-layer embeddings."""
    _, config_class = published_classes(files, _CLASSES)
    NgramHasher.from_config(files.config)
    return config_class.from_dict(files.config)


def dense_tensors(files: CheckpointTensors, config: Any) -> dict[str, Any]:
    """All tensors but the table, not read yet. Raises StoreError: some are not there."""
    return tensors_but(files, lambda name: f".{_TABLE}." in f".{name}")


def load_model(checkpoint: str | Path, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The dense part of a Gemma checkpoint as a transformers model, ready for `attach`.

    The table is never read nor allocated. A file that holds nothing else is not opened. Takes and raises what
    `model_worker.load_model` does.
    """
    files = CheckpointTensors(checkpoint)
    config = read_config(files)
    return load_published(files, published_classes(files, _CLASSES)[0], config, dense_tensors(files, config), dtype)


def attach(hf_model: PreTrainedModel, client: Any, name: str) -> Lookups:
    """See `model_worker.attach`."""
    body = _body(hf_model)
    if isinstance(getattr(body, _TABLE), RemotePerLayer):
        raise InvalidRequest("the model's table is attached already: attach once, to a freshly loaded model")
    hasher = client.hasher(name)
    check_same_hash(NgramHasher.from_config(body.config), hasher, name)
    [table] = hasher.tables
    values = body.config.hidden_size_per_layer_input
    lookups = Lookups(Tables(client, name), table_values=table.rows * body.config.num_hidden_layers * values)
    dtype = body.embed_tokens.weight.dtype
    embedding = RemotePerLayer(client, f"{name}/{table.name}", dtype, values**0.5, lookups)
    # One token proves that the source answers, with rows that fit.
    width = client.lookup(embedding.table, torch.zeros(1, dtype=torch.int64)).shape[1]
    if width != body.config.num_hidden_layers * values:
        raise InvalidRequest(
            f"rows of {name!r} are {width} values wide; this model takes {body.config.num_hidden_layers * values}"
        )
    setattr(body, _TABLE, embedding)
    return lookups


def _body(model: Any) -> Any:
    """Its text model, which has the table. Raises InvalidRequest: it has none."""
    bodies = [each for each in model.modules() if isinstance(each, (gemma3n.Gemma3nTextModel, gemma4.Gemma4TextModel))]
    if len(bodies) != 1 or not hasattr(bodies[0], _TABLE):
        raise InvalidRequest(f"this {type(model).__name__} has no per-layer embeddings, so there is nothing to attach")
    return bodies[0]


class Gemma3nFamily(WorkerFamily):
    """Gemma 3n (E2B, E4B)."""

    architectures = tuple(name for name in _CLASSES if name.startswith("Gemma3n"))
    models: ClassVar[type[PreTrainedModel]] = gemma3n.Gemma3nPreTrainedModel
    table_tensors = re.compile(rf"\b{_TABLE}\.")
    read_config = staticmethod(read_config)
    dense_tensors = staticmethod(dense_tensors)
    load_model = staticmethod(load_model)
    attach = staticmethod(attach)


class Gemma4Family(Gemma3nFamily):
    """Gemma 4 with per-layer embeddings (E2B, E4B)."""

    architectures = tuple(name for name in _CLASSES if name.startswith("Gemma4"))
    models = gemma4.Gemma4PreTrainedModel
