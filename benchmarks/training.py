"""What it costs to train a table in the service: pushes, a small model's tokens, checkpoints, a log that is read again.

    python -m benchmarks.training [--rows 200000] [--rounds 30] [--folder build/training]

- A push of 12,288 different rows of 256 values to one shard, beside what it is made of: its bytes over a plain socket
  to another process, and the optimizer's step in this one. Beside them torch RPC with that step in the other process,
  and steps of `nn.Embedding` with torch's sparse optimizers, whose rows lie in this process. "Accepted" ends when the
  shard has it in its log. "Done" ends when a row of that step was read.
- A small model whose rows are in the service, or in this process with the same optimizer.
- Pushes around a checkpoint.
- A shard's share, opened again from the log of all pushes.

All take turns, and another comes first each time. A ratio is the median of all rounds' ratios. The log is in
`--folder`. Of a disk that is slower than pushes come, the disk is measured. A folder in memory shows the rest.
"""

from __future__ import annotations

import argparse
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed import rpc

from benchmarks.peers import torch_rpc
from benchmarks.peers.base import START_SECONDS, child, receive, service, wait_for_end
from embedding_service import EmbeddingClient, RemoteEmbedding, RowwiseAdagrad
from embedding_service.client.gradients import summed
from embedding_service.client.training import Session
from embedding_service.machine import free_port
from embedding_service.store.importing import import_checkpoint
from embedding_service.store.store import Store
from embedding_service.training.branch import Branch, branch_folder, create_branch, read_branch
from embedding_service.training.log import NEVER
from embedding_service.training.optimizers import optimizer_of
from embedding_service.training.share import Share
from embedding_service.wire import training_pb2 as wire

DIM, TOUCHED = 256, 12_288
OPTIMIZER = RowwiseAdagrad(lr=0.01)
# The small model: rows of a token, tokens of a step, vocabulary, and steps of a turn.
HEADS, BATCH, LENGTH, WORDS, TURN = 4, 8, 128, 512, 3
# Steps from one checkpoint to the next, where checkpoints are measured, and rows of a push there.
EVERY, FEW = 40, 1024
Ways = dict[str, Callable[[], object]]
Times = dict[str, np.ndarray]


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


class Here:
    """A table in this process, trained by the operator that shards use."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows.clone()
        self._optimizer = optimizer_of(OPTIMIZER.message())
        self._state = {name: torch.zeros(each) for name, each in self._optimizer.state_shapes(*rows.shape).items()}
        self._steps = 0
        self._looked_up: list[tuple[Tensor, Tensor]] = []

    def change(self, ids: Tensor, gradients: Tensor) -> None:
        """Do a step with sums of gradients: ascending ids [n], float32 [n, dim]."""
        self._steps += 1
        self._optimizer.step(self.rows, self._state, ids, gradients, OPTIMIZER.lr, self._steps)

    def __call__(self, ids: Tensor) -> Tensor:
        """Rows, which collect gradients for `step`."""
        rows = nn.functional.embedding(ids, self.rows).requires_grad_()
        self._looked_up.append((ids, rows))
        return rows

    def step(self) -> None:
        """As `Session.step`."""
        for ids, rows in self._looked_up:
            assert rows.grad is not None
            self.change(*summed([ids.reshape(-1)], [rows.grad.reshape(-1, rows.shape[-1])]))
        self._looked_up = []


_owned: Here | None = None


def own(pipe: Connection, rows: int, port: int) -> None:
    """In a process of its own: the owner of a table, which torch RPC calls."""
    global _owned
    _owned = Here(torch.zeros(rows, DIM))
    torch_rpc.join(torch_rpc.OWNER, 0, port, torch_rpc.TorchRpc().channels)
    pipe.send("ready")
    wait_for_end(pipe)


def change_owned(ids: Tensor, gradients: Tensor) -> None:
    """What the owner is called for."""
    assert _owned is not None
    _owned.change(ids, gradients)


@contextmanager
def joined(rows: int) -> Iterator[None]:
    """This process may call the owner."""
    port = free_port()
    with child(own, rows, port) as (_, pipe):
        receive(pipe, START_SECONDS)
        torch_rpc.join("trainer", None, port, torch_rpc.TorchRpc().channels)
        try:
            yield
        finally:
            rpc.shutdown(graceful=False)


def measured(ways: Ways, rounds: int) -> Times:
    """Seconds of each way in each round. They take turns."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    for number in range(rounds + 2):
        first = number % len(names)
        for name in [*names[first:], *names[:first]]:
            begun = time.perf_counter()
            ways[name]()
            if number >= 2:
                times[name].append(time.perf_counter() - begun)
    return {name: np.array(each) for name, each in times.items()}


