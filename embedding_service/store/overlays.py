"""Overlays on disk: the rows of a version that are not its base's, one file for each part that has any.

A file is a safetensors file of two tensors. "ids" are ascending row ids of the table, int64 [n]. "rows" are their rows
as they are stored, in the same order, and begin on a page.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from embedding_service.errors import BadTensorFile, CorruptPart
from embedding_service.formats import get_format
from embedding_service.late import late
from embedding_service.store.manifest import ID_BYTES, Overlay, Part, Table, overlay_file
from embedding_service.store.parts import Pace, RowsWriter, at_once, read_hashed
from embedding_service.tensorfile import PAGE_BYTES, header_bytes, read_spans

if TYPE_CHECKING:
    import torch
else:
    torch = late("torch")

Ids = npt.NDArray[np.int64]
IDS, ROWS = "ids", "rows"


class Replaced(NamedTuple):
    """Rows of a table and what they are: ids ascending int64 [n], and stored rows uint8 [n, row_bytes]."""

    ids: Ids
    rows: npt.NDArray[np.uint8]

    @classmethod
    def none(cls, row_bytes: int) -> Replaced:
        """No rows."""
        return cls(np.empty(0, np.int64), np.empty((0, row_bytes), np.uint8))

    def over(self, below: Replaced) -> Replaced:
        """These, and those of `below` whose ids are not among them."""
        others = ~np.isin(below.ids, self.ids, assume_unique=True)
        ids = np.concatenate([self.ids, below.ids[others]])
        order = np.argsort(ids)
        return Replaced(ids[order], np.concatenate([self.rows, below.rows[others]])[order])


def write_overlay(folder: Path, table: Table, part: Part, replaced: Replaced) -> Overlay:
    """Write the rows that replace some of a part's into a version's folder. Returns the manifest's entry for them.

    replaced: at least one row, all of them within the part.
    """
    row_format, count = get_format(table.dtype), len(replaced.ids)
    tensors = {
        IDS: ("I64", (count,)),
        ROWS: (row_format.tensor_dtype, row_format.part_shape(count, table.dim)),
    }
    file = overlay_file(table.name, part.index)
    with RowsWriter(folder / file, header_bytes(tensors, on_page=ROWS)) as writer:
        writer.write(torch.from_numpy(np.ascontiguousarray(replaced.ids)))
        writer.write(torch.from_numpy(np.ascontiguousarray(replaced.rows)))
        checksum = writer.close()
    nbytes = count * (ID_BYTES + table.row_bytes)
    return Overlay(part=part.index, rows=count, file=file, bytes=nbytes, checksum=checksum)


def rows_offset(path: Path, overlay: Overlay) -> int:
    """Where the rows begin in an overlay's file: on a page. Raises CorruptPart unless it looks like that overlay."""
    try:
        spans = read_spans(path)
    except BadTensorFile as error:
        raise CorruptPart(f"{error}: publish the version again") from error
    if list(spans) != [IDS, ROWS] or (spans[IDS].dtype, spans[IDS].shape) != ("I64", (overlay.rows,)):
        raise CorruptPart(f"{path} is no overlay of {overlay.rows:,} rows: publish the version again")
    if spans[IDS].bytes + spans[ROWS].bytes != overlay.bytes or spans[ROWS].offset % PAGE_BYTES:
        raise CorruptPart(f"{path} is no overlay of {overlay.bytes:,} bytes: publish the version again")
    return spans[ROWS].offset


def verify_overlay(path: Path, overlay: Overlay) -> None:
    """Read all of an overlay's file. Raises CorruptPart unless it is what was written."""
    _read(path, overlay, at_once)


def _read(path: Path, overlay: Overlay, pace: Pace) -> npt.NDArray[np.uint8]:
    """The bytes of ids and rows. Raises CorruptPart."""
    offset = rows_offset(path, overlay) - overlay.rows * ID_BYTES
    data = np.empty(overlay.bytes, np.uint8)
    view = data.data
    if (got := read_hashed(path, offset, overlay.bytes, lambda begin, end: view[begin:end], pace)) != overlay.checksum:
        raise CorruptPart(f"{path} is corrupt: expected {overlay.checksum}, got {got}. Publish the version again")
    return data


def read_overlay(path: Path, table: Table, overlay: Overlay, pace: Pace = at_once) -> Replaced:
    """The ids and rows of an overlay's file. Raises CorruptPart unless they are what the manifest says."""
    data = _read(path, overlay, pace)
    ids = data[: overlay.rows * ID_BYTES].view(np.int64)
    part = table.parts[overlay.part]
    if ids[0] < part.first_row or ids[-1] >= part.first_row + part.rows or (np.diff(ids) <= 0).any():
        raise CorruptPart(f"{path}: its ids are not ascending ids of part {overlay.part}: publish the version again")
    return Replaced(ids, data[overlay.rows * ID_BYTES :].reshape(overlay.rows, table.row_bytes))
