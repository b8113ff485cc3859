"""Many tasks of one event loop look tokens up: joined to few requests, and each by itself.

    python -m benchmarks.tasks

One client, one shard, a token (12 rows) a lookup, 1 to 64 tasks in a closed loop. "alone" is the same client with
joining switched off. They take turns, and ratios are medians over the rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import psutil
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.data import TABLE, make_data
from benchmarks.peers.base import service
from benchmarks.rounds import cpu_seconds
from embedding_service import EmbeddingClient
from embedding_service.client import coalescing

TASKS = (1, 4, 16, 64)
JOINED, ALONE = "joined", "alone"


async def lookups(client: EmbeddingClient, requests: Sequence[torch.Tensor], tasks: int, seconds: float) -> int:
    """How many were answered."""
    end, answered = time.perf_counter() + seconds, 0

    async def ask(first: int) -> None:
        nonlocal answered
        turn = first
        while time.perf_counter() < end:
            await client.lookup_async(f"int8/{TABLE}", requests[turn % len(requests)], dtype=torch.float16)
            answered += 1
            turn += tasks

    await asyncio.gather(*(ask(task) for task in range(tasks)))
    return answered


def main() -> None:
    """Print lookups/s and CPU for each number of tasks, and the ratio of the one way to the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=0.5)
    parser.add_argument("--out", type=Path, default=Path("build/benchmarks"), help="folder for tasks.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    small, found = coalescing.SMALL, dict[tuple[int, str], list[tuple[float, float, float]]]()
    with tempfile.TemporaryDirectory(prefix="benchmark-") as work:
        data = make_data(Path(work) / "data", 1 << 18)
        requests = [torch.from_numpy(ids) for ids in data.requests("uniform", 1, seed=1)]
        with service(data.store, Path(work) / "up.log", "--shards=1") as (address, running):
            shards = [process.pid for process in psutil.Process(running.pid).children(recursive=True)]
            with EmbeddingClient(address, near=False) as client:
                for _ in range(arguments.rounds):
                    for tasks in TASKS:
                        for way in (JOINED, ALONE):
                            coalescing.SMALL = small if way == JOINED else 0
                            mine, theirs = time.process_time(), cpu_seconds(shards)
                            answered = asyncio.run(lookups(client, requests, tasks, arguments.seconds))
                            cpu = (time.process_time() - mine, cpu_seconds(shards) - theirs)
                            found.setdefault((tasks, way), []).append(
                                (answered / arguments.seconds, *(1e3 * each / answered for each in cpu))
                            )
    table = Table(title="Tasks of one event loop, a token a lookup")
    for column in ("tasks", "way", "lookups/s", "to alone", "client CPU ms", "shard CPU ms"):
        table.add_column(column, justify="right")
    records = []
    for (tasks, way), rounds in found.items():
        rate, client_ms, shard_ms = (float(value) for value in np.median(rounds, 0))
        ratio = float(np.median(np.array(rounds)[:, 0] / np.array(found[tasks, ALONE])[:, 0]))
        records.append({"tasks": tasks, "way": way, "rate": rate, "ratio": ratio, "ms": [client_ms, shard_ms]})
        table.add_row(str(tasks), way, f"{rate:,.0f}", f"{ratio:.2f}", f"{client_ms:.3f}", f"{shard_ms:.3f}")
    Console(highlight=False).print(table)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "tasks.json").write_text(json.dumps(records, indent=1))


if __name__ == "__main__":
    main()
