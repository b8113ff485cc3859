"""`up`, `controller`, `shard`: the processes."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn

import typer

from embedding_service.commands.secured import (
    AuditOption,
    AuthorityOption,
    CertificateOption,
    HealthOption,
    InsecureOption,
    KeyOption,
    PolicyOption,
    check_plain,
    files_of,
)
from embedding_service.commands.text import check_address, parse_bytes
from embedding_service.errors import InvalidRequest
from embedding_service.machine import complete_address, prepare_local_ray
from embedding_service.rows import TIERS

if TYPE_CHECKING:
    from embedding_service.commands.up import UpOptions

LOOPBACK = "127.0.0.1"

StoreOption = Annotated[str, typer.Option(help="Store whose models are served: a folder or an fsspec URL.")]
if TYPE_CHECKING:
    Tier = str
else:
    Tier = Literal[tuple(TIERS)]
TierOption = Annotated[
    Tier, typer.Option(help="Where rows are kept: memory; files, for tables larger than memory; a GPU; host and GPU.")
]
ReplicasOption = Annotated[int, typer.Option(min=1, help="Copies of every part, each on another shard.")]
MetricsOption = Annotated[
    int, typer.Option(min=0, max=65535, help="Port of Prometheus metrics, on the host of --listen; 0: none.")
]
HttpHostOption = Annotated[str, typer.Option(help="Address that the cluster's page is at.")]


def _check_advertised(address: str | None) -> str | None:
    if address:
        complete_address(address, 0)
    return address


AdvertiseOption = Annotated[
    str | None,
    typer.Option(
        help="HOST or HOST:PORT by which others reach this process, if that is not --listen.",
        callback=_check_advertised,
    ),
]
ProcessesOption = Annotated[
    int, typer.Option(min=1, help="Processes of a shard, which answer from one copy of its rows: about a core each.")
]


def up(
    store: StoreOption,
    shards: Annotated[int, typer.Option(min=1, help="Shard processes.")] = 4,
    replicas: ReplicasOption = 1,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port at which every shard answers.")] = 7070,
    host: Annotated[str, typer.Option(help="Address to listen on; nothing beyond loopback unless told to.")] = LOOPBACK,
    tier: TierOption = "ram",
    memory: Annotated[
        str | None,
        typer.Option(
            help="Bytes each shard offers for rows. Default: its share of what is available; "
            "with --ray, twice its share of what the store holds."
        ),
    ] = None,
    cache: Annotated[Path | None, typer.Option(help="Folder for parts of a remote store.")] = None,
    processes: ProcessesOption = 1,
    secure: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="TLS and rights: this folder gets an authority, certificates, a policy and an admin's token, all of "
            "which are used.",
        ),
    ] = None,
    audit: AuditOption = None,
    insecure: InsecureOption = False,
    http_port: Annotated[
        int | None,
        typer.Option(min=0, max=65535, help="Port of the cluster's page for a browser; 0: none. Default: a free one."),
    ] = None,
    http_host: HttpHostOption = LOOPBACK,
    metrics_port: Annotated[
        int,
        typer.Option(
            min=0, max=60000, help="Port of the controller's Prometheus metrics, with each shard's after it; 0: none."
        ),
    ] = 0,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Spread the shards over the nodes of a Ray cluster: auto (the one this machine is a node of), its "
            "HOST:PORT, or local (one that starts here). All nodes must see the store.",
        ),
    ] = None,
) -> None:
    """Run a controller and shards on this machine, or in a Ray cluster. Ctrl-C or SIGTERM ends all of them."""
    from embedding_service.commands.up import UpOptions, run

    options = UpOptions(
        store=store,
        shards=shards,
        replicas=replicas,
        host=host,
        port=port,
        tier=tier,
        memory=_rows_memory(memory),
        cache=cache,
        processes=processes,
        secure=secure,
        insecure=insecure,
        audit=audit.absolute() if audit else None,
        http_port=http_port,
        http_host=http_host,
        metrics_port=metrics_port,
    )
    if audit and not secure:
        raise typer.BadParameter("--audit comes with --secure: without it nobody is known or denied")
    if secure and insecure:
        raise typer.BadParameter("--secure and --insecure exclude each other")
    if ray is None:
        if not secure:
            check_plain(insecure, host, http_host, remedy="--secure DIR")
        run(options)
    elif host != LOOPBACK:
        raise typer.BadParameter("with --ray, shards listen on the addresses of their nodes: leave --host out")
    else:
        _run_on_ray(options, ray)
    _leave()


def _rows_memory(given: str | None) -> int | None:
    """Bytes for rows. None for the default. Raises typer.BadParameter for none at all."""
    if given is None:
        return None
    memory = parse_bytes(given)
    if not memory:
        raise typer.BadParameter(f"--memory {given} leaves no room for rows: leave it out for the default")
    return memory


def _run_on_ray(options: UpOptions, address: str) -> None:
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")  # every shard's words
    if address == "local":
        prepare_local_ray()
    try:
        from embedding_service.commands import ray_up
    except ModuleNotFoundError as error:
        raise InvalidRequest(
            f"--ray needs {error.name}, on every node: pip install 'embedding-service[ray]'"
        ) from error
    ray_up.run(options, address)


def controller(
    store: StoreOption,
    listen: Annotated[str, typer.Option(help="HOST:PORT to listen on.", callback=check_address)] = "127.0.0.1:7069",
    advertise: AdvertiseOption = None,
    replicas: Annotated[
        int, typer.Option(min=0, help="Copies of every part, each on another shard; 0: one on every shard.")
    ] = 1,
    expect_shards: Annotated[
        int, typer.Option(min=0, help="Shards to wait for before the first plan; 0: until no more come.")
    ] = 0,
    lost_after: Annotated[float, typer.Option(help="Seconds without a word after which a shard counts as gone.")] = 5.0,
    grace: Annotated[
        float, typer.Option(help="Seconds a shard keeps a part that clients were routed away from.")
    ] = 5.0,
    metrics_port: MetricsOption = 0,
    http_port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port of the cluster's page for a browser, on --http-host; 0: none.")
    ] = 0,
    http_host: HttpHostOption = LOOPBACK,
    control_listen: Annotated[
        str | None,
        typer.Option(
            help="A HOST:PORT of its own for shards. --listen then answers clients alone. With TLS it is needed.",
            callback=check_address,
        ),
    ] = None,
    tls_cert: CertificateOption = None,
    tls_key: KeyOption = None,
    tls_ca: AuthorityOption = None,
    policy: PolicyOption = None,
    audit: AuditOption = None,
    insecure: InsecureOption = False,
    health_listen: HealthOption = None,
) -> None:
    """The process that knows the shards, places the parts and publishes the routing."""
    from embedding_service.controller.server import ControllerOptions, main

    security = files_of(tls_cert, tls_key, tls_ca, policy, audit, insecure, listen, control_listen, http_host)
    if security and control_listen is None:
        raise typer.BadParameter("with TLS, shards need a port of their own: give --control-listen HOST:PORT")
    main(
        ControllerOptions(
            store=store,
            listen=listen,
            advertise=advertise,
            replicas=replicas,
            expect_shards=expect_shards,
            lost_after=lost_after,
            grace=grace,
            metrics_port=metrics_port,
            control_listen=control_listen,
            security=security,
            health_listen=health_listen,
            http_port=http_port,
            http_host=http_host,
        )
    )
    _leave()


def shard(
    store: StoreOption,
    # Checked here. Without a port it would be asked again and again.
    controller: Annotated[
        str,
        typer.Option(help="HOST:PORT of the controller, its --control-listen if it has one.", callback=check_address),
    ],
    listen: Annotated[
        str, typer.Option(help="HOST:PORT to listen on; port 0 takes a free one.", callback=check_address)
    ] = "127.0.0.1:0",
    shared_listen: Annotated[
        str | None,
        typer.Option(
            help="A second HOST:PORT that all shards of this machine listen on together.", callback=check_address
        ),
    ] = None,
    advertise: AdvertiseOption = None,
    id: Annotated[str | None, typer.Option(help="Name of this shard; keep it over restarts.")] = None,
    tier: TierOption = "ram",
    memory: Annotated[
        str | None, typer.Option(help="Bytes to offer for rows. Default: 80% of what is available; mmap: the disk.")
    ] = None,
    cache: Annotated[Path | None, typer.Option(help="Folder for parts of a remote store.")] = None,
    load_rate: Annotated[
        str, typer.Option(help="Bytes a second at which parts are read while lookups are served; 0: no limit.")
    ] = "256MiB",
    topology: Annotated[
        str, typer.Option(help="Zone or node of this shard: copies of a part go to different ones.")
    ] = "",
    drain_seconds: Annotated[
        float, typer.Option(min=0, help="Seconds to wait at most, after SIGTERM, until others hold this shard's parts.")
    ] = 60.0,
    threads: Annotated[int, typer.Option(min=1, help="Threads one gather may use.")] = 1,
    processes: ProcessesOption = 1,
    near: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="Unix socket at which clients of this machine get rows to read in place."),
    ] = None,
    log: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder for the logs of branches that are trained. Default: in the store."),
    ] = None,
    log_sync: Annotated[
        str, typer.Option(help="When pushes of gradients come to disk: never, always, or within so many milliseconds.")
    ] = "100",
    metrics_port: MetricsOption = 0,
    tls_cert: CertificateOption = None,
    tls_key: KeyOption = None,
    tls_ca: AuthorityOption = None,
    policy: PolicyOption = None,
    audit: AuditOption = None,
    insecure: InsecureOption = False,
    health_listen: HealthOption = None,
) -> None:
    """A process that holds parts, answers lookups and trains its parts of branches."""
    from embedding_service.shard.server import ShardOptions, main

    security = files_of(tls_cert, tls_key, tls_ca, policy, audit, insecure, listen, shared_listen)
    given = {"shard_id": id, "cache": cache}
    main(
        ShardOptions(
            controller=controller,
            store=store,
            listen=listen,
            shared_listen=shared_listen,
            advertise=advertise,
            tier=tier,
            memory_limit=_rows_memory(memory) or 0,
            load_rate=parse_bytes(load_rate),
            topology=topology,
            drain_seconds=drain_seconds,
            threads=threads,
            processes=processes,
            near=near,
            metrics_port=metrics_port,
            security=security,
            health_listen=health_listen,
            logs=log,
            log_sync=_log_sync(log_sync),
            **{name: value for name, value in given.items() if value},  # type: ignore[arg-type]
        )
    )
    _leave()


def _log_sync(given: str) -> float:
    """Seconds as `training.log.Log` takes them. Raises typer.BadParameter."""
    if given in (words := {"never": -1.0, "always": 0.0}):
        return words[given]
    if not given.isdecimal() or not 1 <= int(given) <= 60_000:
        raise typer.BadParameter(f"--log-sync must be never, always, or 1 to 60000 milliseconds, got {given!r}")
    return int(given) / 1000


def _leave() -> NoReturn:
    """End this process, whose work is done and closed, without taking the interpreter down first.

    With torch, FBGEMM and gRPC loaded, that takes a second of CPU. The kernel does it in no time. Five processes that
    end together on two cores would be seconds late, and a platform in a hurry would kill them.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
