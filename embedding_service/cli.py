"""The command line: thin commands over the packages, which import what is heavy only when they run."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from embedding_service.errors import EmbeddingServiceError

if TYPE_CHECKING:
    import rich.progress

app = typer.Typer(
    help="A parameter service for the giant n-gram embedding tables of language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def parse_bytes(text: str) -> int:
    """Read "256MiB", "4 GB", "1.5G" (an i or no B makes it binary) or "4096". Raises typer.BadParameter."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([kmgt])(i?b?))?", text.strip().lower())
    if not match:
        raise typer.BadParameter(f"{text!r} is no size: write 256MiB, 4GB or a number of bytes")
    number, prefix, suffix = match.groups()
    base = 1000 if suffix == "b" else 1024
    return int(float(number) * base ** ("kmgt".index(prefix) + 1 if prefix else 0))


@app.command("import")
def import_command(
    checkpoint: Annotated[Path, typer.Argument(help="Hugging Face checkpoint folder (or its split-off tables).")],
    store: Annotated[str, typer.Option(help="Store to import into: a folder or an fsspec URL.")],
    name: Annotated[str, typer.Option(help="Name the model is served under.")],
    dtype: Annotated[str, typer.Option(help="int8, int4, fp16, bf16, fp32 or keep.")] = "int8",
    version: Annotated[str, typer.Option(help="Version of the model; the highest one is served.")] = "1",
    part_size: Annotated[str, typer.Option(help="Largest size of a part.")] = "256MiB",
) -> None:
    """Import a checkpoint's tables into a store. Run again to go on after an interruption."""
    part_bytes = parse_bytes(part_size)
    from embedding_service.store.importing import import_checkpoint

    with _Progress("importing") as progress:
        manifest = import_checkpoint(
            checkpoint, store, name, version=version, dtype=dtype, part_bytes=part_bytes, progress=progress
        )
    rows = sum(table.rows for table in manifest.tables)
    parts = sum(len(table.parts) for table in manifest.tables)
    typer.echo(
        f"{name}@{version}: {rows:,} rows of {manifest.tables[0].dim} as {manifest.tables[0].dtype}, "
        f"{_size(progress.total)} in, {_size(manifest.bytes)} out in {parts} parts, "
        f"{progress.seconds:.1f} s, to {store}"
    )


@app.command()
def split(
    checkpoint: Annotated[Path, typer.Argument(help="Hugging Face checkpoint folder.")],
    out: Annotated[Path, typer.Argument(help="New folder: OUT/dense for workers, OUT/tables for `import`.")],
) -> None:
    """Split a checkpoint, so that a worker's disk and memory never see the tables."""
    from embedding_service.store.split import split_checkpoint

    with _Progress("splitting") as progress:
        split_checkpoint(checkpoint, out, progress=progress)
    typer.echo(f"{_size(progress.total)} in {progress.seconds:.1f} s: {out}/dense for workers, {out}/tables for import")


class _Progress:
    """A bar on a terminal, else a plain line now and then; called with (bytes done, bytes in all)."""

    LINE_SECONDS = 10.0

    def __init__(self, title: str) -> None:
        self.total = 0
        self._title = title
        self._begun = self._last_line = time.monotonic()
        self._bar: rich.progress.Progress | None = None

    @property
    def seconds(self) -> float:
        """Since it was made."""
        return time.monotonic() - self._begun

    def __enter__(self) -> _Progress:
        if sys.stderr.isatty():
            self._bar = _byte_bar()
            self._bar.start()
            self._bar.add_task(self._title, total=None)
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar:
            self._bar.stop()

    def __call__(self, done: int, total: int) -> None:
        self.total = total
        if self._bar:
            self._bar.update(self._bar.task_ids[0], completed=done, total=total)
        elif time.monotonic() - self._last_line > self.LINE_SECONDS:
            self._last_line = time.monotonic()
            left = self.seconds * (total - done) / done
            rate = _size(done / self.seconds)
            typer.echo(f"{self._title}: {_size(done)} of {_size(total)}, {rate}/s, {left:.0f} s left", err=True)


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


def _size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def main() -> None:
    """Run the command line. What goes wrong is one red line and exit code 1; wrong usage is exit code 2."""
    try:
        app()
    except (EmbeddingServiceError, OSError) as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
