"""Reading rows of a version, whole or with a base, as they are stored. `diff` compares two versions."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
import numpy.typing as npt

from embedding_service.errors import InvalidRequest, StoreError
from embedding_service.formats import get_format
from embedding_service.late import late
from embedding_service.store.manifest import Manifest, Part, Table
from embedding_service.store.overlays import Ids, Replaced, read_overlay
from embedding_service.store.parts import part_layout, verify
from embedding_service.store.store import Store

if TYPE_CHECKING:
    import torch
else:
    torch = late("torch")

# Bytes of rows, decoded, that are compared at a time.
_CHUNK_BYTES = 4 << 20
# Ids of rows that differ, of which the first ones are named.
_NAMED = 10


@contextmanager
def fetched(store: Store, fetch: Callable[[Path], Path]) -> Iterator[Path]:
    """A file of the store as a local path: its own in a local store, else a copy that is there for the while."""
    if store.is_local:
        yield fetch(Path())
        return
    with tempfile.TemporaryDirectory(prefix="embedding-service-") as cache:
        yield fetch(Path(cache))


def replaced_rows(store: Store, manifest: Manifest, table: Table, part: Part) -> Replaced:
    """The rows of a part that a version does not have from its base."""
    overlay = manifest.overlays(table.name).get(part.index)
    if overlay is None:
        return Replaced.none(table.row_bytes)
    with fetched(store, lambda cache: store.fetch_overlay(manifest, table, overlay, cache)) as path:
        return read_overlay(path, table, overlay)


@contextmanager
def part_rows(store: Store, manifest: Manifest, table: Table, part: Part) -> Iterator[npt.NDArray[np.uint8]]:
    """The rows of a part's file, uint8 [rows, row_bytes], read from the file when they are looked at.

    Those that the version replaces are not among them.
    """
    with fetched(store, lambda cache: store.fetch_part(manifest, part, cache)) as path:
        yield np.memmap(path, np.uint8, "r", part_layout(path).offset, (part.rows, table.row_bytes))


def some_rows(store: Store, manifest: Manifest, table: Table, part: Part, places: Sequence[int]) -> Replaced:
    """Rows of a version at ascending places of a part. Of a remote store nothing else is read, but for overlays.

    Raises StoreError if the file is too short, and what the filesystem raises.
    """
    location, size = store.location(*manifest.root, part.file), table.row_bytes
    first = store.filesystem.size(location) - part.bytes  # the rows are the end of the file
    found = [store.filesystem.cat_file(location, first + at * size, first + (at + 1) * size) for at in places]
    if first < 0 or any(len(row) != size for row in found):
        raise StoreError(f"{location} is too short for {part.rows:,} rows")
    rows = np.frombuffer(b"".join(found), np.uint8).reshape(len(places), size)
    ids = part.first_row + np.array(places, np.int64)
    replaced = replaced_rows(store, manifest, table, part)
    hit = np.isin(replaced.ids, ids, assume_unique=True)
    return Replaced(replaced.ids[hit], replaced.rows[hit]).over(Replaced(ids, rows))


def check_part(store: Store, manifest: Manifest, part: Part) -> None:
    """Read a whole part's file. Raises CorruptPart unless it is what the manifest says."""
    with fetched(store, lambda cache: store.fetch_part(manifest, part, cache)) as path:
        verify(path, part)


@dataclass
class TableDiff:
    """How two versions of a table differ.

    Attributes:
        table: Its name.
        rows: Of the table.
        differ: Rows that differ.
        parts: For each part of the first version how many rows differ, where any do.
        first_ids: Of the first rows that differ.
        largest: The largest distance of two values at the same place, and the row's id.
        distance: The mean over rows that differ of their distances (of all values together, Euclidean).
        length: The mean length of those rows in the first version, to compare it with.
    """

    table: str
    rows: int
    differ: int = 0
    parts: dict[int, int] = field(default_factory=dict)
    first_ids: list[int] = field(default_factory=list)
    largest: float = 0.0
    largest_id: int | None = None
    distance: float = 0.0
    length: float = 0.0


