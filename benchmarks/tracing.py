"""What traces cost a lookup: median times of clients that take turns, in one run.

    python -m benchmarks.tracing [--rounds 15] [--seconds 1]

Each client is a process. The first one traces nothing and asks a service that traces nothing. The others ask a service
whose shard sends spans to a collector in a process of its own. They trace none, 1 % or all of their lookups. Lookups
are of 192 rows, by call ("wired") and in place ("near"). What counts is the median of the rounds'
ratios to the first client. It is measured twice in each round, and its second ratio is the machine's own noise.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, HTTPServer
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from benchmarks.data import make_data
from benchmarks.peers.base import child, receive, service

IDS = 192
TABLE = "int8/ngram"
# Names of clients, and the share of their lookups that they trace. None: traces are off.
CLIENTS: dict[str, float | None] = {"off": None, "off again": None, "0 %": 0.0, "1 %": 0.01, "all": 1.0}


def _collect(pipe: Connection) -> None:
    """Takes spans, and throws them away."""

    class Sink(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

    with HTTPServer(("127.0.0.1", 0), Sink) as server:
        server.timeout = 0.2
        pipe.send(server.server_port)
        while not pipe.poll():
            server.handle_request()


def _ask(pipe: Connection, address: str, variables: Mapping[str, str], near: bool, rows: int) -> None:
    """For each number of seconds that comes, answers with the median microseconds of a lookup."""
    os.environ.update(variables)
    from embedding_service import EmbeddingClient

    chance = torch.Generator().manual_seed(1)
    with EmbeddingClient(address, near=near, timeout=30) as client:
        while seconds := pipe.recv():
            took, until = [], time.perf_counter() + seconds
            while time.perf_counter() < until:
                ids = torch.randint(0, rows, (IDS,), generator=chance)
                began = time.perf_counter()
                client.lookup(TABLE, ids)
                took.append(time.perf_counter() - began)
            pipe.send(1e6 * statistics.median(took))


def variables(collector: int, share: float | None) -> dict[str, str]:
    """Of OpenTelemetry, for a process that traces this share."""
    if share is None:
        return {}
    return {
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{collector}",
        "OTEL_TRACES_SAMPLER": "parentbased_traceidratio",
        "OTEL_TRACES_SAMPLER_ARG": str(share),
    }


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=1.0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="benchmark-") as name, ExitStack() as stack:
        folder = Path(name)
        data = make_data(folder / "data", 1 << 16)
        collector = receive(stack.enter_context(child(_collect))[1], 30)
        quiet, _ = stack.enter_context(service(data.store, folder / "quiet.log", "--shards=1"))
        traced = variables(collector, 0.0)
        os.environ.update(traced)
        tracing, _ = stack.enter_context(service(data.store, folder / "tracing.log", "--shards=1"))
        for variable in traced:
            del os.environ[variable]
        for near in (False, True):
            with ExitStack() as clients:
                pipes = {
                    name: clients.enter_context(
                        child(_ask, quiet if share is None else tracing, variables(collector, share), near, data.rows)
                    )[1]
                    for name, share in CLIENTS.items()
                }
                rounds = []
                for number in range(given.rounds + 1):
                    took = {}
                    for client, pipe in pipes.items():
                        pipe.send(given.seconds)
                        took[client] = receive(pipe, 60)
                    if number:  # the first round warms up
                        rounds.append(took)
                for pipe in pipes.values():
                    pipe.send(0)
            print(
                "near" if near else "wired", f"{statistics.median(each['off'] for each in rounds):.0f} us", flush=True
            )
            for client in list(CLIENTS)[1:]:
                ratios = [each[client] / each["off"] for each in rounds]
                low, middle, high = statistics.quantiles(ratios, n=4)
                print(f"  {client}: {middle:.3f} of off (quartiles {low:.3f} to {high:.3f})", flush=True)


if __name__ == "__main__":
    main()
