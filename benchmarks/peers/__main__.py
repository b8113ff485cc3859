"""This service and every peer that is installed, over the same rows and ids: `python -m benchmarks.peers`.

    python -m benchmarks.peers --quick                      under two minutes
    python -m benchmarks.peers --quick --only ours raw      peers whose names contain one of these

Writes peers.md, peers.json and plots into --out. Everything listens on loopback and has ended when this ends.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.data import Data, make_data
from benchmarks.peers.base import Peer, Server, Unusable
from benchmarks.peers.raw_grpc import RawGrpc
from benchmarks.peers.redis_mget import Redis
from benchmarks.peers.service import Service
from benchmarks.report import FLOOR, records, show
from benchmarks.rounds import Running, Slice, run_rounds, running

TOKENS = (1, 64, 1024)
FULL_ROWS, QUICK_ROWS = 1 << 20, 1 << 18
SLICE_SECONDS = {1: 0.3, 64: 0.3, 1024: 0.5}


def all_peers(shards: int) -> list[Peer]:
    """In the order in which they are shown."""
    return [
        RawGrpc(stream=True),
        RawGrpc(stream=False),
        Service("fp16", torch.float16, shards),
        Service("int8", torch.float16, shards),
        Redis(),
    ]


@contextmanager
def started(peers: Sequence[Peer], data: Data, console: Console, clients: int = 1) -> Iterator[list[Running]]:
    """All that can run here, with clients that got right rows; who cannot is named."""
    with ExitStack() as stack:
        servers: dict[str, Server | Unusable] = {}
        ready: list[Running] = []
        for peer in peers:
            try:
                if peer.server_name not in servers:
                    servers[peer.server_name] = _serve(peer, data, stack)
                server = servers[peer.server_name]
                if isinstance(server, Unusable):
                    raise server
                ready.append(stack.enter_context(running(peer, server, data, clients)))
            except Unusable as error:
                console.print(f"skipped: {peer.name}: {error}", style="yellow", soft_wrap=True)
        yield ready


def _serve(peer: Peer, data: Data, stack: ExitStack) -> Server | Unusable:
    try:
        return stack.enter_context(peer.serve(data, data.folder))
    except Unusable as error:
        return error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smaller table, fewer rounds, one table of results")
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="peers whose name contains one of these")
    parser.add_argument("--shards", type=int, default=1, help="shards of our service where they are not varied")
    parser.add_argument("--rows", type=int, help="rows of the table")
    parser.add_argument("--rounds", type=int, help="rounds of the first table")
    parser.add_argument("--out", type=Path, default=Path("build/benchmarks"), help="folder for what is written")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    console = Console(highlight=False)
    console = console if console.is_terminal else Console(highlight=False, width=150)
    begun = time.monotonic()
    arguments.out.mkdir(parents=True, exist_ok=True)
    peers = [
        peer
        for peer in all_peers(arguments.shards)
        if not arguments.only or peer.name == FLOOR or any(text in peer.name for text in arguments.only)
    ]
    with tempfile.TemporaryDirectory(prefix="benchmark-") as work:
        data = make_data(Path(work) / "data", arguments.rows or (QUICK_ROWS if arguments.quick else FULL_ROWS))
        console.print(f"{data.rows:,} rows, made in {time.monotonic() - begun:.0f} s")
        slices = [Slice(tokens, SLICE_SECONDS[tokens]) for tokens in TOKENS]
        with started(peers, data, console) as ready:
            console.print(f"{len(ready)} peers started, right rows from each, after {time.monotonic() - begun:.0f} s")
            rounds = arguments.rounds or (6 if arguments.quick else 12)
            found = records(run_rounds(ready, slices, rounds))
        found.sort(key=lambda record: record["tokens"])
        text = show(f"one client in a closed loop, {rounds} rounds", found, console)
    (arguments.out / "peers.md").write_text(text)
    (arguments.out / "peers.json").write_text(json.dumps(found, indent=1))
    console.print(f"{time.monotonic() - begun:.0f} s; written to {arguments.out}")


if __name__ == "__main__":
    main()
