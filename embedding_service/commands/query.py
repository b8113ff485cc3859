"""`status`, `models`, `lookup`: asking a running service."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from embedding_service.commands.secured import TlsOption, TokenOption
from embedding_service.commands.text import JsonOption, check_address, format_bytes, say, say_json
from embedding_service.errors import OutOfRange

if TYPE_CHECKING:
    import rich.table

    from embedding_service.wire import control_pb2 as control

AddressArgument = Annotated[
    str, typer.Argument(help="HOST:PORT of any shard or of the controller.", callback=check_address)
]
MOST_ID = 1 << 63
# Of a row's id, beside a row that replaces another one.
ID_BYTES = 8
DEFAULT_ADDRESS = "localhost:7070"


def status(
    address: AddressArgument = DEFAULT_ADDRESS,
    tls: TlsOption = None,
    token_file: TokenOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show shards, parts, memory, rates, models and what stands in the way. Exit code 1 if something does."""
    from embedding_service.client.status import get_status
    from embedding_service.commands.console import wide_console
    from embedding_service.wire.plain import plain

    current = get_status(address)
    if as_json:
        say_json(plain(current))
    else:
        console = wide_console()
        for table in status_tables(current):
            console.print(table)
        console.print(f"routing: term {current.term}, epoch {current.epoch}")
        for problem in current.problems:
            console.print(f"problem: {problem.message}", style="red")
    if current.problems:
        raise typer.Exit(1)


def status_tables(current: control.Status) -> list[rich.table.Table]:
    """A Status message as tables for people."""
    from rich.table import Table

    shards = Table("shard", "address", "tier", title="shards", title_justify="left")
    for heading in ("parts", "held of limit", "anonymous + file", "lookups", "rows", "sent", "rows/s", "near rows"):
        shards.add_column(heading, justify="right")
    for shard in current.shards:
        stats = shard.stats
        missing = f" (+{shard.parts_missing})" if shard.parts_missing else ""
        shards.add_row(
            shard.shard_id,
            shard.address,
            f"{shard.device} {shard.tier}",
            f"{shard.parts}{missing}",
            f"{format_bytes(stats.held_bytes)} of {format_bytes(shard.memory_limit)}",
            f"{format_bytes(stats.anonymous_bytes)} + {format_bytes(stats.file_bytes)}",
            f"{stats.lookups:,}",
            f"{stats.rows:,}",
            format_bytes(stats.row_bytes),
            f"{stats.rows_per_second:,.0f}",
            f"{stats.near_rows:,}",
        )
    models = Table("model", "family", "tables", title="models", title_justify="left")
    for heading in ("rows", "size", "parts ready", "state"):
        models.add_column(heading, justify="right")
    for model in current.models:
        info = model.model
        models.add_row(
            f"{info.name}@{info.version}",
            info.family,
            ", ".join(f"{table.name} [{table.rows:,} x {table.dim}] {table.dtype}" for table in info.tables),
            f"{sum(table.rows for table in info.tables):,}",
            _size(model),
            f"{model.parts_ready} of {model.parts}",
            _state(model),
        )
    return [shards, models]


def _size(model: control.ModelStatus) -> str:
    """Of all rows. Of a version with a base: of those that are its own, with their ids."""
    if not model.model.base:
        return format_bytes(model.bytes)
    own = sum(table.replaced_rows * (ID_BYTES + table.row_bytes) for table in model.model.tables)
    return f"{format_bytes(own)} over {model.model.base}"


def _state(model: control.ModelStatus) -> str:
    if not model.serving:
        return "loading"
    return "serving" if model.parts_ready == model.parts else "serving, parts lost"


def models(
    address: AddressArgument = DEFAULT_ADDRESS,
    tls: TlsOption = None,
    token_file: TokenOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what is served now, a line for each table."""
    from embedding_service.client.thin import list_models
    from embedding_service.wire.plain import plain

    served = list_models(address)
    if as_json:
        say_json({"models": [plain(model) for model in served]})
        return
    for model in served:
        family = f" ({model.family})" if model.family else ""
        for table in model.tables:
            over = f", {table.replaced_rows:,} of them over {model.base}" if model.base else ""
            rows = f"{table.rows:,} rows of {table.dim} {table.dtype}"
            say(f"{model.name}@{model.version}/{table.name}: {rows}{family}{over}")


def lookup(
    table: Annotated[str, typer.Argument(help="MODEL/TABLE or MODEL@VERSION/TABLE.")],
    ids: Annotated[list[int], typer.Argument(help="Row ids.")],
    address: Annotated[str, typer.Option(help="HOST:PORT of any shard.", callback=check_address)] = DEFAULT_ADDRESS,
    timeout: Annotated[float, typer.Option(help="Seconds in all.")] = 10.0,
    tls: TlsOption = None,
    token_file: TokenOption = None,
    as_json: JsonOption = False,
) -> None:
    """Print rows, one on each line: the id, then the values."""
    for position, row_id in enumerate(ids):
        if not -MOST_ID <= row_id < MOST_ID:
            raise OutOfRange(f"ids[{position}] is {row_id}: no table has as many rows, ids are below {MOST_ID:,}")
    from embedding_service.client.thin import get_rows

    rows = get_rows(address, table, ids, timeout).tolist()
    if as_json:
        found = [{"id": row_id, "values": row} for row_id, row in zip(ids, rows, strict=True)]
        say_json({"table": table, "rows": found})
        return
    for row_id, row in zip(ids, rows, strict=True):
        say(f"{row_id}: " + " ".join(f"{value:.6g}" for value in row))
