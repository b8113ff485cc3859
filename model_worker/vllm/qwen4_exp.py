"""vLLM's Qwen4-Exp models with the tables of their per-layer embeddings (PLE) in the service.

vLLM hashes the tokens itself and gives the model each request's look-back. The model may run as a CUDA graph, which
cannot wait for a network. So the rows of all PLE layers are fetched before it starts, into buffers that the graph
reads.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from vllm.models import qwen4_exp as published
from vllm.models.qwen4_exp.nvidia import ngram_embedding as published_embedding
from vllm.models.qwen4_exp.nvidia.model_state import Qwen4ExpModelState

from embedding_service.errors import InvalidRequest, NotFound
from model_worker.vllm.tables import ServedTables, TablesElsewhere, swapped

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


class FetchedRows(nn.Module):
    """The rows of the step's tokens, in place of the module that would have held one PLE layer's table.

    served: the service's tables.
    layer: the model's layer, from 0.
    rows, dim: the table's.
    heads: rows that a token reads.
    max_tokens: the most tokens of a step.
    dtype: the rows'.
    """

    # The model then asks `forward` for rows when it needs them.
    supports_prefetch = False

    def __init__(
        self, served: ServedTables, layer: int, rows: int, dim: int, heads: int, max_tokens: int, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self._served = served
        self.table = served.check(f"layer_{layer}", rows, dim)
        # vLLM 0.33 asks before it loads, though no tensor of a table is left to load.
        self.org_vocab_size = rows
        # [max_tokens, heads, dim], at one address for all graphs. The model's code asks for a weight's device.
        self.weight: Tensor
        self.register_buffer("weight", torch.zeros(max_tokens, heads, dim, dtype=dtype), persistent=False)

    def ask(self, ids: Tensor) -> Future[Tensor]:
        """Begin to look up the rows of int64 [tokens, heads] ids."""
        return self._served.client.prefetch(f"{self._served.now()}/{self.table}", ids.cpu(), dtype=self.weight.dtype)

    def keep(self, ids: Tensor, answer: Future[Tensor]) -> None:
        """Keep the [tokens, heads, dim] rows of the coming step, which were asked for."""
        try:
            rows = answer.result()
        except NotFound:  # the version was replaced at this moment
            look_up, dtype = self._served.client.lookup, self.weight.dtype
            rows = self._served.ask(lambda name: look_up(f"{name}/{self.table}", ids.cpu(), dtype=dtype))
        self.weight[: len(rows)].copy_(rows)

    def forward(self, ids: Tensor) -> Tensor:
        """Ids [tokens, heads], those that were asked for and padding after them -> [tokens, heads, dim]."""
        return self.weight[: len(ids)]

    def dequantize(self, rows: Tensor, output_dtype: torch.dtype) -> Tensor:
        """Return the rows: they come decoded."""
        return rows

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return repr(self.table)


class RowsBeforeForward(Qwen4ExpModelState):
    """vLLM's state beside the model: the look-back, and before each step the rows."""

    def __init__(self, vllm_config: Any, model: Any, encoder_cache: Any, device: torch.device) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)
        self._layers = _layers_without_table(model)

    def prepare_inputs(self, input_batch: Any, req_states: Any) -> dict[str, Any]:
        """As published. Afterwards the rows of all tokens are there. Raises what `EmbeddingClient.lookup` raises."""
        inputs = super().prepare_inputs(input_batch, req_states)
        tokens = input_batch.input_ids[: input_batch.num_tokens]
        asked = [
            (layer.ngram_embedding, layer.compute_ngram_ids(tokens, inputs["query_start_loc"], inputs["ngram_context"]))
            for layer in self._layers
        ]
        under_way = [(rows, ids, rows.ask(ids)) for rows, ids in asked]
        for rows, ids, answer in under_way:
            rows.keep(ids, answer)
        return inputs  # type: ignore[no-any-return]


def _layers_without_table(model: Any) -> list[Any]:
    """The modules that hash for a PLE layer and get its rows from the service."""
    return [
        module
        for module in model.modules()
        if isinstance(module, published_embedding.Qwen4ExpNGramEmbedding)
        and isinstance(module.ngram_embedding, FetchedRows)
    ]


@contextmanager
def tables_of(served: ServedTables) -> Iterator[None]:
    """Modules that hash for PLE layers, made within the `with`, get their rows from the service."""

    def table(rows: int, dim: int, *, params_dtype: torch.dtype, prefix: str, **options: Any) -> FetchedRows:
        [layer] = _LAYER.findall(prefix)
        heads, max_tokens = options["num_ngram_heads"], options["max_total_tokens"]
        return FetchedRows(served, int(layer), rows, dim, heads, max_tokens, params_dtype)

    with swapped(published_embedding, Qwen4ExpPLEPinnedHostEmbedding=table, Qwen4ExpPLEDeviceEmbedding=table):
        yield


class PleTablesElsewhere(TablesElsewhere):
    """A base to put before a model class that makes `Qwen4ExpNGramEmbedding`s.

    Raises InvalidRequest if vLLM's class for the device makes others.
    """

    table_tensors = re.compile(r"\.ple_embedding\.ngram_embedding\.")
    tables_of = staticmethod(tables_of)

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        layers, served = _layers_without_table(self), self.served
        if served is not None and len(layers) != served.hasher.num_tables:
            raise InvalidRequest(
                f"this Qwen4-Exp model holds its tables itself, but for {len(layers)} of {served.hasher.num_tables}: "
                "vLLM has other classes for this device; leave out additional_config['embedding_service']"
            )
        for layer in layers:
            # Each rank has whole rows, so there is nothing to add up.
            layer.use_reduce_scatter = False

    def get_model_state_cls(self) -> Any:
        """The class that vLLM gets each step's inputs from."""
        return RowsBeforeForward if self.served else super().get_model_state_cls()  # type: ignore[misc]


# They have the published names, because vLLM picks a model's class by them.
class Qwen4ExpForCausalLM(PleTablesElsewhere, published.Qwen4ExpForCausalLM):
    """The text model."""


class Qwen4ExpForConditionalGeneration(PleTablesElsewhere, published.Qwen4ExpForConditionalGeneration):
    """The model with vision."""
