"""Importing: a checkpoint's tables become a published version of a model.

Rows stream through in chunks: read, encoded, hashed, written. Memory is a few chunks for any size of table or part. One
thread does it all, at 1 to 2 GiB a second on a machine with two cores. Threads that encode ahead gave nothing there.
torch's own threads made it three times slower when they had to wait for a busy core.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version as installed_version
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
import xxhash

from embedding_service.checkpoint import Checkpoint, LooseTensors, SourceMatrix
from embedding_service.errors import ImportRefused, InvalidRequest, UnencodableRow
from embedding_service.formats import FORMATS, RowFormat, get_format
from embedding_service.store.draft import Draft, explained_write_errors, finish_published, open_draft
from embedding_service.store.importers import GenericImporter, Importer, TableSource, find_importer
from embedding_service.store.manifest import (
    MOST_PARTS,
    MOST_ROWS,
    Dense,
    Manifest,
    Overlay,
    Part,
    Provenance,
    Table,
    overlay_file,
)
from embedding_service.store.overlays import Replaced
from embedding_service.store.parts import NewPart, PartWriter, default_rows_per_part, rows_per_part
from embedding_service.store.progress import Meter, Progress
from embedding_service.store.publishing import publish_overlays, write_overlays
from embedding_service.store.reading import part_rows
from embedding_service.store.store import Store
from embedding_service.tensorfile import PAGE_BYTES

# Bytes of a chunk in float32. Measured: 1 MiB and 16 MiB are both slower by a quarter.
_CHUNK_BYTES = 4 << 20
KEEP = "keep"
DEFAULT_DTYPE = "int8"


def import_checkpoint(
    checkpoint: str | Path,
    store: str | Path | Store,
    name: str,
    *,
    version: str = "1",
    dtype: str | None = None,
    part_bytes: int | None = None,
    base: str | None = None,
    progress: Progress | None = None,
    generic: Mapping[str, str] | None = None,
) -> Manifest:
    """Import the tables of a Hugging Face checkpoint folder as `name@version` and return the manifest.

    dtype: a name in `formats.FORMATS`, or "keep" for the checkpoint's own. None: int8, or the base's.
    part_bytes: most bytes of a part. None takes a 16th of each table in whole pages, at most 256 MiB.
    base: a version of this model. Of the checkpoint's rows only those are written that differ from its rows.
    generic: tensor -> table, to take these matrices of any model as tables without a family. Then `checkpoint` may also
    be a safetensors file, or a folder of them without a config.
    Goes on where an earlier call with the same checkpoint and options was interrupted, even while it published. Until
    all is done the store shows nothing of it. Raises ImportRefused: not a checkpoint, unknown family, missing or
    misshapen tensor, no disk space, name taken.
    InvalidRequest: name, dtype, part size. StoreError: reading or writing failed midway.
    """
    source, importer = _open(Path(checkpoint), generic)
    store = store if isinstance(store, Store) else Store(store)
    if base is None:
        plans = [_plan(table, dtype or DEFAULT_DTYPE, part_bytes) for table in importer.tables()]
        root = None
    else:
        root = store.manifest(*store.manifest(name, base).root)
        plans = _plans_like(root, importer, dtype, part_bytes)
    _check_parts(plans)
    fingerprint = _fingerprint(source, plans, root)
    if published := finish_published(store, name, version, fingerprint):
        return published
    with open_draft(store, name, version) as draft, explained_write_errors(store), _one_torch_thread():
        draft.resume(fingerprint, root.root if root else None)
        parts = [part for plan in plans for part in plan.parts()]
        meter = Meter(sum(plan.source.bytes for plan in plans), progress)
        try:
            if root:
                overlays = _write_differences(store, root, plans, draft, meter)
                return publish_overlays(draft, root, overlays, _provenance(source, plans))
            draft.check_space([part.bytes + PAGE_BYTES for part in parts if not draft.finished(part.file)])
            tables = tuple(_write_table(plan, draft, meter) for plan in plans)
        except ImportRefused:  # a row that cannot be held: the same import would fail there again
            draft.abandon()
            raise
        manifest = _manifest(name, version, source, importer, plans, tables)
        draft.publish(manifest)
    return manifest


def _open(path: Path, generic: Mapping[str, str] | None) -> tuple[Checkpoint, Importer]:
    if generic is not None:
        tensors = LooseTensors(path)
        return tensors, GenericImporter(tensors, generic)
    checkpoint = Checkpoint(path)
    return checkpoint, find_importer(checkpoint)


@dataclass(frozen=True)
class _TablePlan:
    """How one table of the checkpoint will lie in the store."""

    source: TableSource
    row_format: RowFormat
    row_bytes: int
    rows_per_part: int

    def parts(self) -> list[NewPart]:
        """Every part in order. The last one holds what is left."""
        source, parts = self.source, []
        for index, first_row in enumerate(range(0, source.rows, self.rows_per_part)):
            rows = min(self.rows_per_part, source.rows - first_row)
            parts.append(NewPart(source.name, index, first_row, rows, source.dim, self.row_format))
        return parts


def _plan(source: TableSource, dtype: str, part_bytes: int | None) -> _TablePlan:
    if dtype not in (*FORMATS, KEEP):
        raise InvalidRequest(f"unknown dtype {dtype!r}; known: {', '.join((*FORMATS, KEEP))}")
    row_format = get_format(source.stored_as if dtype == KEEP else dtype)
    row_bytes = row_format.row_bytes(source.dim)
    if part_bytes is None:
        part_rows = default_rows_per_part(source.rows, row_bytes)
    else:
        part_rows = rows_per_part(row_bytes, part_bytes)
    return _TablePlan(source, row_format, row_bytes, part_rows)


def _check_parts(plans: list[_TablePlan]) -> None:
    """Raise InvalidRequest if no manifest could hold the parts."""
    if any(plan.rows_per_part > MOST_ROWS for plan in plans):
        raise InvalidRequest(f"--part-size is too large: a part has at most {MOST_ROWS:,} rows")
    count = sum(-(-plan.source.rows // plan.rows_per_part) for plan in plans)
    if count > MOST_PARTS:
        raise InvalidRequest(f"{count:,} parts are too many: choose a --part-size that makes at most {MOST_PARTS:,}")


def _plans_like(root: Manifest, importer: Importer, dtype: str | None, part_bytes: int | None) -> list[_TablePlan]:
    """The checkpoint's tables as the base has them. Raises ImportRefused if they are others."""
    if part_bytes is not None:
        raise InvalidRequest("with --base, parts are the base's: leave --part-size out")
    sources = importer.tables()
    tables = {table.name: table for table in root.tables}
    ours = [(source.name, source.rows, source.dim) for source in sources]
    theirs = [(table.name, table.rows, table.dim) for table in root.tables]
    if (importer.family, ours) != (root.family, theirs) or importer.hash_params != root.hash_params:
        raise ImportRefused(
            f"the checkpoint's tables are not those of {root.full_name}: {ours} of family {importer.family!r}, and "
            f"{theirs} of family {root.family!r}; import it without --base"
        )
    for table in root.tables:
        if dtype not in (None, KEEP, table.dtype):
            raise InvalidRequest(f"{root.full_name} stores table {table.name} as {table.dtype}: leave --dtype out")
    return [
        _TablePlan(source, get_format(table.dtype), table.row_bytes, table.rows_per_part)
        for source in sources
        for table in [tables[source.name]]
    ]


