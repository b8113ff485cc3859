"""Publishing: a checkpoint of a branch becomes an ordinary version, whole or as the rows that differ from a base's."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import version as installed_version

import numpy as np
import torch

from embedding_service.errors import InvalidRequest, NotFound, UnencodableRow
from embedding_service.formats import FORMATS, get_format
from embedding_service.store.draft import Draft, explained_write_errors, open_draft
from embedding_service.store.manifest import Manifest, Part, Provenance, Table
from embedding_service.store.overlays import Replaced
from embedding_service.store.parts import NewPart, PartWriter, default_rows_per_part
from embedding_service.store.publishing import (
    fingerprint_of,
    publish_overlays,
    published_before,
    version_after,
    write_overlays,
)
from embedding_service.store.reading import part_rows
from embedding_service.store.store import Store
from embedding_service.tensorfile import PAGE_BYTES
from embedding_service.training.branch import Branch, BranchTable, branch_folder
from embedding_service.training.checkpoints import SavedRows, chain, whole_steps

_CHUNK_ROWS = 1 << 14


def publish_branch(
    store: Store, branch: Branch, step: int, *, version: str | None, dtype: str | None, base: str | None
) -> Manifest:
    """Publish a branch as it was after `step`, of which there must be a whole checkpoint. Returns the manifest.

    version: None: one that sorts last.
    dtype: None: the base's, or that of the version the branch began from.
    base: The version of which rows stay that are the same once they are encoded. None: a whole version.
    Raises NotFound, InvalidRequest, and UnencodableRow for a row that `dtype` cannot hold.
    """
    rows = _Rows(store, branch, step)
    start = store.manifest(branch.model, branch.base)
    root = store.manifest(*store.manifest(branch.model, base).root) if base else None
    _check_dtype(dtype, root)
    fingerprint = fingerprint_of("branch", branch.full_name, rows.checksums, dtype, root.root if root else None)
    if published := published_before(store, branch.model, version, fingerprint):
        return published
    provenance = _provenance(branch, step, sum(4 * table.rows * table.dim for table in branch.tables))
    with (
        open_draft(store, branch.model, version or version_after(store, branch.model)) as draft,
        explained_write_errors(store),
    ):
        draft.resume(fingerprint, root.root if root else None)
        try:
            if root:
                overlays = write_overlays(
                    draft, root.tables, lambda table, part: _differing(store, root, rows, table, part)
                )
                return publish_overlays(draft, root, overlays, provenance, checkpoint=start.checkpoint)
            tables = [_like(table, dtype) for table in start.tables]
            draft.check_space([part.bytes + PAGE_BYTES for _, parts in tables for part in parts])
            written = tuple(_write_table(draft, rows, table, parts) for table, parts in tables)
        except InvalidRequest:  # a row that cannot be held: it would fail there again
            draft.abandon()
            raise
        manifest = Manifest(
            model=branch.model,
            version=draft.version,
            family=start.family,
            hash_params=start.hash_params,
            tables=written,
            dense=start.dense,
            provenance=provenance,
        )
        draft.publish(manifest)
        return manifest


class _Rows:
    """The rows of a checkpoint by their ids, whichever share they are of."""

    def __init__(self, store: Store, branch: Branch, step: int) -> None:
        folder = branch_folder(store, branch.model, branch.name)
        if step not in whole_steps(folder, branch):
            known = ", ".join(map(str, whole_steps(folder, branch))) or "none"
            raise NotFound(f"{branch.full_name} has no checkpoint of step {step}; whole ones: {known}")
        saved = {share: chain(folder, share, step) for share in branch.shares}
        self.checksums = {share: [each.files for each in chained] for share, chained in saved.items()}
        self._tables = {table.name: table for table in branch.tables}
        self._parts: dict[tuple[str, int], tuple[SavedRows, int]] = {}  # and the first row of the part in them
        for share, chained in saved.items():
            for table, parts in chained[-1].parts.items():
                self._place(SavedRows(folder, share, chained, table), self._tables[table], parts)

    def _place(self, rows: SavedRows, table: BranchTable, parts: list[int]) -> None:
        first = 0
        for part in parts:
            self._parts[table.name, part] = rows, first
            first += table.part_rows(part)

    def chunks(self, table: str, first: int, rows: int) -> Iterator[tuple[int, torch.Tensor]]:
        """(id of the first row, float32 [n, dim]) until `rows` rows from `first` on are through."""
        about, end = self._tables[table], first + rows
        while first < end:
            part, offset = divmod(first, about.rows_per_part)
            stop = min(end - first, about.part_rows(part) - offset, _CHUNK_ROWS)
            rows_of, begin = self._parts[table, part]
            yield first, torch.from_numpy(rows_of.read(begin + offset, begin + offset + stop))
            first += stop


def _check_dtype(dtype: str | None, root: Manifest | None) -> None:
    if dtype and dtype not in FORMATS:
        raise InvalidRequest(f"unknown dtype {dtype!r}; known: {', '.join(FORMATS)}")
    for table in root.tables if root else ():
        if dtype not in (None, table.dtype):
            raise InvalidRequest(
                f"the base stores table {table.name} as {table.dtype}: leave dtype out, or publish without a base"
            )


def _like(table: Table, dtype: str | None) -> tuple[Table, list[NewPart]]:
    """A table as the one that the branch began from, in a dtype, and its parts that are to be."""
    row_format = get_format(dtype or table.dtype)
    row_bytes = row_format.row_bytes(table.dim)
    same = row_format.name == table.dtype
    per_part = table.rows_per_part if same else default_rows_per_part(table.rows, row_bytes)
    parts = [
        NewPart(table.name, index, first, min(per_part, table.rows - first), table.dim, row_format)
        for index, first in enumerate(range(0, table.rows, per_part))
    ]
    about = {"dtype": row_format.name, "row_bytes": row_bytes, "rows_per_part": per_part}
    return table.model_copy(update=about), parts


def _write_table(draft: Draft, rows: _Rows, table: Table, parts: list[NewPart]) -> Table:
    written = []
    for part in parts:
        finished = draft.finished(part.file)
        if finished is None:
            with PartWriter(draft.folder, part) as writer:
                for first, chunk in rows.chunks(table.name, part.first_row, part.rows):
                    writer.write(_encoded(table, first, chunk))
                finished = writer.finish()
            draft.keep(finished)
        written.append(finished)
    return table.model_copy(update={"parts": tuple(written)})


def _differing(store: Store, root: Manifest, rows: _Rows, table: Table, part: Part) -> Replaced:
    """The rows of a part that are not the base's once they are encoded."""
    found = [Replaced.none(table.row_bytes)]
    with part_rows(store, root, table, part) as before:
        for first, chunk in rows.chunks(table.name, part.first_row, part.rows):
            stored = _encoded(table, first, chunk).numpy()
            begin = first - part.first_row
            differ = np.flatnonzero((stored != before[begin : begin + len(stored)]).any(1))
            found.append(Replaced(first + differ, stored[differ]))
    ids, replaced = zip(*found, strict=True)
    return Replaced(np.concatenate(ids), np.concatenate(replaced))


def _encoded(table: Table, first: int, chunk: torch.Tensor) -> torch.Tensor:
    try:
        return get_format(table.dtype).encode(chunk)
    except UnencodableRow as error:
        row = first + error.row
        raise UnencodableRow(
            error.row, f"(id {row} of table {table.name}) {error.reason}: choose another dtype"
        ) from error


def _provenance(branch: Branch, step: int, nbytes: int) -> Provenance:
    return Provenance(
        checkpoint=f"{branch.full_name} after step {step}",
        files={},
        source_dtype="F32",
        source_bytes=nbytes,
        imported_at=datetime.now(UTC).isoformat(timespec="seconds"),
        importer=f"embedding-service {installed_version('embedding-service')}",
    )
