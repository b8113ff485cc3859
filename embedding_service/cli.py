"""The command line. It puts the commands together, and turns deliberate errors into one red line."""

from __future__ import annotations

import sys

import typer

from embedding_service.commands import bench, cluster, overlays, plan, policy, query, storage, store
from embedding_service.errors import EmbeddingServiceError
from embedding_service.foreign import printable

app = typer.Typer(
    help="A parameter service for the giant n-gram embedding tables of language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("import")(store.import_command)
for command in (
    store.split,
    overlays.publish,
    overlays.rollback,
    overlays.diff,
    storage.inspect,
    storage.gc,
    cluster.up,
    cluster.controller,
    cluster.shard,
    plan.plan,
    query.status,
    query.models,
    query.lookup,
    bench.bench,
):
    app.command()(command)
app.add_typer(policy.app, name="policy")


def main() -> None:
    """Run the command line. A failure is one red line and exit code 1. Wrong usage is exit code 2."""
    try:
        app()
    except (EmbeddingServiceError, OSError) as error:
        typer.secho(f"error: {printable(str(error))}", fg="red", err=True)
        sys.exit(1)
