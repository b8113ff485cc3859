"""Where rows go as they come in: answers arrive one by one, and what can be done with one is done at once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from embedding_service.formats import get_format
from embedding_service.formats.plain import plain_dtypes
from embedding_service.placement.routing import Ids
from embedding_service.wire.rows import Bytes

# How values of a dtype lie in a row that needs no decoding.
PLAIN = {dtype: name for name, dtype in plain_dtypes().items()}


class Sink(ABC):
    """Takes the rows of so many ids, each row once.

    Attributes:
        works: Much is done with each answer, so that many rows had better come in pieces.
    """

    works = False

    @abstractmethod
    def put(self, positions: Ids | None, rows: Bytes) -> None:
        """Take uint8 [m, row_bytes], rows of the ids at these m positions, in any order; None: of all, in theirs."""


class StoredRows(Sink):
    """Keeps them as they came; rows that come all in one message stay in it.

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


class Decoder(NamedTuple):
    """Makes values of rows in `encoding`: `dim` a row, as `dtype`, on `device`."""

    encoding: str
    dim: int
    dtype: torch.dtype
    device: torch.device

    def decode(self, rows: Bytes, inverse: npt.NDArray[Any] | None = None, out: Tensor | None = None) -> Tensor:
        """Rows uint8 [n, row_bytes] -> Tensor[n, dim], in `out` where given; those of `inverse` [m]: [m, dim]."""
        stored = self.move(rows if inverse is None else rows.take(inverse, axis=0))
        return get_format(self.encoding).decode(stored, self.dim, out, self.dtype)

    def move(self, array: npt.NDArray[Any]) -> Tensor:
        """An array as a tensor on the device; to a GPU through page-locked memory, without waiting for the copy."""
        tensor = torch.from_numpy(array)
        kind = self.device.type
        if kind == "cpu":
            return tensor
        return tensor.pin_memory().to(self.device, non_blocking=True) if kind == "cuda" else tensor.to(self.device)


class DecodedRows(Sink):
    """Decodes answers while the next ones are on their way."""

    def __init__(self, count: int, decoder: Decoder) -> None:
        self._count = count
        self._decoder = decoder
        self._values: Tensor | None = None
        # What need not be decoded stays in its one message; a piece would be copied into its place.
        self.works = decoder.encoding != PLAIN.get(decoder.dtype) or decoder.device.type != "cpu"

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
