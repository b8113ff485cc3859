"""What a lookup wants, and what becomes of its rows as they come in.

A `Lookup` names the rows. For the version of the model that is served it makes `Want`s, each different id once. A want
has a sink, which takes rows answer by answer. In the end the lookup makes tensors of what its sinks took.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from embedding_service.client.kept import MOST_ROWS, Found, Keeper, Kind
from embedding_service.client.near import NearRows
from embedding_service.formats import RowFormat, get_format
from embedding_service.formats.plain import plain_dtypes
from embedding_service.near.reader import Rows, SomeRows
from embedding_service.ngram import NgramHasher
from embedding_service.placement.routing import FEW_IDS, Ids, Model, Table, check_ids
from embedding_service.wire import embedding_pb2 as wire
from embedding_service.wire.lookup_codec import Bytes

# The format of rows whose values need no decoding, and the wire's name of it, by dtype.
PLAIN = {dtype: name for name, dtype in plain_dtypes().items()}
ENCODINGS = {
    torch.float32: wire.ROW_ENCODING_FLOAT32,
    torch.float16: wire.ROW_ENCODING_FLOAT16,
    torch.bfloat16: wire.ROW_ENCODING_BFLOAT16,
}
# Up to this many bytes, rows are used together, once all are there. Above it, work on an answer costs more than to
# begin it, and is done while other answers are on their way.
FEW_BYTES = 64 << 10
# Rows are asked for once if one in this many is a repetition. To spread them over their places costs a copy of all.
WORTH_SPREADING = 16


class Decoder(NamedTuple):
    """Makes values of rows in `row_format`: `dim` a row, as `dtype`, on `device`."""

    row_format: RowFormat
    dim: int
    dtype: torch.dtype
    device: torch.device

    def decode(self, rows: Bytes, inverse: npt.NDArray[Any] | None = None, out: Tensor | None = None) -> Tensor:
        """Rows uint8 [n, row_bytes] -> Tensor[n, dim], in `out` if given. With `inverse` [m]: those rows, [m, dim]."""
        if inverse is not None:
            rows = rows.take(inverse, axis=0)
        if out is None and self.device.type == "cpu":
            return self.row_format.decode_array(rows, self.dim, self.dtype)
        return self.row_format.decode(self.move(rows), self.dim, out, self.dtype)

    def move(self, array: npt.NDArray[Any]) -> Tensor:
        """An array as a tensor on the device. A copy to a GPU is from page-locked memory, and nobody waits for it."""
        tensor = torch.from_numpy(array)
        kind = self.device.type
        if kind == "cpu":
            return tensor
        return tensor.pin_memory().to(self.device, non_blocking=True) if kind == "cuda" else tensor.to(self.device)


@lru_cache(256)
def decoder(encoding: str, dim: int, dtype: torch.dtype, device: torch.device) -> Decoder:
    """The decoder of rows in that format. Raises InvalidRequest for an unknown one."""
    return Decoder(get_format(encoding), dim, dtype, device)


class Sink(ABC):
    """Takes the rows of a want's ids, each row once.

    Attributes:
        decodes: Split large requests, so that decoding overlaps transfer.
    """

    decodes = False

    @abstractmethod
    def put(self, positions: Ids | None, rows: Bytes) -> None:
        """Take uint8 [m, row_bytes], rows of the ids at these m positions, in any order. None: of all, in order."""


class StoredRows(Sink):
    """Keeps rows as they came. Rows that all come in one message stay in it.

    Attributes:
        rows: uint8 [count, row_bytes].
    """

    def __init__(self, count: int, row_bytes: int) -> None:
        self.rows: Bytes = np.empty((0, row_bytes), np.uint8)
        self._count = count

    def put(self, positions: Ids | None, rows: Bytes) -> None:
        """See `Sink`."""
        if positions is None:
            self.rows = rows
            return
        if len(self.rows) != self._count:
            self.rows = np.empty((self._count, rows.shape[1]), np.uint8)
        self.rows[_where(positions)] = rows


class DecodedRows(Sink):
    """Decodes answers while the next ones are on their way."""

    def __init__(self, count: int, decoder: Decoder) -> None:
        self._count = count
        self._decoder = decoder
        self._values: Tensor | None = None
        # Rows that need no decoding stay in their one message. A piece would be copied into its place.
        self.decodes = decoder.row_format.name != PLAIN.get(decoder.dtype) or decoder.device.type != "cpu"

    @property
    def values(self) -> Tensor:
        """Tensor[count, dim]."""
        return self._empty() if self._values is None else self._values

    def put(self, positions: Ids | None, rows: Bytes) -> None:
        """See `Sink`."""
        if positions is None:
            self._values = self._decoder.decode(rows)
            return
        if self._values is None:
            self._values = self._empty()
        where = _where(positions)
        if isinstance(where, slice):
            self._decoder.decode(rows, out=self._values[where])
        else:
            self._values.index_copy_(0, self._decoder.move(where), self._decoder.decode(rows))

    def _empty(self) -> Tensor:
        return torch.empty(self._count, self._decoder.dim, dtype=self._decoder.dtype, device=self._decoder.device)


def _where(positions: Ids) -> slice | Ids:
    """Positions, as a slice where they ascend and none is left out."""
    first, last = int(positions[0]), int(positions[-1])
    run = last - first + 1 == len(positions) and bool((positions[1:] > positions[:-1]).all())
    return slice(first, last + 1) if run else positions


class Want(NamedTuple):
    """Rows of one table: `ids` int64 [n], `encoding` of the answer and its bytes a row, and where they go."""

    table: Table
    ids: Ids
    encoding: int
    row_bytes: int
    sink: Sink


@dataclass
class Tally:
    """Rows that a client had, each once a lookup: read in place, and sent by shards. Threads may lose some."""

    near: int = 0
    wired: int = 0


class _Asked(NamedTuple):
    """A want, and what becomes of its rows.

    Attributes:
        want: Rows that are asked of shards.
        inverse: Where each stands among the ids that were given.
        found: Rows that were kept from earlier lookups.
    """

    want: Want
    decoder: Decoder
    inverse: Ids | None
    found: Found | None = None


class _Table(NamedTuple):
    """What becomes of one table's rows: those that are read in place, and what is asked for the others."""

    near: Rows | SomeRows | None
    decoder: Decoder
    asked: _Asked | None


