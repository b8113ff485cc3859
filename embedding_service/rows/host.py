"""Rows in a CPU's memory: one linear range of addresses a table, read by FBGEMM's kernels."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path

import numpy as np
import torch
from fbgemm_gpu.split_embedding_configs import SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode, EmbeddingLocation, PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_inference import IntNBitTableBatchedEmbeddingBagsCodegen

from embedding_service.rows.address_space import AddressSpace
from embedding_service.rows.base import STORED, Bytes, Ids, TableRows
from embedding_service.store.manifest import Part, Table
from embedding_service.store.parts import Pace

# What FBGEMM's n-bit kernel reads, and writes. It has no bfloat16 tables; torch converts those.
_STORED_TYPES = {"fp32": SparseType.FP32, "fp16": SparseType.FP16, "int8": SparseType.INT8, "int4": SparseType.INT4}
_OUTPUT_TYPES = {"fp32": SparseType.FP32, "fp16": SparseType.FP16, "bf16": SparseType.BF16}


class HostTable(TableRows):
    """Parts side by side in one `AddressSpace`, so that a row id is an index whatever part it lies in."""

    def __init__(self, table: Table, *, shared: bool = False) -> None:
        super().__init__(table, shared=shared)
        self._space = self._reserve()
        self._rows = self._space.tensor.view(table.rows, table.row_bytes)
        self._kernels: dict[str, IntNBitTableBatchedEmbeddingBagsCodegen] = {}

    def _reserve(self) -> AddressSpace:
        return AddressSpace(self.table.bytes)

    @abstractmethod
    def _place(self, part: Part, path: Path, offset: int, pace: Pace) -> None:
        """Make the part's bytes readable at `offset` of the address space, verified."""

    def _load(self, part: Part, path: Path, pace: Pace) -> None:
        offset = part.first_row * self.table.row_bytes
        try:
            self._place(part, path, offset, pace)
        except BaseException:
            self._space.unmap(offset, part.bytes)
            raise

    def _unload(self, part: Part) -> None:
        self._space.unmap(part.first_row * self.table.row_bytes, part.bytes)

    def _gather(self, ids: Ids, encoding: str, out: Bytes | None) -> Bytes:
        if encoding in (STORED, self.table.dtype):
            rows = np.empty((len(ids), self.table.row_bytes), np.uint8) if out is None else out
            torch.index_select(self._rows, 0, torch.from_numpy(ids), out=torch.from_numpy(rows))
            return rows
        rows = self._convert(torch.from_numpy(ids), encoding)
        if out is None:
            return rows
        out[:] = rows
        return out

    def _convert(self, indices: torch.Tensor, encoding: str) -> Bytes:
        if self.table.dtype not in _STORED_TYPES or not len(indices):
            values = self._decode(self._rows.index_select(0, indices), encoding)
        else:
            values = self._kernel(encoding)(indices, torch.tensor([0, len(indices)]))
        return values.view(torch.uint8).numpy()

    def _kernel(self, encoding: str) -> IntNBitTableBatchedEmbeddingBagsCodegen:
        if encoding not in self._kernels:
            self._kernels[encoding] = self._build_kernel(encoding)
        return self._kernels[encoding]

    def _build_kernel(self, encoding: str) -> IntNBitTableBatchedEmbeddingBagsCodegen:
        """FBGEMM's module around our memory: it is told that it has weights, and never allocates any."""
        table = self.table
        kernel = IntNBitTableBatchedEmbeddingBagsCodegen(
            [(table.name, table.rows, table.dim, _STORED_TYPES[table.dtype], EmbeddingLocation.HOST)],
            device="cpu",
            pooling_mode=PoolingMode.NONE,
            output_dtype=_OUTPUT_TYPES[encoding],
            bounds_check_mode=BoundsCheckMode.NONE,  # every id was checked before it came here
        )
        kernel.initialize_physical_weights_placements_and_offsets()
        kernel.initialize_logical_weights_placements_and_offsets()
        kernel.weights_host = self._space.tensor
        kernel.host_size = self._space.nbytes
        kernel.weight_initialized = True
        return kernel
