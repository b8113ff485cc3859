"""What connections cost a shard: its memory, and its time while nobody asks and while one asks.

Each connection has an open stream that was used once, as a worker's has between two tokens.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import grpc
import numpy as np
import psutil

from benchmarks.growth.lookups import HEADS, ROWS
from benchmarks.peers.base import START_SECONDS, child, receive, service
from benchmarks.rounds import cpu_seconds
from embedding_service.client.channels import CHANNEL_OPTIONS
from embedding_service.client.status import get_status
from embedding_service.client.streams import Ended, Stream, open_stream
from embedding_service.placement.routing import Routing
from embedding_service.wire import embedding_pb2 as wire
from embedding_service.wire.embedding_pb2_grpc import EmbeddingServiceStub
from embedding_service.wire.lookup_codec import encode_lookup

# Of one client process.
AT_A_TIME = 250
LOOKUPS = 2000
# The last one counts: here no attempt to connect ends early because the machine is busy.
OPTIONS = [*CHANNEL_OPTIONS, ("grpc.use_local_subchannel_pool", 1), ("grpc.min_reconnect_backoff_ms", 20_000)]


@dataclass
class Held:
    """A shard with `connections` connections. `per_lookup` is its CPU seconds of a 12-row lookup, `idle` of a second.

    `turns` is `per_lookup` if each lookup comes on another connection. `client_bytes` is what a connection takes there.
    """

    connections: int
    resident: int
    files: int
    idle: float
    per_lookup: float
    turns: float
    client_bytes: float


def _open(pipe: Connection, address: str, count: int) -> None:
    """A client's process. It opens connections to a shard, then looks up in turn on as many as the pipe says."""
    stub = EmbeddingServiceStub(grpc.insecure_channel(address))
    routing = Routing(stub.GetRouting(wire.GetRoutingRequest()))
    model = routing.model("wide")
    table = model.table("rows")
    ids = np.random.default_rng(1).integers(0, ROWS, (64, HEADS))
    requests = [
        encode_lookup(model.full_name, "rows", wire.ROW_ENCODING_STORED, *routing.age, each, table.rows).streamed
        for each in ids
    ]
    channels, streams, before = [], [], psutil.Process().memory_info().rss
    for _ in range(count):
        channels.append(grpc.insecure_channel(address, OPTIONS))
        streams.append(open_stream(channels[-1]))
        _ask(streams[-1], requests[0])
    pipe.send((psutil.Process().memory_info().rss - before) / count)
    with contextlib.suppress(EOFError):
        while True:
            used = streams[: pipe.recv()]
            for turn in range(LOOKUPS):
                _ask(used[turn % len(used)], requests[turn % len(requests)])
            pipe.send(None)


def _ask(stream: Stream, request: bytes) -> None:
    stream.send(request)
    answer = stream.receive()
    assert not isinstance(answer, Ended), answer


def measure(store: Path, folder: Path, counts: Sequence[int], seconds: float) -> list[Held]:
    """One shard with ever more connections, `counts` in growing order. `seconds` pass without a lookup."""
    found = []
    with ExitStack() as stack:
        shared, _ = stack.enter_context(service(store, folder / "up-connections.log", "--shards=1"))
        [report] = get_status(shared).shards
        shard, pipes, open_now, of_client = psutil.Process(report.stats.pid), [], 0, 0.0
        for count in counts:
            while open_now < count:
                more = min(AT_A_TIME, count - open_now)
                pipes.append(stack.enter_context(child(_open, report.address, more))[1])
                of_client = receive(pipes[-1], START_SECONDS)
                open_now += more
            found.append(_held(shard, pipes, open_now, of_client, seconds))
    return found


def _held(shard: psutil.Process, pipes: Sequence[Connection], count: int, of_client: float, seconds: float) -> Held:
    before, began = cpu_seconds([shard.pid]), time.perf_counter()
    time.sleep(seconds)
    idle = (cpu_seconds([shard.pid]) - before) / (time.perf_counter() - began)
    costs: list[float] = []
    for used in (1, count):
        before, began, asked = cpu_seconds([shard.pid]), time.perf_counter(), 0
        for pipe in pipes[-1:] if used == 1 else pipes:
            pipe.send(used)
            receive(pipe, START_SECONDS)
            asked += LOOKUPS
        took = time.perf_counter() - began
        costs.append((cpu_seconds([shard.pid]) - before - idle * took) / asked)
    per_lookup, turns = costs
    return Held(count, shard.memory_info().rss, shard.num_fds(), idle, per_lookup, turns, of_client)