def sparse_steps(rows: Tensor, ids: Tensor, gradients: Tensor) -> Ways:
    """Steps of torch's sparse optimizers."""
    ways: Ways = {}
    for name, kind in (("SparseAdam", torch.optim.SparseAdam), ("sparse Adagrad", torch.optim.Adagrad)):
        table = nn.Embedding.from_pretrained(rows.clone(), freeze=False, sparse=True)
        optimizer = kind(table.parameters(), lr=0.01)  # type: ignore[operator]

        def step(table: nn.Embedding = table, optimizer: torch.optim.Optimizer = optimizer) -> None:
            table(ids).backward(gradients)
            optimizer.step()
            optimizer.zero_grad()

        ways[f"nn.Embedding, {name}"] = step
    return ways


def pushes(session: Session, table: Tensor, rounds: int) -> None:
    """A push beside its parts and its peers."""
    ids = torch.randperm(len(table))[:TOUCHED].sort().values
    gradients = torch.randn(TOUCHED, DIM)
    here = Here(table)

    def push(dtype: torch.dtype, done: bool) -> None:
        session.dtype = dtype
        session.add_gradients("t", ids, gradients)
        session.step()
        if done:
            session.lookup("t", ids[:1])

    data = bytes(TOUCHED * (4 * DIM + 8))
    with (
        child(sink, len(data)) as (_, pipe),
        socket.create_connection(("127.0.0.1", pipe.recv())) as connection,
        joined(len(table)),
    ):

        def raw() -> None:
            connection.sendall(data)
            connection.recv(1)

        times = measured(
            {
                "push, float32, accepted": lambda: push(torch.float32, False),
                "push, float32, done": lambda: push(torch.float32, True),
                "push, float16, done": lambda: push(torch.float16, True),
                "its bytes over a socket": raw,
                "the update in process": lambda: here.change(ids, gradients),
                "torch RPC with the update": lambda: rpc.rpc_sync(torch_rpc.OWNER, change_owned, args=(ids, gradients)),
                **sparse_steps(table, ids, gradients),
                "lookup of the branch": lambda: session.lookup("t", ids),
            },
            rounds,
        )
    session.dtype = torch.float32
    tell(times)
    times["the socket and the update"] = times["its bytes over a socket"] + times["the update in process"]
    peers = [name for name in times if name.startswith(("torch", "nn.", "the socket"))]
    for way in ("push, float32, accepted", "push, float32, done", "push, float16, done"):
        for peer in peers:
            print(f"{f'{way} / {peer}':62} {np.median(times[way] / times[peer]):.2f}")


