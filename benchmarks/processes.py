"""What more processes bring to one shard: `python -m benchmarks.processes`.

Clients ask shards of 1, 2 and 4 processes (`--processes`), and do as little as they can: requests are made beforehand,
answers are not looked at, several are under way. They share this machine's cores with the shard, so a shard cannot gain
more than what they leave.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

import grpc
import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.data import HEADS, READY, TABLE, Data, make_data
from benchmarks.peers.base import START_SECONDS, child, receive, service
from benchmarks.rounds import cpu_seconds
from embedding_service.client.channels import CHANNEL_OPTIONS
from embedding_service.client.status import get_status
from embedding_service.client.streams import Ended, open_stream
from embedding_service.placement.routing import Routing
from embedding_service.wire import embedding_pb2 as wire
from embedding_service.wire.embedding_pb2_grpc import EmbeddingServiceStub
from embedding_service.wire.lookup_codec import encode_lookup

CLIENTS = 2
# Connections of each client: the kernel spreads connections, not lookups, over processes.
CONNECTIONS = 6
MODEL = "fp16"


def client(pipe: Connection, data: Data, shard: str) -> None:
    """For each (tokens, seconds) from the pipe, keep a lookup under way on each connection. Send back the count."""
    routing = Routing(EmbeddingServiceStub(grpc.insecure_channel(shard)).GetRouting(wire.GetRoutingRequest()))
    options = [*CHANNEL_OPTIONS, ("grpc.use_local_subchannel_pool", 1)]
    channels = [grpc.insecure_channel(shard, options) for _ in range(CONNECTIONS)]
    streams = [open_stream(channel) for channel in channels]
    for stream in streams:  # connects
        stream.send(_requests(data, routing, 1)[0])
        stream.receive()
    pipe.send(None)
    while True:
        try:
            tokens, seconds = pipe.recv()
        except EOFError:
            return
        requests = _requests(data, routing, tokens)
        for stream in streams:
            stream.send(requests[0])
        answered, end = 0, time.perf_counter() + seconds
        while time.perf_counter() < end:
            for stream in streams:
                answer = stream.receive()
                assert not isinstance(answer, Ended), answer
                answered += 1
                stream.send(requests[answered % len(requests)])
        for stream in streams:
            stream.receive()
        pipe.send(answered)


def _requests(data: Data, routing: Routing, tokens: int) -> list[bytes]:
    model = routing.model(MODEL)
    table = model.table(TABLE)
    return [
        encode_lookup(model.full_name, TABLE, wire.ROW_ENCODING_STORED, *routing.age, ids, table.rows).streamed
        for ids in data.requests("uniform", tokens, seed=1)
    ]


@contextmanager
def shard(data: Data, folder: Path, processes: int) -> Iterator[tuple[list[int], list[Connection]]]:
    """A running shard: its processes' ids, and clients that wait for orders."""
    with ExitStack() as stack:
        up = service(data.store, folder / f"up-{processes}.log", "--shards=1", f"--processes={processes}")
        shared, _ = stack.enter_context(up)
        [report] = get_status(shared).shards
        main = psutil.Process(report.stats.pid)
        address = int(report.address.rpartition(":")[2])
        while sum(_listens(each, address) for each in main.children()) < processes - 1:
            time.sleep(0.1)
        clients = [stack.enter_context(child(client, data, report.address))[1] for _ in range(CLIENTS)]
        for pipe in clients:
            receive(pipe, START_SECONDS)
        yield [main.pid, *(each.pid for each in main.children())], clients


def _listens(process: psutil.Process, port: int) -> bool:
    return any(each.laddr.port == port and each.status == psutil.CONN_LISTEN for each in process.net_connections("tcp"))


def main() -> None:
    """Print rows/s for each number of processes, and its ratio to one process in the same round."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=0.5)
    parser.add_argument("--out", type=Path, default=Path("build/benchmarks"), help="folder for processes.json")
    arguments = parser.parse_args()
    found: dict[tuple[int, int], list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory(prefix="benchmark-") as work, ExitStack() as stack:
        data = make_data(Path(work) / "data", 1 << 18)
        shards = {count: stack.enter_context(shard(data, Path(work), count)) for count in arguments.processes}
        for _ in range(arguments.rounds):
            for tokens in READY:
                for count, (pids, clients) in shards.items():
                    cpu = cpu_seconds(pids)
                    for pipe in clients:
                        pipe.send((tokens, arguments.seconds))
                    answered = sum(receive(pipe, START_SECONDS) for pipe in clients)
                    rate = answered * tokens * HEADS / arguments.seconds
                    cost = 1e3 * (cpu_seconds(pids) - cpu) / answered
                    found.setdefault((tokens, count), []).append((rate, cost))
    first = arguments.processes[0]
    table = Table(title=f"A shard's processes: {CLIENTS} clients with {CONNECTIONS} connections each, ids at random")
    for column in ("tokens", "processes", "rows/s", f"to {first}", "shard's CPU ms a lookup"):
        table.add_column(column, justify="right")
    records = []
    for (tokens, count), rounds in found.items():
        rates, costs = np.array(rounds).T
        ratio = float(np.median(rates / np.array(found[tokens, first])[:, 0]))
        records.append(
            {"tokens": tokens, "processes": count, "rows_per_second": rates.mean(), "ratio": ratio, "ms": costs.mean()}
        )
        table.add_row(str(tokens), str(count), f"{rates.mean():,.0f}", f"{ratio:.2f}", f"{costs.mean():.3f}")
    Console(highlight=False).print(table)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "processes.json").write_text(json.dumps(records, indent=1))


if __name__ == "__main__":
    main()