@dataclass(kw_only=True, eq=False)
class Lookup(ABC):
    """Rows of one model, asked for once.

    Attributes:
        model: `name` or `name@version`.
        device: Where the tensors go.
        kept: Rows of earlier lookups, if they are kept.
        tally: Counts what was had.
        near: Reads rows in place, where this lookup may.
    """

    model: str
    dtype: torch.dtype
    device: torch.device
    kept: Keeper | None
    tally: Tally
    near: NearRows | None = None
    _began: float = field(default_factory=time.monotonic)
    _version: str = ""
    _tables: list[_Table] = field(default_factory=list)

    @abstractmethod
    def result(self) -> Tensor:
        """Once the sinks of the last `wants` have all rows."""

    def about(self) -> dict[str, str | int]:
        """What a span says of it."""
        return {"embedding.model": self.model}

    def sources(self) -> dict[str, str | int]:
        """What a span says of where its rows came from, each once. Only after `result`."""
        asked = [each.asked for each in self._tables if each.asked is not None]
        return {
            "embedding.version": self._version,
            "embedding.rows.near": sum(
                len(each.near.stored) for each in self._tables if each.near is not None and each.near.stored is not None
            ),
            "embedding.rows.wired": sum(len(each.want.ids) for each in asked),
            "embedding.rows.kept": sum(len(each.found.rows) for each in asked if each.found is not None),
        }

    @abstractmethod
    def _ids(self, model: Model) -> list[tuple[str, Ids]]:
        """Names of tables and row ids int64 [n]."""

    def wants(self, model: Model) -> list[Want]:
        """What is to be asked of this version's shards. Raises NotFound, OutOfRange.

        Called again for another version, it begins with new sinks, so versions are never mixed.
        """
        kept, tables = self.kept, []
        trusted = kept is not None and kept.trusts(model, self._began, pinned=self.model == model.full_name)
        for name, ids in self._ids(model):
            table = model.table(name)
            check_ids(ids, table.rows, f"{model.full_name}/{name}")
            near = self.near.read(model, table, ids) if self.near is not None else None
            asked = None
            if not isinstance(near, Rows):
                asked = self._ask(table, ids if near is None else np.delete(ids, near.positions))
                asked = asked if kept is None else _less_what_is_kept(asked, kept, model, trusted)
            tables.append(_Table(near, decoder(table.dtype, table.dim, self.dtype, self.device), asked))
        self._version, self._tables = model.full_name, tables
        return [each.asked.want for each in tables if each.asked is not None]

    def read_near(self) -> bool:
        """Read what is near and was not read yet. Returns whether all of it could be."""
        return all(table.near.read() for table in self._tables if isinstance(table.near, SomeRows))

    def _ask(self, table: Table, ids: Ids) -> _Asked:
        """Rows cross the wire as stored, or converted by the shard if that is fewer bytes.

        Rows of ids that repeat are spread while they are bytes. What they decode to is larger.
        """
        encoding, row_bytes, name = wire.ROW_ENCODING_STORED, table.row_bytes, table.dtype
        if table.dim * self.dtype.itemsize < row_bytes:
            encoding, row_bytes, name = ENCODINGS[self.dtype], table.dim * self.dtype.itemsize, PLAIN[self.dtype]
        unique, inverse = _once(ids)
        decodes = decoder(name, table.dim, self.dtype, self.device)
        as_bytes = self.kept is not None or inverse is not None or len(ids) * row_bytes <= FEW_BYTES
        sink = StoredRows(len(unique), row_bytes) if as_bytes else DecodedRows(len(ids), decodes)
        return _Asked(Want(table, unique, encoding, row_bytes, sink), decodes, inverse)

    def _tensors(self) -> list[Tensor]:
        """For each of `_ids` a Tensor[n, dim]."""
        wired = sum(len(each.asked.want.ids) for each in self._tables if each.asked is not None)
        self.tally.wired += wired
        if self.kept is not None and wired:
            self.kept.confirm(self._version, self._began)
        return [self._together(each) for each in self._tables]

    def _together(self, table: _Table) -> Tensor:
        """Rows that were read in place, and those that came."""
        if table.near is None:
            assert table.asked is not None
            return self._values(table.asked)
        assert table.near.stored is not None
        here = near_values(table.near.stored, table.decoder)
        self.tally.near += here.shape[0]
        if isinstance(table.near, Rows):
            return here
        assert table.asked is not None
        came = self._values(table.asked)
        rows = here.new_empty(len(here) + len(came), here.shape[1])
        there = np.ones(len(rows), np.bool_)
        there[table.near.positions] = False
        rows[table.decoder.move(~there)] = here
        rows[table.decoder.move(there)] = came
        return rows

    def _values(self, asked: _Asked) -> Tensor:
        sink = asked.want.sink
        if isinstance(sink, DecodedRows):
            return sink.values
        assert isinstance(sink, StoredRows)
        rows = sink.rows
        if asked.found is not None:
            assert self.kept is not None
            rows = self.kept.merge(asked.found, asked.want.ids, rows)
        return asked.decoder.decode(rows, asked.inverse)


