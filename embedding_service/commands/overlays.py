"""`publish`, `rollback` and `diff`: versions that are their base but for some rows."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from embedding_service.commands.secured import AuditOption
from embedding_service.commands.store import note_if_not_served, open_store
from embedding_service.commands.text import JsonOption, format_bytes, say, say_json
from embedding_service.security.audit import Audit, this_user

if TYPE_CHECKING:
    from embedding_service.store.manifest import Manifest
    from embedding_service.store.reading import TableDiff

StoreOption = Annotated[str, typer.Option(help="The store: a folder or an fsspec URL.")]
VersionOption = Annotated[str | None, typer.Option(help="The new version. Default: one that sorts last.")]


def publish(
    base: Annotated[str, typer.Option(metavar="NAME[@VERSION]", help="The version whose rows are replaced.")],
    rows: Annotated[
        Path, typer.Option(metavar="FILE", help="Safetensors file of TABLE.ids, n int64, and of TABLE.rows, n x dim.")
    ],
    store: StoreOption,
    name: Annotated[
        str | None, typer.Option(help="Publish under another name, as NAME+legal, to be served beside the base.")
    ] = None,
    version: VersionOption = None,
    audit: AuditOption = None,
    as_json: JsonOption = False,
) -> None:
    """Publish rows in the place of a version's rows. Shards hold the base's other rows once."""
    from embedding_service.store.publishing import publish_rows

    began, target = time.monotonic(), open_store(store)
    manifest = publish_rows(target, base, rows, name=name, version=version)
    Audit(audit).note("publish", this_user(), model=manifest.full_name, base=base, store=store)
    _tell(manifest, as_json, time.monotonic() - began)
    note_if_not_served(target, manifest)


def rollback(
    name: Annotated[str, typer.Argument(help="The model.")],
    store: StoreOption,
    to: Annotated[str | None, typer.Option(help="The version to bring back. Default: the one before.")] = None,
    version: VersionOption = None,
    audit: AuditOption = None,
    as_json: JsonOption = False,
) -> None:
    """Serve the version before again, as a new version that has its rows."""
    from embedding_service.store.publishing import rollback as roll_back

    began, target = time.monotonic(), open_store(store)
    manifest = roll_back(target, name, to=to, version=version)
    restores = manifest.base.restores if manifest.base else None
    Audit(audit).note("rollback", this_user(), model=manifest.full_name, restores=restores or "", store=store)
    _tell(manifest, as_json, time.monotonic() - began)
    note_if_not_served(target, manifest)


def diff(
    first: Annotated[str, typer.Argument(metavar="A", help="NAME or NAME@VERSION.")],
    second: Annotated[str, typer.Argument(metavar="B", help="NAME or NAME@VERSION.")],
    store: StoreOption,
    as_json: JsonOption = False,
) -> None:
    """Show how many rows of two versions differ, where, and how far apart they are."""
    from embedding_service.store.reading import diff as compare

    tables = compare(store, first, second)
    if as_json:
        say_json({"tables": [asdict(table) for table in tables]})
        return
    for table in tables:
        say(_line(table))


def _tell(manifest: Manifest, as_json: bool, seconds: float) -> None:
    base, rows = "@".join(manifest.root), sum(table.rows for table in manifest.tables)
    restores = manifest.base.restores if manifest.base else None
    if as_json:
        about = {"model": manifest.model, "version": manifest.version, "base": base, "restores": restores}
        size = {"replaced_rows": manifest.replaced_rows, "rows": rows, "bytes": manifest.replaced_bytes}
        say_json({**about, **size, "seconds": round(seconds, 3)})
        return
    what = f" with the rows of version {restores}" if restores else ""
    replaced = f"{manifest.replaced_rows:,} of {rows:,} rows in place of {base}'s"
    say(f"{manifest.full_name}{what}: {replaced}, {format_bytes(manifest.replaced_bytes)}, {seconds:.1f} s")


def _line(table: TableDiff) -> str:
    if not table.differ:
        return f"{table.table}: none of {table.rows:,} rows differ"
    ids = ", ".join(map(str, table.first_ids)) + (", ..." if table.differ > len(table.first_ids) else "")
    return (
        f"{table.table}: {table.differ:,} of {table.rows:,} rows differ, in {len(table.parts)} parts (ids {ids}); "
        f"mean distance {table.distance:.4g} of rows of length {table.length:.4g}, largest difference of a value "
        f"{table.largest:.4g} at id {table.largest_id}"
    )
