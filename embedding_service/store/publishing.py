"""Publishing rows: a version that is its base but for some rows. `rollback` publishes what a version before was.

A version's base is always a whole version. Rows published over a version with a base are merged with the rows that it
replaces, and keep its base. So a row is found in two places at most.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import xxhash

from embedding_service.errors import ImportRefused, InvalidRequest, NotFound, OutOfRange, StoreError, UnencodableRow
from embedding_service.foreign import shown
from embedding_service.formats import get_format
from embedding_service.formats.base import check_finite
from embedding_service.store.draft import Draft, NoRows, explained_write_errors, finish_published, open_draft
from embedding_service.store.manifest import Base, Manifest, Overlay, Part, Provenance, Table, overlay_file
from embedding_service.store.overlays import Replaced, write_overlay
from embedding_service.store.reading import replaced_rows
from embedding_service.store.store import Store, natural_order, next_version
from embedding_service.tensorfile import PAGE_BYTES, read_spans

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
_ID_DTYPES = {"I64": "<i8", "I32": "<i4", "U32": "<u4"}
# Rows that are encoded at a time.
_CHUNK_ROWS = 1 << 14


def publish_rows(
    store: str | Path | Store, base: str, rows: str | Path, *, name: str | None = None, version: str | None = None
) -> Manifest:
    """Publish a version that has the rows of a safetensors file in place of its base's. Returns its manifest.

    The file has two tensors for each table that is changed. TABLE.ids are row ids in any order, each once: int64 [n].
    TABLE.rows are their rows: float [n, dim], or uint8 [n, row_bytes] as the base stores rows. All is checked before
    anything is written, and nothing can be seen before all is there.

    base: NAME@VERSION, or NAME for its newest version. That is still the newest one when its rows are published over.
    name: the model that gets the version. None: the base's. Another name, as NAME+legal, is served beside it.
    version: None: one that sorts last.
    Raises InvalidRequest, NotFound, OutOfRange, and UnencodableRow for what is wrong with the file. Raises
    ImportRefused if the version is there already, or a newer one than NAME's newest was published meanwhile. Raises
    StoreError if reading or writing failed midway.
    """
    store = store if isinstance(store, Store) else Store(store)
    below = find_version(store, base)
    changes = _Changes(Path(rows), below)
    name = name or below.model
    fingerprint = fingerprint_of(below.full_name, *changes.fingerprint)
    if published := published_before(store, name, version, fingerprint):
        return published
    provenance = _provenance(changes.path, ", ".join(changes.dtypes), changes.bytes)
    with open_draft(store, name, version or version_after(store, name)) as draft, explained_write_errors(store):
        draft.resume(fingerprint, below.root)
        draft.check_space([changes.bytes + PAGE_BYTES, below.replaced_bytes])

        def replaced(table: Table, part: Part) -> Replaced:
            return changes.of(table, part).over(replaced_rows(store, below, table, part))

        try:
            overlays = write_overlays(draft, below.tables, replaced)
        except InvalidRequest:  # a row that cannot be held: the same file would fail there again
            draft.abandon()
            raise
        if base.removesuffix("@") == name:
            _refuse_if_older(draft, below)
        return publish_overlays(draft, below, overlays, provenance, checkpoint=below.checkpoint)


def rollback(store: str | Path | Store, name: str, *, to: str | None = None, version: str | None = None) -> Manifest:
    """Publish a version that has the rows of the version before the newest one, or of version `to`.

    The newest version is the one that is served, so a rollback is a new version. It has no rows of its own, but names
    those of the version that it brings back. Returns its manifest. Raises NotFound where there is none before. Raises
    ImportRefused if a version was published meanwhile, which would be rolled back too.
    """
    store = store if isinstance(store, Store) else Store(store)
    newest = store.manifest(name)
    restored = newest.base.restores if newest.base else None
    if restored and to in (None, restored):
        fingerprint = fingerprint_of("rollback", name, restored)
        if published := published_before(store, name, version, fingerprint):
            return published
    served = restored or newest.version
    if to is None:
        before = [each for each in store.versions(name) if natural_order(each) < natural_order(served)]
        if not before:
            rows = (
                f"{newest.full_name} has the rows of version {restored}" if restored else f"{name}@{served} is served"
            )
            raise NotFound(f"{rows}, and {store.url} has no version before it: name another one with --to")
        to = before[-1]
    source = store.manifest(name, to)
    restores = (source.base.restores if source.base else None) or to
    if restores == served:
        raise InvalidRequest(f"{name}@{to} has the rows that are served already, as {newest.full_name}")
    provenance = _provenance(Path(store.location(name, to)), "", 0)
    with open_draft(store, name, version or version_after(store, name)) as draft, explained_write_errors(store):
        draft.resume(fingerprint_of("rollback", name, restores), source.root)
        draft.check_space([source.replaced_bytes])
        overlays = write_overlays(draft, source.tables, lambda table, part: replaced_rows(store, source, table, part))
        _refuse_if_older(draft, newest)
        return publish_overlays(draft, source, overlays, provenance, checkpoint=source.checkpoint, restores=restores)


def _refuse_if_older(draft: Draft, newest: Manifest) -> None:
    """Raise ImportRefused if its model has a newer version by now. The draft would hide that one's rows."""
    now = draft.store.versions(newest.model)[-1:]
    if now != [newest.version]:
        draft.abandon()
        there = f"{newest.model}@{now[0]}" if now else "no version"
        raise ImportRefused(f"{newest.full_name} was the newest version, and now {there} is: run this again")


