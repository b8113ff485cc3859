"""What lookups feel while their shard loads parts, at several --load-rate: `python -m benchmarks.loading`.

A shard for each rate serves one small model. A new version of a big model is published to it, and lookups are measured
until all its parts are held. Rates take turns within a round, and each round compares a shard with itself before.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.data import DIM, TABLE, Data, Ids, make_data
from embedding_service import EmbeddingClient
from embedding_service.client.status import get_status
from embedding_service.commands.console import wide_console
from embedding_service.commands.text import parse_bytes
from embedding_service.commands.up import start_process, stop_processes, wait_until_serving
from embedding_service.machine import free_port

HOST = "127.0.0.1"
SERVED, BIG = "int8", "fp16"
TOKENS = 16
CALM_SECONDS = 1.5
LOAD_SECONDS = 60.0


@dataclass
class Shard:
    """One shard with a store and a controller of its own. Latencies are in seconds, a list for each round."""

    rate: str
    store: Path
    controller: str
    client: EmbeddingClient
    calm: list[list[float]] = field(default_factory=list)
    loading: list[list[float]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def state(self) -> tuple[str, bool]:
        """The version of the big model that is served, and whether all assigned parts are held."""
        status = get_status(self.controller)
        [version] = [model.model.version for model in status.models if model.model.name == BIG and model.serving]
        return version, not any(shard.parts_missing for shard in status.shards)

    def publish(self) -> str:
        """The same files as a new version of the big model; returns its name."""
        folder = self.store / BIG
        newest = max(folder.iterdir(), key=lambda path: int(path.name))
        version = str(int(newest.name) + 1)
        shutil.copytree(newest / TABLE, folder / version / TABLE, copy_function=os.link)
        manifest = json.loads((newest / "manifest.json").read_text()) | {"version": version}
        (folder / version / "manifest.json").write_text(json.dumps(manifest))
        return version


@contextmanager
def running(data: Data, folder: Path, rate: str) -> Iterator[Shard]:
    """A controller and one shard that loads at `rate`."""
    store = folder / rate
    shutil.copytree(data.store, store, copy_function=os.link)
    controller, address = (f"{HOST}:{free_port()}" for _ in range(2))
    children: list[subprocess.Popen[bytes]] = []
    common = (f"--store={store}",)
    try:
        children.append(
            start_process(["controller", *common, f"--listen={controller}", "--expect-shards=1", "--grace=0.5"])
        )
        options = (f"--listen={address}", f"--load-rate={rate}", "--memory=4GiB", "--drain-seconds=0")
        children.append(start_process(["shard", *common, f"--controller={controller}", *options]))
        wait_until_serving(controller, lambda: None, 1, wide_console(stderr=True))
        with EmbeddingClient(address, near=False) as client:
            yield Shard(rate, store, controller, client)
    finally:
        stop_processes(children)


def one_round(shard: Shard, requests: list[Ids]) -> None:
    """Latencies before a load and from the moment a new version is published until it is served."""
    begin, (served, _) = time.monotonic(), shard.state()
    shard.calm.append(_look_up(shard, requests, lambda: time.monotonic() - begin > CALM_SECONDS))
    version, began = shard.publish(), time.monotonic()
    while shard.state() == (served, True):
        if time.monotonic() - began > LOAD_SECONDS:
            raise SystemExit(f"version {version} was not loaded within {LOAD_SECONDS:.0f} s")
        time.sleep(0.002)
    began = asked = time.monotonic()

    def loaded() -> bool:
        nonlocal asked
        if time.monotonic() - asked < 0.05:
            return False
        asked = time.monotonic()
        return shard.state()[0] == version or asked - began > LOAD_SECONDS

    shard.loading.append(_look_up(shard, requests, loaded))
    shard.seconds.append(time.monotonic() - began)


def _look_up(shard: Shard, requests: list[Ids], ended: Callable[[], bool]) -> list[float]:
    """Seconds of each lookup, one after the other until `ended`."""
    seconds: list[float] = []
    while not ended():
        ids = torch.from_numpy(requests[len(seconds) % len(requests)])
        began = time.perf_counter()
        rows = shard.client.lookup(f"{SERVED}/{TABLE}", ids)
        seconds.append(time.perf_counter() - began)
        assert rows.shape == (len(ids), DIM)
    return seconds


def ratio(shard: Shard, share: float) -> float:
    """A percentile while loading over the same round's before: the rounds' median."""
    return float(
        np.median(
            [
                np.percentile(loading, share) / np.percentile(calm, share)
                for loading, calm in zip(shard.loading, shard.calm, strict=True)
            ]
        )
    )


def table(shards: list[Shard], size: int, rounds: int) -> Table:
    """The figures, for people."""
    title = f"{TOKENS * 12} rows a lookup while {size >> 20:,} MiB are loaded, {rounds} rounds"
    result = Table("load rate", title=title)
    columns = ("load s", "lookups", "p50 ms", "p99 ms", "p50 to calm", "p99 to calm", "longest ms", "calm longest ms")
    for column in columns:
        result.add_column(column, justify="right")
    for shard in shards:
        loading, calm = np.concatenate(shard.loading) * 1e3, np.concatenate(shard.calm) * 1e3
        result.add_row(
            "no limit" if shard.rate == "0" else f"{shard.rate}/s",
            f"{np.median(shard.seconds):.1f}",
            f"{len(loading):,}",
            *(f"{np.percentile(loading, share):.2f}" for share in (50, 99)),
            *(f"{ratio(shard, share):.2f}" for share in (50, 99)),
            f"{loading.max():.0f}",
            f"{calm.max():.0f}",
        )
    return result


def main() -> None:
    """Run it and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", nargs="+", default=["0", "256MiB", "64MiB"], help="--load-rate of each shard")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=800_000, help="of both tables; 512 bytes each in the big one")
    options = parser.parse_args()
    for rate in options.rates:
        parse_bytes(rate)
    with tempfile.TemporaryDirectory(prefix="loading-") as name, ExitStack() as stack:
        data = make_data(Path(name) / "data", options.rows)
        shards = [stack.enter_context(running(data, Path(name), rate)) for rate in options.rates]
        requests = data.requests("uniform", TOKENS, seed=1)
        for turn in range(options.rounds):
            for index in range(len(shards)):
                one_round(shards[(turn + index) % len(shards)], requests)
        Console(width=140).print(table(shards, data.rows * 2 * DIM, options.rounds))


if __name__ == "__main__":
    main()
