"""Tiers `cuda` and `cuda-cached`: rows in a GPU's memory, or in host memory with a cache of rows in the GPU's.

Rows are gathered as stored bytes and decoded on the device by `formats`, in float32 as FBGEMM's CPU kernel does: the
bytes of a row are the same whichever copy of it answers. FBGEMM's CUDA kernel for n-bit tables computes
code * scale + bias in half precision, so its rows would differ from a CPU shard's and from what a client decodes. It
also wants rows padded to 16 bytes; in `cuda` the stored bytes, unpadded, are the only copy (an int4 row of 256 takes
132 bytes, not 144).

FBGEMM keeps the cache of `cuda-cached`: its set-associative LRU moves bytes and does not ask what they mean. Its module
for managed caching is not used: it allocates a whole table, where parts come and go, and decodes in half precision too.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from embedding_service.address_space import round_up
from embedding_service.errors import InvalidRequest, NoRoom, NotFound
from embedding_service.late import late
from embedding_service.memory import available_memory
from embedding_service.rows.base import STORED, Bytes, Ids, LiesIn, TableRows
from embedding_service.rows.pool import Pool
from embedding_service.store.manifest import Part, Table
from embedding_service.store.parts import Pace, read_into

if TYPE_CHECKING:
    import torch
else:
    torch = late("torch")

# FBGEMM's cache copies rows 16 bytes at a time, and has 32 ways.
_ALIGNMENT, _WAYS = 16, 32
# FBGEMM's code for tables of 8-bit codes: a row is 4 bytes and one a value. It only counts bytes here.
_INT8 = 2
_HEADER_BYTES = 4


def require_cuda() -> None:
    """Raise InvalidRequest, with the remedy, unless there is a CUDA device that torch can use."""
    if torch.version.cuda is None:
        raise InvalidRequest(
            "tiers cuda and cuda-cached need a torch with CUDA, and this one has none: "
            "pip install 'embedding-service[gpu]', or use --tier ram or mmap"
        )
    if not torch.cuda.is_available():
        raise InvalidRequest(
            "tiers cuda and cuda-cached need a CUDA device and none is visible: look at nvidia-smi and "
            "CUDA_VISIBLE_DEVICES, or use --tier ram or mmap"
        )


def require_fbgemm_cuda() -> None:
    """Raise InvalidRequest, with the remedy, unless FBGEMM has its CUDA kernels."""
    import fbgemm_gpu.split_table_batched_embeddings_ops_inference  # noqa: F401 (registers the operators)

    if not torch._C._dispatch_has_kernel_for_dispatch_key("fbgemm::lru_cache_populate_byte", "CUDA"):
        raise InvalidRequest(
            "tier cuda-cached needs FBGEMM's CUDA build and this is the CPU one: "
            "install fbgemm-gpu in place of fbgemm-gpu-cpu, or use --tier cuda"
        )


def free_memory() -> int:
    """Free bytes of the device. Raises InvalidRequest where there is none."""
    require_cuda()
    return torch.cuda.mem_get_info()[0]


class CudaTable(TableRows):
    """Parts in device memory, in one `Pool` for all tables of the process. `prepare` comes first.

    Each thread that gathers has a stream and a page-locked buffer of its own, so that their copies overlap. Parts come
    in on another stream, and are held only once that is done; what a gather reads of a part that goes is not used.

    Args:
        pool: Where parts lie, in place of the process's; on any device, so that a machine without GPU can test it.
    """

    device = "cuda"
    lies_in = LiesIn.DEVICE
    _shared_pool: ClassVar[Pool | None] = None

    def __init__(self, table: Table, *, shared: bool = False, pool: Pool | None = None) -> None:
        super().__init__(table, shared=shared)
        pool = pool or self._shared_pool
        if pool is None:
            raise InvalidRequest(f"{type(self).__name__}.prepare was not called: there is no memory for rows")
        self._pool = pool
        self._on = pool.memory.device
        self._row_bytes = self._stride(table.row_bytes)
        self._rows = pool.rows(self._row_bytes)
        self._first = np.zeros(len(table.parts), np.int64)  # the pool's row of the part's row 0, less its id
        self._places: dict[int, int] = {}
        self._lanes = threading.local()
        self._loading = torch.cuda.Stream(self._on) if self._on.type == "cuda" else None

    @classmethod
    def check_machine(cls) -> None:
        """See `require_cuda`."""
        require_cuda()

    @classmethod
    def default_limit(cls, store: str, cache: Path) -> int:
        """80 % of what is free on the GPU. Raises InvalidRequest where there is none."""
        return free_memory() * 8 // 10

    @classmethod
    def prepare(cls, memory_limit: int) -> None:
        """Take the memory that parts will lie in. Raises InvalidRequest where there is none."""
        require_cuda()
        try:
            cls._shared_pool = Pool(torch.empty(memory_limit, dtype=torch.uint8, device="cuda"))
        except torch.OutOfMemoryError as error:
            raise InvalidRequest(
                f"the GPU has no {memory_limit:,} bytes free ({error}): lower --memory, or see what else runs on it"
            ) from error

    @staticmethod
    def _stride(row_bytes: int) -> int:
        """Bytes from one row to the next."""
        return row_bytes

    def _load(self, part: Part, path: Path, pace: Pace) -> None:
        place = self._pool.take(part.rows * self._row_bytes, self._row_bytes)
        try:
            staged = self._staging(part.bytes)
            read_into(path, part, staged, pace)
            self._move_in(staged.view(part.rows, self.table.row_bytes), place)
        except BaseException:
            self._pool.give_back(place)
            raise
        self._first[part.index] = place // self._row_bytes - part.first_row
        self._places[part.index] = place

    def _staging(self, nbytes: int) -> torch.Tensor:
        """Host memory that the device copies from, uint8 [nbytes]. Raises NoRoom."""
        try:
            return torch.empty(nbytes, dtype=torch.uint8, pin_memory=self._loading is not None)
        except RuntimeError as error:  # CUDA's own: not torch.OutOfMemoryError
            raise NoRoom(f"no {nbytes:,} bytes of host memory to lock for a part: {error}") from error

    def _move_in(self, staged: torch.Tensor, place: int) -> None:
        """Copy rows uint8 [n, row_bytes] to `place`; returns when they are there."""
        target = self._pool.memory[place : place + len(staged) * self._row_bytes].view(len(staged), self._row_bytes)
        with torch.cuda.stream(self._loading):  # None: where there is no GPU
            target[:, : self.table.row_bytes].copy_(staged, non_blocking=True)
        if self._loading:
            self._loading.synchronize()

    def _unload(self, part: Part) -> None:
        # `_first` stays: a gather that is under way then reads what is there now, and does not use it.
        self._pool.give_back(self._places.pop(part.index))

    def _gather(self, ids: Ids, encoding: str, out: Bytes | None) -> Bytes:
        where = torch.from_numpy(self._first[ids // self.table.rows_per_part] + ids)
        lane = self._lane()
        with torch.cuda.stream(lane.stream):
            stored = self._select(where.to(self._on)).view(torch.uint8).view(len(ids), self._row_bytes)
            return lane.fetch(self._encode(stored[:, : self.table.row_bytes], encoding), out)

    def _select(self, where: torch.Tensor) -> torch.Tensor:
        """The pool's rows `where`, int64 [n], as int [n, words]."""
        return self._rows.index_select(0, where)

    def _encode(self, stored: torch.Tensor, encoding: str) -> torch.Tensor:
        """Stored rows uint8 [n, row_bytes] -> uint8 [n, bytes of a row in `encoding`]."""
        if encoding in (STORED, self.table.dtype):
            return stored
        return self._decode(stored, encoding).view(torch.uint8)

    def _lane(self) -> _Lane:
        if not hasattr(self._lanes, "lane"):
            self._lanes.lane = _Lane(self._on)
        return self._lanes.lane


