"""vLLM's LongCat n-gram model (`LongcatFlashNgramForCausalLM`) with its tables in the service.

vLLM hashes the tokens itself, outside of the compiled graph. It keeps each request's look-back over chunks, prefix
caching and preemption. Only the module that would have held the tables is replaced.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from vllm.model_executor.models import longcat_flash_ngram as published

from embedding_service import RemoteEmbedding
from model_worker.vllm.tables import ServedTables, TablesElsewhere, swapped


@contextmanager
def tables_of(served: ServedTables) -> Iterator[None]:
    """An `NgramEmbedding` made within the `with` gets its rows from the service."""

    def table(rows: int, dim: int, params_dtype: torch.dtype) -> RemoteEmbedding:
        return served.embedding("ngram", rows, dim, params_dtype)

    with swapped(published, VocabParallelEmbedding=table):
        yield


class KeptLookBack(published.LongcatNgramModelState):
    """vLLM's state beside the model, whose look-back holds the tokens that were kept.

    vLLM rolls it forward over all tokens of a step. With speculative decoding, those are rejected drafts too. The next
    tokens would get the rows of other n-grams, and no error.
    """

    def prepare_inputs(self, input_batch: Any, req_states: Any) -> dict[str, Any]:
        """As published, after the tokens that each request has by now."""
        requests = input_batch.idx_mapping[: input_batch.num_reqs].long()
        before = torch.arange(-self.ctx_len, 0, device=self.token_context.device)
        at = req_states.num_computed_tokens.gpu[requests].long()[:, None] + before
        tokens = req_states.all_token_ids.gpu[requests[:, None], at.clamp(min=0)]
        tokens = torch.where(tokens == self.eos_id, -tokens, tokens)
        self.token_context[requests] = tokens.masked_fill(at < 0, -1).to(self.token_context.dtype)
        return super().prepare_inputs(input_batch, req_states)  # type: ignore[no-any-return]


class NgramTablesElsewhere(TablesElsewhere):
    """A base to put before a model class that makes an `NgramEmbedding`."""

    table_tensors = re.compile(r"ngram_embeddings\.embedders\.")
    tables_of = staticmethod(tables_of)

    def get_model_state_cls(self) -> Any:
        """The class that vLLM gets each step's inputs from."""
        return KeptLookBack if self.served else super().get_model_state_cls()  # type: ignore[misc]


# It has the published name, because vLLM picks a model's class by it.
class LongcatFlashNgramForCausalLM(NgramTablesElsewhere, published.LongcatFlashNgramForCausalLM):
    """LongCat-Flash-Lite and its kin."""