class Small(nn.Module):
    """A small language model that adds rows to each token. `rows`: ids int64 [B, S, HEADS] -> [B, S, HEADS, DIM]."""

    def __init__(self, rows: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._rows = rows
        self.words = nn.Embedding(WORDS, DIM)
        self.project = nn.Linear(HEADS * DIM, DIM)
        layer = nn.TransformerEncoderLayer(DIM, 4, 4 * DIM, dropout=0.0, batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(DIM, WORDS)

    def forward(self, tokens: Tensor, ids: Tensor) -> Tensor:
        """The loss of predicting each token by those before."""
        hidden = self.words(tokens) + self.project(self._rows(ids).flatten(-2))
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        logits = self.head(self.body(hidden, mask, is_causal=True))
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def trainer(
    rows: Callable[[Tensor], Tensor],
    tables: Here | Session,
    size: int,
    prefetch: Callable[[Tensor], object] = lambda ids: None,
) -> Callable[[], object]:
    """A turn of training a model of its own: `TURN` steps."""
    torch.manual_seed(1)
    model = Small(rows)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    chance = torch.Generator().manual_seed(2)

    def batch() -> tuple[Tensor, Tensor]:
        tokens = torch.randint(WORDS, (BATCH, LENGTH), generator=chance)
        return tokens, torch.randint(size, (BATCH, LENGTH, HEADS), generator=chance)

    following = batch()

    def turn() -> None:
        nonlocal following
        for _ in range(TURN):
            (tokens, ids), following = following, batch()
            prefetch(following[1])
            model(tokens, ids).backward()
            tables.step()
            optimizer.step()
            optimizer.zero_grad()

    return turn


def small_model(client: EmbeddingClient, table: Tensor, rounds: int) -> None:
    """Tokens a second with the rows here and there."""
    here = Here(table)
    with (
        client.train("m@now", optimizer=OPTIMIZER) as now,
        client.train("m@late", optimizer=OPTIMIZER, staleness=1) as late,
    ):
        times = measured(
            {
                "rows in this process": trainer(here, here, len(table)),
                "in the service": trainer(RemoteEmbedding(client, "m@now/t"), now, len(table)),
                "in the service, a step behind, prefetched": trainer(
                    RemoteEmbedding(client, "m@late/t"), late, len(table), lambda ids: late.prefetch("t", ids)
                ),
            },
            rounds,
        )
    for name, seconds in times.items():
        rate = BATCH * LENGTH * TURN / np.median(seconds)
        ratio = np.median(times["rows in this process"] / seconds)
        print(f"small model, {name:45} {rate:8,.0f} tokens/s, {ratio:.2f} of those in this process")


def around_a_checkpoint(client: EmbeddingClient, rows: int) -> None:
    """How long a push takes while a checkpoint is begun and written."""
    with client.train("m@checked", optimizer=OPTIMIZER, checkpoint_every=EVERY) as session:
        seconds = []
        for _ in range(3 * EVERY + EVERY // 2):
            session.add_gradients("t", torch.randperm(rows)[:FEW].sort().values, torch.randn(FEW, DIM))
            begun = time.perf_counter()
            session.step()
            session.lookup("t", torch.zeros(1, dtype=torch.int64))
            seconds.append(time.perf_counter() - begun)
    usual = np.median(seconds[:EVERY])
    print(
        f"push of {FEW:,} rows: {usual * 1000:.1f} ms; the longest of those before a checkpoint "
        f"{max(seconds[:EVERY]) * 1000:.1f} ms, of those around three {max(seconds[EVERY:]) * 1000:.1f} ms"
    )


def replay(url: Path) -> None:
    """Open a share again, by its log alone. Loading the rows that the branch began from is measured apart."""
    store = Store(url)
    branch = read_branch(store, "m@b")
    [(name, shard)] = branch.homes.items()
    empty = create_branch(store, "m@empty", wire.OpenRequest(optimizer=branch.optimizer.message), {}, [shard])
    loading = opening(store, empty, url.parent / "empty")
    log = branch_folder(store, branch.model, branch.name) / "logs" / name / shard
    both = opening(store, branch, log)
    count, seconds, cpu = (here - there for here, there in zip(both, loading, strict=True))
    print(
        f"replay: {count:,.0f} rows in {seconds:.2f} s, {count / seconds / 1e6:.2f} M rows/s on one thread, "
        f"{count / cpu / 1e6:.2f} M rows a CPU second; with loading {count / both.cpu / 1e6:.2f}"
    )


class Opening(NamedTuple):
    """Rows of pushes that were done again, and what it took."""

    rows: float
    seconds: float
    cpu: float


def opening(store: Store, branch: Branch, log: Path) -> Opening:
    """Open a branch's only share, and close it."""
    [(name, shard)] = branch.homes.items()
    begun, cpu = time.perf_counter(), time.process_time()
    share = Share(store, branch, name, log, NEVER, shard=shard)
    took = Opening(share.applied * TOUCHED, time.perf_counter() - begun, time.process_time() - cpu)
    share.close()
    return took


def tell(times: Times) -> None:
    """A line for each way."""
    for name, seconds in times.items():
        print(f"{name:28} {np.median(seconds) * 1000:8.2f} ms, the fastest {seconds.min() * 1000:.2f}")


def main(folder: Path, rows: int, rounds: int) -> None:
    """Print a line for each way, then the ratios."""
    torch.set_num_threads(1)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        table = torch.randn(rows, DIM)
        save_file({"t": table}, folder / "rows.safetensors")
        import_checkpoint(folder / "rows.safetensors", folder / "store", "m", dtype="fp32", generic={"t": "t"})
        with (
            service(folder / "store", folder / "up.log", "--shards=1") as (address, _),
            EmbeddingClient(address) as client,
        ):
            with client.train("m@b", optimizer=OPTIMIZER) as session:
                pushes(session, table, rounds)
            small_model(client, table, max(rounds // 3, 4))
            around_a_checkpoint(client, rows)
        replay(folder / "store")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--folder", type=Path, default=Path("build/training"))
    given = parser.parse_args()
    main(given.folder, given.rows, given.rounds)