def find_version(store: Store, name: str) -> Manifest:
    """The manifest of NAME@VERSION, or of NAME's newest version. Raises NotFound naming what there is."""
    model, _, version = name.partition("@")
    return store.manifest(model, version or None)


def write_overlays(
    draft: Draft, tables: tuple[Table, ...], replaced: Callable[[Table, Part], Replaced]
) -> dict[str, tuple[Overlay, ...]]:
    """Write what is replaced in each part of the tables, as `replaced` says it, part by part.

    It is not asked for parts that an earlier run was done with.
    """
    overlays: dict[str, tuple[Overlay, ...]] = {}
    for table in tables:
        written = []
        for part in table.parts:
            entry = draft.finished(overlay_file(table.name, part.index))
            if entry is None:
                rows = replaced(table, part)
                entry = write_overlay(draft.folder, table, part, rows) if len(rows.ids) else _none_in(table, part)
                draft.keep(entry)
            if isinstance(entry, Overlay):
                written.append(entry)
        if written:
            overlays[table.name] = tuple(written)
    return overlays


def _none_in(table: Table, part: Part) -> NoRows:
    return NoRows(file=overlay_file(table.name, part.index))


def publish_overlays(
    draft: Draft,
    below: Manifest,
    overlays: Mapping[str, tuple[Overlay, ...]],
    provenance: Provenance,
    *,
    checkpoint: str | None = None,
    restores: str | None = None,
) -> Manifest:
    """Make a version of these overlays visible, with the tables of `below`. Returns its manifest.

    `draft.resume` was told the base, so that `gc` leaves it. Raises StoreError if it was gone before.
    checkpoint: MODEL@VERSION of the import whose dense half goes with these rows. None: this is an import.
    """
    model, version = below.root
    manifest = Manifest(
        format_version=2,
        model=draft.model,
        version=draft.version,
        family=below.family,
        hash_params=below.hash_params,
        tables=below.tables,
        dense=below.dense,
        provenance=provenance,
        base=Base(model=model, version=version, overlays=dict(overlays), restores=restores, checkpoint=checkpoint),
    )
    if not draft.store.has(model, version):
        raise StoreError(
            f"{manifest.full_name} is not published: its base {model}@{version} was removed meanwhile. Bring that "
            "back, or choose another base"
        )
    draft.publish(manifest)
    return manifest


def fingerprint_of(*about: object) -> str:
    """Tell jobs apart, so that one that died is gone on with by the same job alone."""
    return xxhash.xxh3_128_hexdigest(json.dumps(about).encode())


def published_before(store: Store, name: str, version: str | None, fingerprint: str) -> Manifest | None:
    """What the same job published before it died, if it did not clear up: `version`, or else the newest one."""
    candidates = [version] if version else store.versions(name)[-1:]
    found = (finish_published(store, name, each, fingerprint) for each in candidates)
    return next((each for each in found if each), None)


def version_after(store: Store, name: str) -> str:
    """The default name of a model's next version."""
    versions = store.versions(name)
    return next_version(versions) if versions else "1"


def _provenance(path: Path, dtype: str, nbytes: int) -> Provenance:
    files = {path.name: path.stat().st_size} if path.is_file() else {}
    return Provenance(
        checkpoint=str(path),
        files=files,
        source_dtype=dtype,
        source_bytes=nbytes,
        imported_at=datetime.now(UTC).isoformat(timespec="seconds"),
        importer=f"embedding-service {installed_version('embedding-service')}",
    )


class _Change(NamedTuple):
    """What a file says of one table: its ids in ascending order, where each one's row is, and all rows as bytes.

    `ids`, `order`: int64 [n]. `data`: uint8 [n, bytes of a row there], mapped. `dtype`: None for stored rows.
    """

    ids: npt.NDArray[np.int64]
    order: npt.NDArray[np.int64]
    data: npt.NDArray[np.uint8]
    dtype: torch.dtype | None


