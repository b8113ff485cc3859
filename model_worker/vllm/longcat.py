"""vLLM's LongCat n-gram model (`LongcatFlashNgramForCausalLM`) with its tables in the service.

vLLM hashes the tokens itself, outside of the compiled graph. It keeps each request's look-back over chunks, prefix
caching and preemption. Only the module that would have held the tables is replaced.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

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


class NgramTablesElsewhere(TablesElsewhere):
    """A base to put before a model class that makes an `NgramEmbedding`."""

    table_tensors = re.compile(r"ngram_embeddings\.embedders\.")
    tables_of = staticmethod(tables_of)


# It has the published name, because vLLM picks a model's class by it.
class LongcatFlashNgramForCausalLM(NgramTablesElsewhere, published.LongcatFlashNgramForCausalLM):
    """LongCat-Flash-Lite and its kin."""