def _write_differences(
    store: Store, root: Manifest, plans: list[_TablePlan], draft: Draft, meter: Meter
) -> dict[str, tuple[Overlay, ...]]:
    """Write the rows of the checkpoint that are not the base's."""
    by_name = {plan.source.name: plan for plan in plans}
    for table in root.tables:
        source = by_name[table.name].source
        done = [part for part in table.parts if draft.finished(overlay_file(table.name, part.index))]
        meter.add(sum(part.rows for part in done) * (source.bytes // source.rows))

    def differences(table: Table, part: Part) -> Replaced:
        plan, found, first = by_name[table.name], [Replaced.none(table.row_bytes)], 0
        new = NewPart(table.name, part.index, part.first_row, part.rows, table.dim, plan.row_format)
        with part_rows(store, root, table, part) as before:
            for chunk in _stored_chunks(plan, new):
                differ = np.flatnonzero((chunk.numpy() != before[first : first + len(chunk)]).any(1))
                found.append(Replaced(part.first_row + first + differ, chunk.numpy()[differ]))
                first += len(chunk)
                meter.add(len(chunk) * (plan.source.bytes // plan.source.rows))
        ids, rows = zip(*found, strict=True)
        return Replaced(np.concatenate(ids), np.concatenate(rows))

    return write_overlays(draft, root.tables, differences)


def _fingerprint(checkpoint: Checkpoint, plans: list[_TablePlan], root: Manifest | None) -> str:
    """Tell apart imports whose parts would differ: of another checkpoint, dtype, part size or base."""
    files = [(file.name, stat.st_size, stat.st_mtime_ns) for file in checkpoint.files() for stat in [file.stat()]]
    tables = [
        (plan.source.name, [tensor.name for tensor in plan.source.tensors], plan.row_format.name, plan.rows_per_part)
        for plan in plans
    ]
    about = [checkpoint.config, files, tables, *(root.root if root else ())]
    return xxhash.xxh3_128_hexdigest(json.dumps(about, sort_keys=True).encode())


def _write_table(plan: _TablePlan, draft: Draft, meter: Meter) -> Table:
    parts = tuple(_finish_part(plan, part, draft, meter) for part in plan.parts())
    return Table(
        name=plan.source.name,
        rows=plan.source.rows,
        dim=plan.source.dim,
        dtype=plan.row_format.name,
        row_bytes=plan.row_bytes,
        rows_per_part=plan.rows_per_part,
        parts=parts,
    )


def _finish_part(plan: _TablePlan, part: NewPart, draft: Draft, meter: Meter) -> Part:
    source_row_bytes = plan.source.bytes // plan.source.rows
    finished = draft.finished(part.file)
    if isinstance(finished, Part):
        meter.add(part.rows * source_row_bytes)
        return finished
    with PartWriter(draft.folder, part) as writer:
        for stored in _stored_chunks(plan, part):
            writer.write(stored)
            meter.add(len(stored) * source_row_bytes)
        written = writer.finish()
    draft.keep(written)
    return written


def _stored_chunks(plan: _TablePlan, part: NewPart) -> Iterator[torch.Tensor]:
    """The part's stored rows, chunk by chunk. Each chunk comes from one source tensor."""
    chunk_rows = max(1, _CHUNK_BYTES // (4 * plan.source.dim))
    ends = list(accumulate(tensor.rows for tensor in plan.source.tensors))
    for tensor, tensor_first, tensor_end in zip(plan.source.tensors, [0, *ends], ends, strict=False):
        first, end = max(part.first_row, tensor_first), min(part.first_row + part.rows, tensor_end)
        for begin in range(first, end, chunk_rows):
            yield _encode(plan, tensor, tensor_first, begin - tensor_first, min(chunk_rows, end - begin))


def _encode(plan: _TablePlan, tensor: SourceMatrix, tensor_first: int, begin: int, count: int) -> torch.Tensor:
    if plan.row_format.name == tensor.stored_as:
        return tensor.read_stored(begin, count)
    try:
        return plan.row_format.encode(tensor.read_rows(begin, count))
    except UnencodableRow as error:
        row = begin + error.row
        raise ImportRefused(
            f"{tensor.file}: tensor {tensor.name} row {row} (row {tensor_first + row} of table {plan.source.name}) "
            f"{error.reason}. Repair the checkpoint, or import it with --dtype keep"
        ) from error


def _manifest(
    name: str,
    version: str,
    checkpoint: Checkpoint,
    importer: Importer,
    plans: list[_TablePlan],
    tables: tuple[Table, ...],
) -> Manifest:
    return Manifest(
        model=name,
        version=version,
        family=importer.family,
        hash_params=importer.hash_params,
        tables=tables,
        dense=_dense(checkpoint, importer),
        provenance=_provenance(checkpoint, plans),
    )


def _provenance(checkpoint: Checkpoint, plans: list[_TablePlan]) -> Provenance:
    files = sorted({tensor.file for plan in plans for tensor in plan.source.tensors})
    return Provenance(
        checkpoint=str(checkpoint.folder.resolve()),
        files={file.name: file.stat().st_size for file in files},
        source_dtype=", ".join(sorted({plan.source.dtype for plan in plans})),
        source_bytes=sum(plan.source.bytes for plan in plans),
        imported_at=datetime.now(UTC).isoformat(timespec="seconds"),
        importer=f"embedding-service {installed_version('embedding-service')}",
    )


def _dense(checkpoint: Checkpoint, importer: Importer) -> Dense | None:
    if not importer.family:
        return None
    return Dense(tensors=tuple(tensor for tensor in checkpoint.tensors if not importer.is_table(tensor)))


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
