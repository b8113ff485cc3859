"""This service and every peer that is installed, over the same rows and ids: `python -m benchmarks.peers`.

    python -m benchmarks.peers --quick                      under two minutes
    python -m benchmarks.peers --quick --only ours raw      peers whose names contain one of these
    python -m benchmarks.peers --quick --link 10            over a link of 10 Gbit/s; needs root

Writes peers.md, peers.json and plots into --out. Everything listens on loopback and has ended when this ends.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.data import HEADS, Data, make_data
from benchmarks.peers.base import Peer, Server, Unusable
from benchmarks.peers.in_process import Fbgemm, IndexSelect
from benchmarks.peers.mooncake import Mooncake
from benchmarks.peers.raw_grpc import RawGrpc
from benchmarks.peers.ray_actor import RayActor
from benchmarks.peers.redis_mget import Redis
from benchmarks.peers.service import Secured, Service
from benchmarks.peers.torch_rpc import TorchRpc
from benchmarks.report import FLOOR, Record, plot_all, records, show
from benchmarks.rounds import Running, Slice, run_rounds, running

TOKENS = (1, 64, 1024)
FULL_ROWS, QUICK_ROWS = 1 << 20, 1 << 18
SLICE_SECONDS = {1: 0.3, 64: 0.3, 1024: 0.5}
# Set in a process that has the namespace of `--link`.
BEHIND_A_LINK = "BENCHMARK_BEHIND_A_LINK"


def all_peers(shards: int) -> list[Peer]:
    """In the order in which they are shown."""
    return [
        RawGrpc(stream=True),
        RawGrpc(stream=False),
        *ours(shards),
        Service("fp16", torch.float32, shards),
        *ours(shards, near=True),
        *secured(shards),
        Redis(),
        TorchRpc(),
        TorchRpc(one_host=True),
        RayActor(),
        Mooncake(),
        IndexSelect(),
        Fbgemm(),
    ]


def ours(shards: int, *, near: bool = False) -> list[Peer]:
    """Rows as fp16, and as int8 that the client decodes: sent, or read in place."""
    return [Service(stored, torch.float16, shards, near) for stored in ("fp16", "int8")]


def secured(shards: int) -> list[Peer]:
    """Ours behind TLS, by a certificate and by a token."""
    return [Secured("int8", token, shards) for token in (False, True)]


@contextmanager
def started(peers: Sequence[Peer], data: Data, console: Console, clients: int = 1) -> Iterator[list[Running]]:
    """All peers that can run here, with clients that got right rows. The others are named."""
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


def peers_section(
    peers: Sequence[Peer], data: Data, console: Console, rounds: int, quick: bool
) -> dict[str, list[Record]]:
    """All peers: one client in a closed loop, ids at random and of a text, and then in an open loop."""
    with started(peers, data, console) as ready:
        uniform = [Slice(tokens, SLICE_SECONDS[tokens]) for tokens in TOKENS]
        found = {"peers": records(run_rounds(ready, uniform, rounds))}
        text = [Slice(tokens, SLICE_SECONDS[tokens], ids="text") for tokens in ((64,) if quick else TOKENS)]
        found["text"] = records(run_rounds(ready, text, max(2, rounds // 2)))
        if not quick:
            remote = [peer for peer in ready if not isinstance(peer.peer, IndexSelect)]
            found["open"] = records(run_rounds(remote, open_slices(found["peers"]), 3))
    return found


def open_slices(closed: Sequence[Record]) -> list[Slice]:
    """Open loops at shares of the floor's closed-loop rate, sent by four threads."""
    floor = {record["tokens"]: 1e3 / record["p50_ms"] for record in closed if record["peer"] == FLOOR}
    due = [(1, 0.25), (64, 0.1), (64, 0.25), (64, 0.5)]
    return [Slice(tokens, 0.5, rate=round(share * floor[tokens]), threads=4) for tokens, share in due]


def clients_section(data: Data, console: Console, wanted: Callable[[Peer], bool]) -> list[Record]:
    """Throughput with more clients, each a process."""
    peers = [RawGrpc(stream=True), RawGrpc(stream=False), *ours(1), *ours(1, near=True), Redis(), IndexSelect()]
    peers = [peer for peer in peers if wanted(peer)]
    with started(peers, data, console, clients=8) as ready:
        return records(run_rounds(ready, [Slice(64, 0.5, clients=clients) for clients in (1, 2, 4, 8)], 3))


