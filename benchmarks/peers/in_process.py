"""No service at all: the rows in the client's own memory. Every service is measured against that in the end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.data import DIM, Data, Ids
from benchmarks.peers.base import Lookup, Peer, Server


class IndexSelect(Peer):
    """torch.index_select."""

    name = "index_select here"

    @contextmanager
    def serve(self, data: Data, folder: Path) -> Iterator[Server]:
        """Nothing to serve."""
        yield Server()

    @contextmanager
    def connect(self, data: Data, target: Any) -> Iterator[Lookup]:
        """The rows, mapped."""
        rows = data.tensor()
        yield lambda ids: rows.index_select(0, torch.from_numpy(ids))


class Fbgemm(IndexSelect):
    """FBGEMM's inference kernel on the same bytes."""

    name = "FBGEMM here"

    @contextmanager
    def connect(self, data: Data, target: Any) -> Iterator[Lookup]:
        """The kernel. It is told that it has weights, and never allocates any."""
        from fbgemm_gpu.split_embedding_configs import SparseType
        from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode, EmbeddingLocation, PoolingMode
        from fbgemm_gpu.split_table_batched_embeddings_ops_inference import IntNBitTableBatchedEmbeddingBagsCodegen

        kernel = IntNBitTableBatchedEmbeddingBagsCodegen(
            [("rows", data.rows, DIM, SparseType.FP16, EmbeddingLocation.HOST)],
            device="cpu",
            pooling_mode=PoolingMode.NONE,
            output_dtype=SparseType.FP16,
            bounds_check_mode=BoundsCheckMode.NONE,
        )
        kernel.initialize_physical_weights_placements_and_offsets()
        kernel.initialize_logical_weights_placements_and_offsets()
        kernel.weights_host = data.tensor().view(torch.uint8).view(-1)
        kernel.host_size = kernel.weights_host.numel()
        kernel.weight_initialized = True

        def lookup(ids: Ids) -> Tensor:
            return kernel(torch.from_numpy(ids), torch.tensor([0, len(ids)]))

        yield lookup
