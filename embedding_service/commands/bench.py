"""`bench`: load on a running service, and what a lookup costs beside an empty call to it."""

from __future__ import annotations

import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from typing import TYPE_CHECKING, Annotated, Any

import typer

from embedding_service.commands.query import DEFAULT_ADDRESS
from embedding_service.commands.secured import TlsOption, TokenOption
from embedding_service.commands.text import JsonOption, check_address, say_json
from embedding_service.errors import InvalidRequest, NotFound, Unavailable

if TYPE_CHECKING:
    from embedding_service import EmbeddingClient
    from embedding_service.commands.load import Load

# Threads of a client process in an open loop, and so its lookups under way.
THREADS = 8
HEALTH_CHECKS = 200
START_SECONDS = 60.0
TIMEOUT = 10.0
# Requests that are made ready before a load. A load that used them all begins again.
READY_IDS = 1 << 20

# Of a client's process.
_client: EmbeddingClient
_barrier: Any


@dataclass(frozen=True)
class Work:
    """What each client asks: `rows` random ids of a table a lookup, for `seconds`. `rate` is one client's."""

    table: str
    table_rows: int
    dtype: str
    rows: int
    seconds: float
    rate: float | None


def bench(
    table: Annotated[str, typer.Option(help="MODEL/TABLE or MODEL@VERSION/TABLE.")],
    address: Annotated[str, typer.Argument(help="HOST:PORT of any shard.", callback=check_address)] = DEFAULT_ADDRESS,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Rows a lookup; may be repeated.")] = None,
    clients: Annotated[int, typer.Option(min=1, help="Client processes.")] = 1,
    seconds: Annotated[float, typer.Option(min=0.1, help="How long each batch is measured.")] = 5.0,
    rate: Annotated[
        float | None,
        typer.Option(min=0.001, help="Open loop: lookups a second in all. Default: each follows an answer."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="What rows become in the client: float32, float16, bfloat16.")] = "float32",
    tls: TlsOption = None,
    token_file: TokenOption = None,
    as_json: JsonOption = False,
) -> None:
    """Latency and throughput of lookups with random ids. Exit code 1 if some failed.

    The floor is the round trip of a health check: a call to the same address that does and carries nothing.
    """
    if dtype not in ("float32", "float16", "bfloat16"):
        raise typer.BadParameter(f"--dtype must be float32, float16 or bfloat16, got {dtype!r}")
    from embedding_service.commands.load import together

    table_rows, dim = _shape(address, table)
    # Processes, because Python's lock would bind a single one. They are spawned: gRPC does not live through a fork.
    context = get_context("spawn")
    loads = []
    with ProcessPoolExecutor(clients, context, _connect, (address, context.Barrier(clients))) as pool:
        for rows in batch or (12, 768, 12288):
            work = Work(table, table_rows, dtype, rows, seconds, rate and rate / clients)
            floor = health_p50(address)
            load = together([task.result() for task in [pool.submit(_load, work, seed) for seed in range(clients)]])
            loads.append((rows, floor, load))
    if as_json:
        say_json({"table": table, "clients": clients, "rate": rate, "loads": [_plain(*each) for each in loads]})
    else:
        _show(loads, dim * (4 if dtype == "float32" else 2), f"{table}, {clients} clients, {_loop(rate)}")
    if any(load.errors for _, _, load in loads):
        raise typer.Exit(1)


def _shape(address: str, name: str) -> tuple[int, int]:
    """Rows and dim of a served table. Raises NotFound, naming the served ones."""
    from embedding_service.client.thin import list_models

    model_name, slash, table_name = name.partition("/")
    if not slash:
        raise InvalidRequest(f"table must be named as MODEL/TABLE, got {name!r}")
    models = list_models(address, TIMEOUT)
    for model in models:
        if model_name in (model.name, f"{model.name}@{model.version}"):
            for table in model.tables:
                if table.name == table_name:
                    return table.rows, table.dim
    known = ", ".join(f"{model.name}/{table.name}" for model in models for table in model.tables)
    raise NotFound(f"no table {name!r} is served; there are: {known or 'none'}")


def health_p50(address: str) -> float:
    """Seconds of a health check: the median of many, one after the other. Raises Unavailable."""
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    from embedding_service.client.channels import open_channel
    from embedding_service.security.access import access_of

    times = []
    with open_channel(address, access_of(None, None)) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        try:
            stub.Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT)
            for _ in range(HEALTH_CHECKS):
                begun = time.perf_counter()
                stub.Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT)
                times.append(time.perf_counter() - begun)
        except grpc.RpcError as error:
            raise Unavailable(f"{address}: the health check failed: {error.details()}") from error  # type: ignore[attr-defined]
    return sorted(times)[len(times) // 2]


def _connect(address: str, barrier: Any) -> None:
    """Set a client's process up, once."""
    global _client, _barrier
    from embedding_service import EmbeddingClient

    _client, _barrier = EmbeddingClient(address, timeout=TIMEOUT, near=False), barrier


def _load(work: Work, seed: int) -> Load:
    """Load, in a client's process, once all clients are there."""
    import torch

    from embedding_service.commands.load import run_load

    generator = torch.Generator().manual_seed(seed)
    count = max(1, READY_IDS // work.rows)
    requests = torch.randint(work.table_rows, (count, work.rows), generator=generator)
    dtype = getattr(torch, work.dtype)

    threads = 1 if work.rate is None else THREADS

    def lookup(thread: int, turn: int) -> None:
        _client.lookup(work.table, requests[(turn * threads + thread) % count], dtype=dtype)

    lookup(0, 0)  # connecting is not measured
    _barrier.wait(START_SECONDS)
    return run_load([partial(lookup, thread) for thread in range(threads)], work.seconds, rate=work.rate)


def _loop(rate: float | None) -> str:
    return "closed loop" if rate is None else f"open loop, {rate:g} lookups due a second"


def _plain(rows: int, floor: float, load: Load) -> dict[str, Any]:
    times = {f"p{share}_seconds": load.percentile(share) for share in (50, 90, 99)}
    rate = len(load.latencies) * rows / load.seconds
    lookups = {"rows": rows, "lookups": len(load.latencies), "rows_per_second": rate, "errors": dict(load.errors)}
    return {**lookups, **times, "floor_seconds": floor}


def _show(loads: list[tuple[int, float, Load]], row_bytes: int, title: str) -> None:
    from rich.table import Table

    from embedding_service.commands.console import wide_console

    shown = Table(title=title, title_justify="left")
    for heading in (
        "rows",
        "lookups",
        "p50 ms",
        "p90 ms",
        "p99 ms",
        "rows/s",
        "MB/s",
        "errors",
        "floor ms",
        "p50/floor",
    ):
        shown.add_column(heading, justify="right")
    for rows, floor, load in loads:
        rate = len(load.latencies) * rows / load.seconds
        shown.add_row(
            f"{rows:,}",
            f"{len(load.latencies):,}",
            *(f"{1e3 * load.percentile(share):.3f}" for share in (50, 90, 99)),
            f"{rate:,.0f}",
            f"{rate * row_bytes / 1e6:,.1f}",
            ", ".join(f"{count} {name}" for name, count in load.errors.items()) or "0",
            f"{1e3 * floor:.3f}",
            f"{load.percentile(50) / floor:.2f}",
        )
    wide_console().print(shown)
