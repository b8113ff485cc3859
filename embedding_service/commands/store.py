"""`import` and `split`: from a checkpoint to a store."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from embedding_service.commands.text import JsonOption, format_bytes, parse_bytes, say, say_json
from embedding_service.errors import InvalidRequest
from embedding_service.formats import FORMATS

if TYPE_CHECKING:
    import rich.progress

    from embedding_service.store.manifest import Manifest
    from embedding_service.store.store import Store


def import_command(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            help="Hugging Face checkpoint folder (or its split-off tables); with --generic any safetensors file, too."
        ),
    ],
    store: Annotated[str, typer.Option(help="Store to import into: a folder or an fsspec URL.")],
    name: Annotated[str, typer.Option(help="Name the model is served under.")],
    dtype: Annotated[
        str | None,
        typer.Option(help=f"{', '.join(FORMATS)} or keep, for the checkpoint's own. Default: int8, or the base's."),
    ] = None,
    version: Annotated[str, typer.Option(help="Version of the model; the highest one is served.")] = "1",
    part_size: Annotated[
        str | None,
        typer.Option(help="Largest size of a part. Default: a 16th of each table, at most 256MiB."),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            metavar="VERSION",
            help="A version of this model: only rows that differ from its rows are written, and held beside them.",
        ),
    ] = None,
    generic: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TENSOR[=TABLE]",
            help="Take this matrix as a table that is looked up by row id, whatever model it is of; may be repeated.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Import a checkpoint's tables into a store. Run again to go on after an interruption."""
    part_bytes = parse_bytes(part_size) if part_size is not None else None
    wanted = _tables_by_tensor(generic) if generic else None
    from embedding_service.store.importing import import_checkpoint

    target = open_store(store)
    with Progress("importing") as progress:
        manifest = import_checkpoint(
            checkpoint,
            target,
            name,
            version=version,
            dtype=dtype,
            part_bytes=part_bytes,
            base=base,
            progress=progress,
            generic=wanted,
        )
    tables = ", ".join(
        f"{table.rows:,} rows of {table.dim} as {table.dtype} in {table.name}" for table in manifest.tables
    )
    parts = sum(len(table.parts) for table in manifest.tables)
    out = f"{format_bytes(manifest.bytes)} out in {parts} parts"
    if manifest.base:
        rows = sum(table.rows for table in manifest.tables)
        out = f"{manifest.replaced_rows:,} of {rows:,} rows differ from {'@'.join(manifest.root)}"
        out += f", {format_bytes(manifest.replaced_bytes)} out"
    if as_json:
        keys = {"name", "rows", "dim", "dtype"}
        say_json(
            {
                "model": name,
                "version": version,
                "store": store,
                "base": "@".join(manifest.root) if manifest.base else None,
                "tables": [table.model_dump(include=keys) for table in manifest.tables],
                "parts": parts,
                "bytes_in": progress.total,
                "bytes": manifest.own_bytes,
                "seconds": round(progress.seconds, 3),
            }
        )
    else:
        size_in = f"{format_bytes(progress.total)} in"
        say(f"{name}@{version}: {tables}; {size_in}, {out}, {progress.seconds:.1f} s, to {store}")
    note_if_not_served(target, manifest)


def open_store(url: str) -> Store:
    """A store to write to. Raises InvalidRequest for one that is gone when the command ends."""
    from embedding_service.store.store import Store

    store = Store(url)
    if store.is_private:
        raise InvalidRequest(f"{url} is gone when this command ends: give a folder, or a URL that others can read")
    return store


def note_if_not_served(store: Store, manifest: Manifest) -> None:
    """Say so if a version that was just published is not the newest one of its model."""
    from embedding_service.store.store import next_version

    newest = store.versions(manifest.model)[-1]
    if newest != manifest.version:
        say(
            f"note: {manifest.model}@{newest} stays the newest and is what is served: to replace it, give "
            f"--version {next_version([newest])}",
            err=True,
        )


def split(
    checkpoint: Annotated[Path, typer.Argument(help="Hugging Face checkpoint folder.")],
    out: Annotated[Path, typer.Argument(help="New folder: OUT/dense for workers, OUT/tables for `import`.")],
    as_json: JsonOption = False,
) -> None:
    """Split a checkpoint, so that a worker's disk and memory never see the tables."""
    from embedding_service.store.split import split_checkpoint

    with Progress("splitting") as progress:
        split_checkpoint(checkpoint, out, progress=progress)
    if as_json:
        folders = {"dense": str(out / "dense"), "tables": str(out / "tables")}
        say_json({**folders, "bytes": progress.total, "seconds": round(progress.seconds, 3)})
        return
    say(f"{format_bytes(progress.total)} in {progress.seconds:.1f} s: {out}/dense for workers, {out}/tables for import")


def _tables_by_tensor(texts: list[str]) -> dict[str, str]:
    """Read TENSOR=TABLE of each. If only TENSOR is given, the table has its name."""
    tables: dict[str, str] = {}
    for text in texts:
        tensor, _, table = text.partition("=")
        if tensor in tables:
            raise typer.BadParameter(f"--generic names tensor {tensor!r} twice")
        tables[tensor] = table or tensor
    return tables


class Progress:
    """A bar on a terminal, else a plain line now and then. Called with (bytes done, bytes in all)."""

    LINE_SECONDS = 10.0

    def __init__(self, title: str) -> None:
        self.total = 0
        self._title = title
        self._begun = self._last_line = time.monotonic()
        self._bar: rich.progress.Progress | None = None

    @property
    def seconds(self) -> float:
        """Seconds since it was made."""
        return time.monotonic() - self._begun

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            self._bar = _byte_bar()
            self._bar.start()
            self._bar.add_task(self._title, total=None)
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar:
            self._bar.stop()

    def __call__(self, done: int, total: int) -> None:
        """Show how far it is, in bytes."""
        self.total = total
        if self._bar:
            self._bar.update(self._bar.task_ids[0], completed=done, total=total)
        elif time.monotonic() - self._last_line > self.LINE_SECONDS:
            self._last_line = time.monotonic()
            left = self.seconds * (total - done) / done
            rate = format_bytes(done / self.seconds)
            say(f"{self._title}: {format_bytes(done)} of {format_bytes(total)}, {rate}/s, {left:.0f} s left", err=True)


def _byte_bar() -> rich.progress.Progress:
    from rich import progress
    from rich.console import Console

    return progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.DownloadColumn(binary_units=True),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
        console=Console(stderr=True),
    )