class _Lane:
    """One thread's stream, and its page-locked buffer for rows on their way to the host; no stream without a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def fetch(self, rows: torch.Tensor, out: Bytes | None) -> Bytes:
        """uint8 [n, bytes] on the device -> the same in `out`, or in new memory. Waits for this lane only."""
        if out is None:
            out = np.empty(tuple(rows.shape), np.uint8)
        if self.stream is None:
            out[:] = rows.numpy()
            return out
        if self._buffer.numel() < rows.numel():
            self._buffer = torch.empty(rows.numel(), dtype=torch.uint8, pin_memory=True)
        here = self._buffer[: rows.numel()].view(rows.shape)
        here.copy_(rows.contiguous(), non_blocking=True)
        self.stream.synchronize()
        out[:] = here.numpy()
        return out


class CudaCachedTable(CudaTable):
    """Parts in page-locked host memory that the GPU reads over the bus, and rows that were asked for in its own memory.

    Gathers take turns: each changes the cache. Rows are padded to 16 bytes, as FBGEMM's cache copies them.
    """

    def __init__(
        self, table: Table, *, shared: bool = False, pool: Pool | None = None, cache: RowCache | None = None
    ) -> None:
        super().__init__(table, shared=shared, pool=pool)
        # Two models, or two versions of one, have a table each; what is left is for streams and batches.
        try:
            self._cache = cache or FbgemmRowCache(self._pool.memory, self._row_bytes, free_memory() * 2 // 5)
        except torch.OutOfMemoryError as error:
            raise NoRoom(f"no room for a cache of table {table.name} on the GPU: {error}") from error
        self._turn = threading.Lock()
        self._mapped = np.zeros(len(table.parts), np.bool_)
        self._one_lane = _Lane(self._on)

    lies_in = LiesIn.HOST

    @classmethod
    def default_limit(cls, store: str, cache: Path) -> int:
        """60 % of the host memory that is available: more is locked than offered, for rows are padded."""
        return available_memory() * 6 // 10

    @classmethod
    def prepare(cls, memory_limit: int) -> None:
        """Take the host memory that parts will lie in. Raises InvalidRequest where there is none, or no GPU."""
        require_cuda()
        require_fbgemm_cuda()
        # Padding adds at most a seventh to rows of 105 bytes and more; smaller ones may find no room and say so.
        like = torch.empty(0, dtype=torch.uint8, device="cuda")
        try:
            memory = torch.ops.fbgemm.new_unified_tensor(like, [memory_limit * 8 // 7], True)
        except RuntimeError as error:
            raise InvalidRequest(
                f"no {memory_limit:,} bytes of host memory to lock ({error}): lower --memory"
            ) from error
        cls._shared_pool = Pool(memory)

    @staticmethod
    def _stride(row_bytes: int) -> int:
        return round_up(row_bytes, _ALIGNMENT)

    def _load(self, part: Part, path: Path, pace: Pace) -> None:
        super()._load(part, path, pace)
        with self._turn:
            # Rows of what lay here before may be in the cache. Nobody can add any: its part is not mapped.
            self._cache.forget(int(self._first[part.index]) + part.first_row, part.rows)
            self._mapped[part.index] = True

    def _unload(self, part: Part) -> None:
        with self._turn:
            self._mapped[part.index] = False
        super()._unload(part)

    def _gather(self, ids: Ids, encoding: str, out: Bytes | None) -> Bytes:
        with self._turn:
            if not self._mapped[ids // self.table.rows_per_part].all():
                raise NotFound(f"a part of the rows asked of {self.table.name} is not held here")
            return super()._gather(ids, encoding, out)

    def _lane(self) -> _Lane:
        return self._one_lane

    def _select(self, where: torch.Tensor) -> torch.Tensor:
        if not len(where):
            return self._rows.index_select(0, where)
        found = self._cache.find(where).long()
        rows = self._cache.rows.view(self._rows.dtype).index_select(0, found.clamp_min(0))
        missing = (found < 0).nonzero().flatten()  # sets that were full of this batch's rows
        if len(missing):
            rows[missing] = self._rows.index_select(0, where[missing])
        return rows


class RowCache:
    """Copies of some rows of a pool.

    Attributes:
        rows: uint8 [places, row_bytes].
    """

    rows: torch.Tensor

    def find(self, where: torch.Tensor) -> torch.Tensor:
        """Take rows int64 [n] of the pool in as far as there is room; their places, int32 [n], -1 for no room."""
        raise NotImplementedError

    def forget(self, first: int, count: int) -> None:
        """The pool's rows [first, first + count) have changed."""
        raise NotImplementedError