@dataclass(kw_only=True, eq=False)
class RowLookup(Lookup):
    """Rows of one table by `ids` int64 [n], which were given in `shape`."""

    table: str
    ids: Ids
    shape: torch.Size

    def about(self) -> dict[str, str | int]:
        """See `Lookup`."""
        return {**super().about(), "embedding.table": self.table, "embedding.ids": len(self.ids)}

    def result(self) -> Tensor:
        """Tensor[*shape, dim]."""
        [rows] = self._tensors()
        return rows if len(self.shape) == 1 else rows.view(*self.shape, rows.shape[1])

    def _ids(self, model: Model) -> list[tuple[str, Ids]]:
        return [(self.table, self.ids)]


@dataclass(kw_only=True, eq=False)
class NgramLookup(Lookup):
    """The n-gram rows of tokens int64 [B, S] after a context [B, C]."""

    token_ids: Tensor
    context: Tensor | None
    hasher_of: Callable[[Model], NgramHasher]
    _shape: torch.Size = field(default_factory=torch.Size)

    def about(self) -> dict[str, str | int]:
        """See `Lookup`."""
        return {**super().about(), "embedding.tokens": self.token_ids.numel()}

    def result(self) -> Tensor:
        """Tensor[B, S, L, H, dim]."""
        batch, length, tables, heads = self._shape
        rows = self._tensors()
        if tables == 1:
            return rows[0].view(batch, length, 1, heads, rows[0].shape[1])
        return torch.stack([table.view(batch, length, heads, table.shape[1]) for table in rows], 2)

    def _ids(self, model: Model) -> list[tuple[str, Ids]]:
        hasher = self.hasher_of(model)
        row_ids = hasher.row_ids(self.token_ids, self.context)
        self._shape = row_ids.shape
        return [
            (table.name, row_ids[:, :, index].reshape(-1).cpu().numpy()) for index, table in enumerate(hasher.tables)
        ]


def near_values(stored: Bytes, decoder: Decoder) -> Tensor:
    """Stored rows uint8 [n, row_bytes] -> Tensor[n, dim], the same bits that would have come over the wire."""
    if decoder.row_format.name == "fp32" and decoder.dtype.itemsize < 4:
        values = stored.view(np.float32)
        values += 0.0  # a shard that narrows them makes 0.0 of -0.0, as FBGEMM does
    return decoder.decode(stored)


def _less_what_is_kept(asked: _Asked, kept: Keeper, model: Model, trusted: bool) -> _Asked:
    """Ask for the rest only."""
    want = asked.want
    if want.table.rows > MOST_ROWS:
        return asked
    kind = Kind(model.full_name, want.table.name, want.encoding, want.row_bytes)
    found = kept.find(kind, want.ids, trusted)
    if not len(found.rows):
        return asked._replace(found=found)
    ids = want.ids[~found.here]
    return asked._replace(want=want._replace(ids=ids, sink=StoredRows(len(ids), want.row_bytes)), found=found)


def _once(ids: Ids) -> tuple[Ids, Ids | None]:
    """Each different id, and where each of `ids` is among them. None if nearly all differ: the ids stay as they are."""
    if len(ids) <= FEW_IDS:
        repeated = len(ids) - len(set(ids.tolist()))
    else:
        ordered = np.sort(ids.astype(np.uint32))  # half the bytes. The few that look alike then do no harm
        repeated = int(np.count_nonzero(ordered[1:] == ordered[:-1]))
    if repeated * WORTH_SPREADING < len(ids):
        return ids, None
    unique, inverse = np.unique(ids, return_inverse=True)
    return unique, inverse