class _Changes:
    """A file of rows, checked against the version that they are for.

    Attributes:
        dtypes: Of the rows, as safetensors names them.
        bytes: Of the rows, as they will be stored.
    """

    def __init__(self, path: Path, below: Manifest) -> None:
        self.path, self._below = path, below
        self._spans = read_spans(path)
        stat = path.stat()
        self.fingerprint = (str(path.resolve()), stat.st_size, stat.st_mtime_ns)
        self._changes = {name: self._change(below.table(name)) for name in self._tables()}
        self.dtypes = sorted({self._spans[f"{name}.rows"].dtype for name in self._changes})
        self.bytes = sum(len(each.ids) * below.table(name).row_bytes for name, each in self._changes.items())

    def of(self, table: Table, part: Part) -> Replaced:
        """The rows for a part."""
        change = self._changes.get(table.name)
        if change is None:
            return Replaced.none(table.row_bytes)
        first, end = np.searchsorted(change.ids, [part.first_row, part.first_row + part.rows]).tolist()
        if first == end:
            return Replaced.none(table.row_bytes)
        return Replaced(change.ids[first:end], np.concatenate(list(self._encoded(table, change, first, end))))

    def _tables(self) -> list[str]:
        names = [name for name in self._spans if name.endswith(".ids")]
        pairs = {each for name in names for each in (name, f"{name.removesuffix('.ids')}.rows")}
        if not names or pairs != set(self._spans):
            wrong = sorted(pairs ^ set(self._spans))
            about = f"{shown(wrong[0])} has no partner" if wrong else "it has no tensor"
            raise InvalidRequest(f"{self.path}: {about}; rows of a table are two tensors, TABLE.ids and TABLE.rows")
        return [name.removesuffix(".ids") for name in names]

    def _change(self, table: Table) -> _Change:
        ids_span, rows_span = self._spans[f"{table.name}.ids"], self._spans[f"{table.name}.rows"]
        if ids_span.dtype not in _ID_DTYPES or len(ids_span.shape) != 1:
            raise InvalidRequest(
                f"{self.path}: {table.name}.ids must be int64 [n], got {ids_span.dtype} {list(ids_span.shape)}"
            )
        count = ids_span.shape[0]
        stored = rows_span.dtype == "U8"
        if not (stored or rows_span.dtype in _DTYPES) or rows_span.shape != (
            count,
            table.row_bytes if stored else table.dim,
        ):
            raise InvalidRequest(
                f"{self.path}: {table.name}.rows must be float [{count}, {table.dim}], or uint8 [{count}, "
                f"{table.row_bytes}] as {self._below.full_name} stores {table.dtype} rows, got {rows_span.dtype} "
                f"{list(rows_span.shape)}"
            )
        data = self._mapped(f"{table.name}.ids", count)
        ids = np.frombuffer(data.tobytes(), _ID_DTYPES[ids_span.dtype]).astype(np.int64)
        outside = np.flatnonzero((ids < 0) | (ids >= table.rows))
        if len(outside):
            raise OutOfRange(
                f"{self.path}: {table.name}.ids[{outside[0]}] is {ids[outside[0]]}: ids must be from 0 to "
                f"{table.rows - 1}"
            )
        order = np.argsort(ids, kind="stable")
        ids = ids[order]
        twice = np.flatnonzero(ids[1:] == ids[:-1])
        if len(twice):
            raise InvalidRequest(
                f"{self.path}: {table.name}.ids has id {ids[twice[0]]} more than once: give a row once"
            )
        data = self._mapped(f"{table.name}.rows", count)
        return _Change(ids, order, data, None if stored else _DTYPES[rows_span.dtype])

    def _mapped(self, name: str, count: int) -> npt.NDArray[np.uint8]:
        """A tensor's bytes, uint8 [count, bytes of an item], read from the file when they are looked at."""
        span = self._spans[name]
        if not count:
            return np.empty((0, 8), np.uint8)
        return np.memmap(self.path, np.uint8, "r", span.offset, (count, span.bytes // count))

    def _encoded(self, table: Table, change: _Change, first: int, end: int) -> Iterator[npt.NDArray[np.uint8]]:
        """Rows [first, end) of a change as they are stored, chunk by chunk. Raises UnencodableRow."""
        row_format = get_format(table.dtype)
        for begin in range(first, end, _CHUNK_ROWS):
            data = torch.from_numpy(change.data[change.order[begin : min(begin + _CHUNK_ROWS, end)]])
            try:
                if change.dtype is None:
                    check_finite(row_format.decode(data, table.dim))
                    yield data.numpy()
                    continue
                rows = data.view(change.dtype)
                yield row_format.encode(rows.float() if change.dtype is torch.float64 else rows).numpy()
            except UnencodableRow as error:
                row_id = int(change.ids[begin + error.row])
                raise UnencodableRow(
                    error.row, f"of {table.name}.rows, for id {row_id} in {self.path}, {error.reason}"
                ) from error
