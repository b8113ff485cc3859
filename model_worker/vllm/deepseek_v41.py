"""vLLM's DeepSeek-V4.1 with the tables of its Engram layers in the service.

vLLM hashes the tokens itself, and asks each Engram layer's table for rows before the decoder layers run. That place is
made for tables in the host's memory: a CUDA graph is cut there. So a lookup may wait for the network.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from vllm.compilation.breakable_cudagraph import eager_break_during_capture
from vllm.models import deepseek_v41 as published
from vllm.models.deepseek_v41.common import engram as published_engram

from embedding_service.errors import InvalidRequest
from model_worker.vllm.tables import ServedTables, TablesElsewhere, swapped


class EngramRows(nn.Module):
    """The rows of one Engram layer, in place of the module that would have held its table.

    served: the service's tables.
    rows, dim: the table's.
    head_sizes: rows of each head, which tell whose layer it is.
    """

    # A rank has whole rows of its own tokens, so nothing is gathered.
    tp_size = dp_size = 1
    cpu_offload = False

    def __init__(self, served: ServedTables, rows: int, dim: int, head_sizes: tuple[int, ...]) -> None:
        super().__init__()
        tables = {table.head_rows: table.name for table in served.hasher.tables}
        self._served = served
        self.table = served.check(tables[head_sizes], rows, dim)
        self.rows, self.dim = rows, dim
        self.n_hash_cols = self.part_n_hash_cols = len(head_sizes)

    @eager_break_during_capture
    def lookup(self, indices: Tensor, out: Tensor, background: bool = False) -> None:
        """Write the rows of int64 [tokens, heads] ids into bfloat16 [tokens, heads, dim].

        An id that is none of the table's gives zeros, as it does with vLLM's own. Padding has such ids.
        """
        ids = indices.cpu()
        known = (ids >= 0) & (ids < self.rows)
        safe, look_up = ids.where(known, 0), self._served.client.lookup
        rows = self._served.ask(lambda name: look_up(f"{name}/{self.table}", safe, dtype=torch.bfloat16))
        out.copy_(rows.masked_fill_(~known[..., None], 0))

    def collapse_huge_pages(self) -> None:
        """Nothing is held here."""

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return repr(self.table)


@contextmanager
def tables_of(served: ServedTables) -> Iterator[None]:
    """Engram layers made within the `with` get their rows from the service."""

    def table(rows: int, dim: int, head_sizes: tuple[int, ...], **options: Any) -> EngramRows:
        return EngramRows(served, rows, dim, head_sizes)

    with swapped(published_engram, ParallelEngramEmbedding=table):
        yield


class EngramTablesElsewhere(TablesElsewhere):
    """A base to put before a model class that makes `Engram` layers.

    Raises InvalidRequest where ranks share a sequence. Each has all tokens' rows then, and vLLM would take the first.
    """

    table_tensors = re.compile(r"(?:^|\.)engram\.embed(?:_tokens)?\.")
    tables_of = staticmethod(tables_of)

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        if self.served is None:
            return
        ranks = vllm_config.parallel_config.tensor_parallel_size
        for module in self.modules():  # type: ignore[attr-defined]
            if ranks > 1 and getattr(module, "use_sequence_parallel", False):
                raise InvalidRequest(
                    "Engram tables of the service do not go with sequence parallelism: leave out "
                    "--enable-expert-parallel or tensor parallelism"
                )
            if hasattr(module, "engram_dp_shared_memory"):
                # Each data-parallel rank asks for its own tokens.
                module.engram_dp_shared_memory = True

    @staticmethod
    def tokenizer(vllm_config: Any) -> Any:
        """The tokenizer, whose vocabulary is a part of the hash."""
        from transformers import AutoTokenizer

        model = vllm_config.model_config
        return AutoTokenizer.from_pretrained(
            model.tokenizer, trust_remote_code=model.trust_remote_code, revision=model.revision
        )


# It has the published name, because vLLM picks a model's class by it.
class DeepseekV41ForCausalLM(EngramTablesElsewhere, published.DeepseekV41ForCausalLM):
    """DeepSeek-V4.1-Flash and its kin."""
