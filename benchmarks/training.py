"""What it costs to train a table in the service: pushes, lookups, and coming back from a log.

    python -m benchmarks.training [--rows 200000] [--rounds 30] [--folder build/training]

A push of 12,288 different rows of 256 values, to one shard, beside what it is made of: its bytes over a plain socket to
another process, and the optimizer's step in this one. Beside them are steps of `nn.Embedding` with torch's sparse
optimizers, whose rows lie in this process. All take turns. A ratio is the median of all rounds' ratios. Then a shard's
share is opened again from the log of all pushes.
"""

from __future__ import annotations

import argparse
import shutil
import socket
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from benchmarks.peers.base import child, service
from embedding_service import EmbeddingClient, RowwiseAdagrad
from embedding_service.store.importing import import_checkpoint
from embedding_service.store.store import Store
from embedding_service.training.branch import branch_folder, read_branch
from embedding_service.training.log import NEVER
from embedding_service.training.optimizers import optimizer_of
from embedding_service.training.share import Share

DIM, TOUCHED = 256, 12_288
BRANCH = "m@b"
OPTIMIZER = RowwiseAdagrad(lr=0.01)


def sink(pipe: Connection, nbytes: int) -> None:
    """Take that many bytes from a connection, answer with one, again and again."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        pipe.send(server.getsockname()[1])
        connection, _ = server.accept()
        buffer = memoryview(bytearray(nbytes))
        with connection:
            while True:
                got = 0
                while got < nbytes:
                    count = connection.recv_into(buffer[got:])
                    if not count:
                        return
                    got += count
                connection.sendall(b"1")


def measured(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, np.ndarray]:
    """Seconds of each way in each round. They take turns."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 2):
        for name, way in ways.items():
            begun = time.perf_counter()
            way()
            if number >= 2:
                times[name].append(time.perf_counter() - begun)
    return {name: np.array(each) for name, each in times.items()}


def in_process(rows: torch.Tensor, ids: torch.Tensor, gradients: torch.Tensor) -> dict[str, Callable[[], object]]:
    """The optimizer alone, and torch's sparse ones."""
    operator = optimizer_of(OPTIMIZER.message())
    state = {name: torch.zeros(each) for name, each in operator.state_shapes(*rows.shape).items()}
    own = rows.clone()
    ways: dict[str, Callable[[], object]] = {
        "update in process": lambda: operator.step(own, state, ids, gradients, OPTIMIZER.lr, 1)
    }
    for name, kind in (("SparseAdam", torch.optim.SparseAdam), ("sparse Adagrad", torch.optim.Adagrad)):
        table = nn.Embedding.from_pretrained(rows.clone(), freeze=False, sparse=True)
        optimizer = kind(table.parameters(), lr=0.01)  # type: ignore[operator]

        def step(table: nn.Embedding = table, optimizer: torch.optim.Optimizer = optimizer) -> None:
            table(ids).backward(gradients)
            optimizer.step()
            optimizer.zero_grad()

        ways[f"nn.Embedding, {name}"] = step
    return ways


def main(folder: Path, rows: int, rounds: int) -> None:
    """Print a line for each way, then the ratios."""
    torch.set_num_threads(1)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    table = torch.randn(rows, DIM)
    save_file({"t": table}, folder / "rows.safetensors")
    import_checkpoint(folder / "rows.safetensors", folder / "store", "m", dtype="fp32", generic={"t": "t"})
    ids = torch.randperm(rows)[:TOUCHED].sort().values
    gradients = torch.randn(TOUCHED, DIM)
    nbytes = TOUCHED * (4 * DIM + 8)
    data = bytes(nbytes)
    with (
        service(folder / "store", folder / "up.log", "--shards=1") as (address, _),
        EmbeddingClient(address) as client,
        client.train(BRANCH, optimizer=OPTIMIZER) as session,
        child(sink, nbytes) as (_, pipe),
        socket.create_connection(("127.0.0.1", pipe.recv())) as connection,
    ):

        def push(dtype: torch.dtype) -> None:
            session.dtype = dtype
            session.add_gradients("t", ids, gradients)
            session.step()

        def raw() -> None:
            connection.sendall(data)
            connection.recv(1)

        ways: dict[str, Callable[[], object]] = {
            "push, float32": lambda: push(torch.float32),
            "push, float16": lambda: push(torch.float16),
            "bytes over a socket": raw,
            **in_process(table, ids, gradients),
            "lookup of the branch": lambda: session.lookup("t", ids),
        }
        times = measured(ways, rounds)
    for name, seconds in times.items():
        print(f"{name:32} {np.median(seconds) * 1000:8.2f} ms")
    parts = times["bytes over a socket"] + times["update in process"]
    print(f"push over its parts: {np.median(times['push, float32'] / parts):.2f}")
    for name in ("nn.Embedding, SparseAdam", "nn.Embedding, sparse Adagrad"):
        print(f"push over {name}: {np.median(times['push, float32'] / times[name]):.2f}")
    replay(folder / "store")


def replay(url: Path) -> None:
    """Open the share again, by its log alone."""
    store = Store(url)
    branch = read_branch(store, BRANCH)
    [shard] = branch.shards
    folder = branch_folder(store, branch.model, branch.name) / "logs" / shard
    begun = time.perf_counter()
    share = Share(store, branch, shard, folder, NEVER)
    seconds = time.perf_counter() - begun
    share.close()
    count = share.applied * TOUCHED
    print(f"replay: {count:,} rows in {seconds:.2f} s, {count / seconds / 1e6:.2f} M rows/s on one thread")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--folder", type=Path, default=Path("build/training"))
    given = parser.parse_args()
    main(given.folder, given.rows, given.rounds)