def shards_section(data: Data, console: Console) -> list[Record]:
    """Our service with more shards. The floor is always one process."""
    slices = [Slice(tokens, SLICE_SECONDS[tokens], clients=clients) for tokens in TOKENS for clients in (1, 4)]
    found = []
    for shards in (1, 2, 4):
        with started([RawGrpc(stream=True), *ours(shards)], data, console, clients=4) as ready:
            found += records(run_rounds(ready, slices, 3), shards=shards)
    return found


def behind_a_link(gbit: float) -> None:
    """Start again, once, in a network namespace whose loopback interface carries `gbit` Gbit/s."""
    if os.environ.pop(BEHIND_A_LINK, None):
        return
    limit = f"ip link set lo up && tc qdisc add dev lo root tbf rate {gbit}gbit burst 512kb latency 20ms"
    command = ["unshare", "--net", "sh", "-c", f'{limit} && exec "$@"', "sh", sys.executable, "-m", "benchmarks.peers"]
    os.execvpe(command[0], [*command, *sys.argv[1:]], {**os.environ, BEHIND_A_LINK: "1"})


TITLES = {
    "peers": "One client in a closed loop, ids at random",
    "text": "One client in a closed loop, ids of a text",
    "open": "One client process with four threads in an open loop, ids at random",
    "clients": "Clients in a closed loop, 64 tokens a lookup, one shard",
    "shards": "Shards, clients in a closed loop",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smaller table, fewer rounds, the first two sections")
    parser.add_argument(
        "--only", nargs="+", metavar="TEXT", help="peers whose names contain one of these, and the floor"
    )
    parser.add_argument("--sections", nargs="+", choices=["peers", "clients", "shards"], help="default: all, or peers")
    parser.add_argument("--shards", type=int, default=1, help="shards of our service where they are not varied")
    parser.add_argument("--rounds", type=int, help="rounds of closed loops over all peers; default 8, quick: 3")
    parser.add_argument("--rows", type=int, help="rows of the table")
    parser.add_argument("--link", type=float, metavar="GBIT", help="what the loopback interface carries a second")
    parser.add_argument("--out", type=Path, default=Path("build/benchmarks"), help="folder for what is written")
    arguments = parser.parse_args()
    if arguments.link:
        behind_a_link(arguments.link)
    sections = arguments.sections or (["peers"] if arguments.quick else ["peers", "clients", "shards"])
    rounds = arguments.rounds or (3 if arguments.quick else 8)
    console = Console(highlight=False)
    console = console if console.is_terminal else Console(highlight=False, width=150)
    only = arguments.only

    def wanted(peer: Peer) -> bool:
        return not only or peer.name == FLOOR or any(text in peer.name for text in only)

    peers = [peer for peer in all_peers(arguments.shards) if wanted(peer)]
    begun = time.monotonic()
    found: dict[str, list[Record]] = {}
    with tempfile.TemporaryDirectory(prefix="benchmark-") as work:
        data = make_data(Path(work) / "data", arguments.rows or (QUICK_ROWS if arguments.quick else FULL_ROWS))
        console.print(f"{data.rows:,} rows of {HEADS} heads, made in {time.monotonic() - begun:.0f} s")
        if "peers" in sections:
            found |= peers_section(peers, data, console, rounds, arguments.quick)
        if "clients" in sections:
            found["clients"] = clients_section(data, console, wanted)
        if "shards" in sections:
            found["shards"] = shards_section(data, console)
    arguments.out.mkdir(parents=True, exist_ok=True)
    text = "\n".join(show(TITLES[section], rows, console) for section, rows in found.items())
    (arguments.out / "peers.md").write_text(text)
    (arguments.out / "peers.json").write_text(json.dumps(found, indent=1))
    plot_all(found, arguments.out)
    console.print(f"{time.monotonic() - begun:.0f} s; tables, JSON and plots are in {arguments.out}")


if __name__ == "__main__":
    main()
