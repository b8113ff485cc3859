"""The command line. It puts the commands together, and turns deliberate errors into one red line."""

from __future__ import annotations

import sys

import typer

from embedding_service.commands import bench, cluster, doctor, overlays, plan, policy, query, storage, store, top
from embedding_service.errors import EmbeddingServiceError
from embedding_service.foreign import printable

# What each command's --help shows, a line each.
EXAMPLES: dict[str, tuple[str, ...]] = {
    "import": (
        "import ./LongCat-Flash-Lite --store ./store --name longcat",
        "import ./tables.safetensors --store s3://bucket/store --name other --generic embed.weight=words --dtype keep",
    ),
    "split": ("split ./LongCat-Flash-Lite ./parted",),
    "publish": ("publish --base longcat@1 --rows rows.safetensors --store ./store",),
    "rollback": ("rollback longcat --store ./store --to 1",),
    "diff": ("diff longcat@1 longcat@2 --store ./store --json",),
    "inspect": ("inspect ./store --verify", "inspect s3://bucket/store --json"),
    "gc": ("gc ./store --keep 2", "gc ./store --keep 2 --drafts --yes"),
    "remove-branch": ("remove-branch longcat@tuning --store ./store",),
    "up": (
        "up --store ./store --shards 4",
        "up --store ./store --shards 2 --replicas 2 --tier mmap --http-port 7080",
        "up --store ./store --secure ./secrets",
    ),
    "controller": ("controller --store ./store --listen 127.0.0.1:7069 --http-port 7080 --metrics-port 9090",),
    "shard": ("shard --store ./store --controller 127.0.0.1:7069 --memory 16GiB",),
    "plan": (
        "plan --store ./store --nodes 4x16GiB --replicas 2",
        "plan --rows 320001536 --dim 160 --nodes 8x16GiB --from-nodes 4x16GiB",
    ),
    "status": ("status", "status shard.example:7070 --tls ./secrets/client --json"),
    "models": ("models localhost:7070 --json",),
    "lookup": ("lookup longcat/ngram 130 5", "lookup longcat@1/ngram 130 --address localhost:7070 --json"),
    "bench": ("bench --table longcat/ngram --batch 12 --batch 768 --clients 2 --seconds 10",),
    "top": ("top", "top shard.example:7070 --every 2"),
    "doctor": ("doctor --store ./store", "doctor --address localhost:7070 --tls ./secrets/client --json"),
}
app = typer.Typer(
    help="A parameter service for the giant n-gram embedding tables of language models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
for command in (
    store.import_command,
    store.split,
    overlays.publish,
    overlays.rollback,
    overlays.diff,
    storage.inspect,
    storage.gc,
    storage.remove_branch_command,
    cluster.up,
    cluster.controller,
    cluster.shard,
    plan.plan,
    query.status,
    query.models,
    query.lookup,
    bench.bench,
    top.top,
    doctor.doctor,
):
    name = command.__name__.removesuffix("_command").replace("_", "-")
    # A blank line ends a paragraph of the help.
    lines = [f"embedding-service {line}" for line in EXAMPLES[name]]
    app.command(name, epilog="\n\n".join(["Examples:", *lines]))(command)
app.add_typer(policy.app, name="policy")


def main() -> None:
    """Run the command line. A failure is one red line and exit code 1. Wrong usage is exit code 2."""
    try:
        app()
    except (EmbeddingServiceError, OSError) as error:
        typer.secho(f"error: {printable(str(error))}", fg="red", err=True)
        sys.exit(1)