class FbgemmRowCache(RowCache):
    """FBGEMM's 32-way LRU over all rows of `memory` (uint8, readable by the device), in `nbytes` of device memory.

    FBGEMM wants 4 bytes more for each row of `memory`, cached or not: which table it belongs to.
    """

    def __init__(self, memory: torch.Tensor, row_bytes: int, nbytes: int) -> None:
        import fbgemm_gpu.split_table_batched_embeddings_ops_inference  # noqa: F401 (registers the operators)

        pool_rows = len(memory) // row_bytes
        sets = max(1, min(nbytes // (_WAYS * row_bytes), -(-pool_rows // _WAYS)))
        place: dict[str, Any] = {"device": memory.device}
        self.rows = torch.empty(sets * _WAYS, row_bytes, dtype=torch.uint8, **place)
        self._memory, self._pool_rows = memory, pool_rows
        self._state = torch.full((sets, _WAYS), -1, dtype=torch.int64, **place)
        self._used = torch.zeros(sets, _WAYS, dtype=torch.int64, **place)
        self._time = 0
        # The pool as FBGEMM sees it: one table, whose index is that of every row.
        self._sizes = torch.tensor([0, pool_rows], dtype=torch.int64, **place)
        self._table_of = torch.zeros(pool_rows, dtype=torch.int32, **place)
        self._offsets = torch.zeros(1, dtype=torch.int64, **place)
        self._types = torch.full((1,), _INT8, dtype=torch.uint8, **place)
        self._dims = torch.tensor([0, row_bytes - _HEADER_BYTES], dtype=torch.int32, **place)

    def find(self, where: torch.Tensor) -> torch.Tensor:
        """Take rows int64 [n] of the pool in as far as there is room; their places, int32 [n], -1 for no room."""
        self._time += 1
        torch.ops.fbgemm.lru_cache_populate_byte(
            self._memory,
            self._sizes,
            self._pool_rows,
            self._table_of,
            self._offsets,
            self._types,
            self._dims,
            where,
            self._state,
            self.rows,
            self._time,
            self._used,
            _ALIGNMENT,
        )
        return torch.ops.fbgemm.lxu_cache_lookup(where, self._state, self._pool_rows)

    def forget(self, first: int, count: int) -> None:
        """The pool's rows [first, first + count) have changed."""
        self._state.masked_fill_((self._state >= first) & (self._state < first + count), -1)
        if self._state.is_cuda:
            torch.cuda.synchronize()  # before another stream looks