def diff(store: str | Path | Store, first: str, second: str) -> list[TableDiff]:
    """How two versions, each NAME@VERSION or NAME for its newest one, differ: table by table.

    Where both have one base, only rows that either replaces are read. Else all are. Raises NotFound naming what there
    is, and InvalidRequest for versions whose tables are not of the same shapes.
    """
    store = store if isinstance(store, Store) else Store(store)
    one, other = (store.manifest(name.partition("@")[0], name.partition("@")[2] or None) for name in (first, second))
    shapes = [[(table.name, table.rows, table.dim) for table in each.tables] for each in (one, other)]
    if shapes[0] != shapes[1]:
        raise InvalidRequest(
            f"{one.full_name} and {other.full_name} cannot be compared: their tables are {shapes[0]} and {shapes[1]}"
        )
    found = []
    for table in one.tables:
        with _Reader(store, one, table.name) as ours, _Reader(store, other, table.name) as theirs:
            found.append(_diff_table(ours, theirs))
    return found


class _Reader:
    """Rows of one version's table by id, part after part.

    The part that was read last stays open: a remote store's part is fetched once for all ids that fall in it.
    """

    def __init__(self, store: Store, manifest: Manifest, table: str) -> None:
        self.root = manifest.root
        self.table = manifest.table(table)
        self._store, self._manifest = store, manifest
        self._replaced: tuple[int, Replaced] | None = None
        self._open: tuple[int, npt.NDArray[np.uint8]] | None = None
        self._part = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._part.close()

    def replaced(self, part: int) -> Replaced:
        """Of a part."""
        if self._replaced is None or self._replaced[0] != part:
            found = replaced_rows(self._store, self._manifest, self.table, self.table.parts[part])
            self._replaced = part, found
        return self._replaced[1]

    def rows(self, ids: Ids) -> torch.Tensor:
        """Stored rows of ascending ids: uint8 [n, row_bytes]."""
        stored = np.empty((len(ids), self.table.row_bytes), np.uint8)
        parts = ids // self.table.rows_per_part
        for index in np.unique(parts).tolist():
            here = np.flatnonzero(parts == index)
            stored[here] = self._rows_of(index)[ids[here] - self.table.parts[index].first_row]
            replaced = self.replaced(index)
            if len(replaced.ids):
                places = np.minimum(np.searchsorted(replaced.ids, ids[here]), len(replaced.ids) - 1)
                hit = replaced.ids[places] == ids[here]
                stored[here[hit]] = replaced.rows[places[hit]]
        return torch.from_numpy(stored)

    def _rows_of(self, part: int) -> npt.NDArray[np.uint8]:
        """What `part_rows` gives."""
        if self._open is None or self._open[0] != part:
            self._part.close()
            rows = part_rows(self._store, self._manifest, self.table, self.table.parts[part])
            self._open = part, self._part.enter_context(rows)
        return self._open[1]

    def values(self, stored: torch.Tensor) -> torch.Tensor:
        """Float32 [n, dim]."""
        return get_format(self.table.dtype).decode(stored, self.table.dim)


def _diff_table(one: _Reader, other: _Reader) -> TableDiff:
    found = TableDiff(one.table.name, one.table.rows)
    squares = 0.0
    for ids in _ids_to_compare(one, other):
        ours, theirs = one.rows(ids), other.rows(ids)
        if one.table.dtype == other.table.dtype:
            differ = (ours != theirs).any(1)
            ids, ours, theirs = ids[differ.numpy()], ours[differ], theirs[differ]
        before, after = one.values(ours), other.values(theirs)
        differ = (before != after).any(1)
        ids, before, after = ids[differ.numpy()], before[differ], after[differ]
        if not len(ids):
            continue
        distance = (after - before).abs()
        largest = distance.amax(1)
        if float(largest.max()) > found.largest:
            found.largest, found.largest_id = float(largest.max()), int(ids[int(largest.argmax())])
        found.differ += len(ids)
        found.first_ids += ids[: _NAMED - len(found.first_ids)].tolist()
        for part, count in zip(*np.unique(ids // one.table.rows_per_part, return_counts=True), strict=True):
            found.parts[int(part)] = found.parts.get(int(part), 0) + int(count)
        squares += float(torch.linalg.vector_norm(after - before, dim=1).double().sum())
        found.length += float(torch.linalg.vector_norm(before, dim=1).double().sum())
    found.distance, found.length = squares / max(found.differ, 1), found.length / max(found.differ, 1)
    return found


def _ids_to_compare(one: _Reader, other: _Reader) -> Iterator[Ids]:
    """Ascending ids of rows that may differ, some at a time."""
    step = max(1, _CHUNK_BYTES // (4 * one.table.dim))
    for part in one.table.parts:
        if one.root == other.root:
            ids = np.union1d(one.replaced(part.index).ids, other.replaced(part.index).ids)
        else:
            ids = np.arange(part.first_row, part.first_row + part.rows)
        for number in range(math.ceil(len(ids) / step)):
            yield ids[number * step : (number + 1) * step]
