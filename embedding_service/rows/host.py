"""Rows in a CPU's memory: one linear range of addresses a table, read by FBGEMM's kernels."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from embedding_service.address_space import AddressSpace, take_rows
from embedding_service.formats import get_format
from embedding_service.formats.fbgemm import fbgemm_operator
from embedding_service.late import late
from embedding_service.rows.base import STORED, Bytes, Ids, TableRows
from embedding_service.store.manifest import Part, Table
from embedding_service.store.parts import Pace

if TYPE_CHECKING:
    import torch
else:
    torch = late("torch")

log = logging.getLogger(__name__)

# FBGEMM's numbers (SparseType) of what its n-bit kernel writes, and the widest row of each kind that it reads.
_OUTPUT_TYPES = {"fp32": 0, "fp16": 1, "bf16": 5}
_WIDEST = {0: "max_float32_D", 1: "max_float16_D", 2: "max_int8_D", 3: "max_int4_D", 4: "max_int2_D"}
_HOST, _NOT_POOLED = 3, 2  # its EmbeddingLocation and PoolingMode

# int64 [n] row ids, n > 0 -> Tensor [n, dim].
Kernel = Callable[["torch.Tensor"], "torch.Tensor"]


class HostTable(TableRows):
    """Parts side by side in one `AddressSpace`, so that a row id is an index in any part."""

    def __init__(self, table: Table, *, shared: bool = False) -> None:
        super().__init__(table, shared=shared)
        self._space = self._reserve()
        self._rows = self._space.tensor.view(table.rows, table.row_bytes)
        self._stored: Bytes = self._rows.numpy()
        self._kernels: dict[str, Kernel] = {}

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
            return take_rows(self._stored, ids, out)
        rows = self._convert(torch.from_numpy(ids), encoding)
        if out is None:
            return rows
        out[:] = rows
        return out

    def _convert(self, indices: torch.Tensor, encoding: str) -> Bytes:
        if encoding not in self._kernels:
            self._kernels[encoding] = self._build_kernel(encoding)
        values = self._kernels[encoding](indices) if len(indices) else self._decode_rows(indices, encoding)
        return values.view(torch.uint8).numpy()

    def _decode_rows(self, indices: torch.Tensor, encoding: str) -> torch.Tensor:
        return self._decode(self._rows.index_select(0, indices), encoding)

    def _build_kernel(self, encoding: str) -> Kernel:
        """FBGEMM's where it reads such rows. `formats` decodes others, to the same bits."""
        row_type = get_format(self.table.dtype).fbgemm_type
        if row_type is not None:
            try:
                return fbgemm_kernel(self._space.tensor, self.table.dim, row_type, _OUTPUT_TYPES[encoding])
            except (ModuleNotFoundError, AttributeError, RuntimeError) as error:  # another release, or none
                log.warning("FBGEMM's kernel cannot be used, torch decodes in its place: %s", error)
        return lambda indices: self._decode_rows(indices, encoding)


def fbgemm_kernel(memory: torch.Tensor, dim: int, row_type: int, output_type: int) -> Kernel:
    """FBGEMM's n-bit kernel for the rows in `memory`, uint8 [bytes], which is not copied.

    Called as its module IntNBitTableBatchedEmbeddingBagsCodegen calls it, for one table. The module itself
    takes 65 us more a call, and 0.6 s to import. Raises AttributeError or RuntimeError for a release without it.
    """
    lookup = fbgemm_operator("int_nbit_split_embedding_codegen_lookup_function", "fbgemm_gpu_tbe_inference.so")
    nothing = torch.empty(0, dtype=torch.uint8)
    table = {
        "dev_weights": memory,
        "uvm_weights": nothing,
        "weights_placements": torch.tensor([_HOST], dtype=torch.int32),
        "weights_offsets": torch.tensor([0]),
        "weights_tys": torch.tensor([row_type], dtype=torch.uint8),
        "D_offsets": torch.tensor([0, dim], dtype=torch.int32),
        "total_D": dim,
        **{name: dim if kind == row_type else 0 for kind, name in _WIDEST.items()},
        "pooling_mode": _NOT_POOLED,
        "indice_weights": None,
        "output_dtype": output_type,
        "row_alignment": 1,
    }

    def kernel(indices: torch.Tensor) -> torch.Tensor:
        values: torch.Tensor = lookup(indices=indices, offsets=torch.tensor([0, len(indices)]), **table)
        return values

    kernel(torch.zeros(0, dtype=torch.int64))  # takes none of the arguments it does not know
    return kernel
