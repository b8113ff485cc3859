"""What lookups cost over 1 to 16 shard processes. Clients in processes of their own ask real `up`s."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial, partialmethod
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
import torch
from safetensors.torch import save_file

from benchmarks.growth.model import Load, crowd, requests_of, shares_of
from benchmarks.peers.base import START_SECONDS, child, receive, service
from benchmarks.rounds import LEAD_SECONDS, cpu_seconds
from embedding_service import EmbeddingClient, NgramHasher
from embedding_service.client.status import get_status
from embedding_service.client.transport import GrpcTransport
from embedding_service.commands.load import run_load, together
from embedding_service.placement.routing import Routing, Table
from embedding_service.store.importing import import_checkpoint
from embedding_service.wire import embedding_pb2 as wire
from embedding_service.wire.embedding_pb2_grpc import EmbeddingServiceStub

CORES = os.cpu_count() or 1
ROWS = 1 << 18
# Rows that a token of LongCat's asks for.
HEADS = 12
# For each model of one table: values of a row, and bytes of a part.
MATRICES = {"wide": (256, 1 << 20), "narrow": (64, 1 << 18), "coarse": (256, 8 << 20)}
LAYERS, LAYER_HEADS, LAYER_DIM, VOCAB = 4, 16, 160, 248_320
MODELS = (*MATRICES, "layers")
# Values that are drawn once, and requests made of them.
READY_ROWS, MOST_READY = 1 << 18, 1024


@dataclass(frozen=True)
class Point:
    """`clients` clients look up `tokens` tokens of a model at a time, one lookup after the other."""

    model: str
    tokens: int
    clients: int = 1

    @property
    def rows(self) -> int:
        """Rows a lookup asks for."""
        return self.tokens * (LAYERS * LAYER_HEADS if self.model == "layers" else HEADS)


@dataclass
class Seen:
    """A point's CPU seconds of a lookup (of its client and of all shards), median latency and lookups a second.

    `hashing` is the client's share that makes row ids of tokens. `cores` is the number of cores that worked.
    """

    client: float
    shards: float
    p50: float
    rate: float
    cores: float
    requests: float
    nbytes: float
    hashing: float


def make_store(folder: Path) -> Path:
    """A store of four int8 models: three of one table, and one with a table of 16 heads for each of four layers."""
    checkpoint, store = folder / "checkpoint", folder / "store"
    checkpoint.mkdir()
    random = torch.Generator().manual_seed(1)
    for name, (dim, part_bytes) in MATRICES.items():
        file = checkpoint / f"{name}.safetensors"
        save_file({"rows": torch.randn(ROWS, dim, generator=random)}, file)
        import_checkpoint(file, store, name, part_bytes=part_bytes, generic={"rows": "rows"})
        file.unlink()
    config = {
        "model_type": "qwen4_exp_text",
        "architectures": ["Qwen4ExpForCausalLM"],
        "ple_layer_ids": list(range(1, LAYERS + 1)),
        "num_hidden_layers": LAYERS,
        "ple_embed_dim": LAYER_HEADS * LAYER_DIM,
        "heads_per_ngram": LAYER_HEADS // 2,
        "ngram_vocab_size_base": ROWS // LAYER_HEADS,
        "vocab_size": VOCAB,
        "eos_token_id": 9,
    }
    (checkpoint / "config.json").write_text(json.dumps(config))
    tables = NgramHasher.from_config(config).tables
    tensors = {
        f"model.layers.{layer}.ple.ple_embedding.ngram_embedding.weight": torch.randn(
            table.rows, LAYER_DIM, generator=random
        )
        for layer, table in enumerate(tables)
    }
    save_file(tensors, checkpoint / "model.safetensors")
    import_checkpoint(checkpoint, store, "layers", part_bytes=1 << 20)
    (checkpoint / "model.safetensors").unlink()
    return store


def _client(pipe: Connection, address: str) -> None:
    """A client's process. It gets a Point, seconds and a seed, then a time to begin. It answers with its figures."""
    with EmbeddingClient(address, timeout=60, near=False) as client, contextlib.suppress(EOFError):
        while True:
            point, seconds, seed = pipe.recv()
            calls = _calls(client, point, seed)
            requests, nbytes = _counted(calls[: 40 if point.rows < 1000 else 10])
            pipe.send((requests, nbytes, _hashing(client, point, seed)))
            begin = pipe.recv()
            before = time.process_time()
            load = run_load([partial(_in_turn, calls)], seconds, begin=begin)
            pipe.send((load, time.process_time() - before))


def _in_turn(calls: Sequence[Callable[[], Any]], turn: int) -> None:
    calls[turn % len(calls)]()


def _calls(client: EmbeddingClient, point: Point, seed: int) -> list[Callable[[], Any]]:
    random = torch.Generator().manual_seed(seed)
    count = max(16, min(MOST_READY, READY_ROWS // point.rows))
    if point.model == "layers":
        tokens = torch.randint(VOCAB, (count, point.tokens, 1), generator=random)
        return [partial(client.lookup_ngrams, "layers", each, dtype=torch.float16) for each in tokens]
    ids = torch.randint(ROWS, (count, point.rows), generator=random)
    return [partial(client.lookup, f"{point.model}/rows", each, dtype=torch.float16) for each in ids]


def _counted(calls: Sequence[Callable[[], Any]]) -> tuple[float, float]:
    """Requests and bytes of rows of a lookup, as they are sent. Nothing is measured then."""
    sent: list[int] = []
    plain = {name: getattr(GrpcTransport, name) for name in ("exchange", "exchange_in_turn")}

    def counting(exchange: Callable[..., Any], transport: GrpcTransport, calls: Any) -> Any:
        sent.extend(call.shape.nbytes for call in calls if call.shape is not None)
        return exchange(transport, calls)

    for name, exchange in plain.items():
        setattr(GrpcTransport, name, partialmethod(partial(counting, exchange)))
    try:
        for call in calls:
            call()
    finally:
        for name, exchange in plain.items():
            setattr(GrpcTransport, name, exchange)
    return len(sent) / len(calls), sum(sent) / len(calls)


def _hashing(client: EmbeddingClient, point: Point, seed: int) -> float:
    """Seconds of CPU that a lookup spends on making row ids."""
    if point.model != "layers":
        return 0.0
    hasher, random = client.hasher("layers"), torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCAB, (200, point.tokens, 1), generator=random)
    before = time.process_time()
    for each in tokens:
        hasher.row_ids(each)
    return (time.process_time() - before) / len(tokens)


@dataclass
class Service:
    """A running `up`, its shards' processes, and clients that wait for orders."""

    shards: int
    pids: list[int]
    clients: list[Connection]
    routing: Routing
    # Seconds of CPU that all shards take a second while nobody asks.
    idle: float

    def measure(self, point: Point, seconds: float, seed: int) -> Seen:
        """A slice of a point."""
        pipes = self.clients[: point.clients]
        for index, pipe in enumerate(pipes):
            pipe.send((point, seconds, 1000 * seed + index))
        counts = [receive(pipe, START_SECONDS) for pipe in pipes]
        before, began = cpu_seconds(self.pids), time.perf_counter()
        for pipe in pipes:
            pipe.send(began + LEAD_SECONDS)
        results = [receive(pipe, 4 * seconds + START_SECONDS) for pipe in pipes]
        took = time.perf_counter() - began
        shards = cpu_seconds(self.pids) - before - self.idle * took
        load = together([load for load, _ in results])
        if load.errors:
            raise SystemExit(f"{point} failed: {dict(load.errors)}")
        client, count = sum(cpu for _, cpu in results), len(load.latencies)
        return Seen(
            client / count,
            shards / count,
            load.percentile(50),
            count / load.seconds,
            (client + shards) / load.seconds,
            *np.mean(counts, axis=0).tolist(),
        )

    def expected(self, point: Point) -> Load:
        """What the point's lookup needs by the routing."""
        tables = list(self.routing.model(point.model).tables.values())
        if point.model == "layers":
            heads = [list(table.head_rows) for table in self.routing.model("layers").hasher().tables]
            requests = sum(
                requests_of(self._shares(table, rows), point.tokens, table.row_bytes)
                for table, rows in zip(tables, heads, strict=True)
            )
        else:
            requests = requests_of(self._shares(tables[0], [tables[0].rows]), point.rows, tables[0].row_bytes)
        return Load(
            len(tables),
            requests,
            point.rows,
            point.rows * tables[0].row_bytes,
            crowd(point.clients, CORES),
            crowd(self.shards, CORES),
        )

    def _shares(self, table: Table, head_rows: list[int]) -> Any:
        return shares_of(table.owners[:, 0], table.rows_per_part, head_rows, self.shards)


@contextmanager
def running(store: Path, folder: Path, shards: int, clients: int) -> Iterator[Service]:
    """`up` with `shards` shards and connected clients, within the `with`."""
    with ExitStack() as stack:
        address, up = stack.enter_context(service(store, folder / f"up-{shards}.log", f"--shards={shards}"))
        pids = [shard.stats.pid for shard in get_status(address).shards]
        assert len(pids) == shards and set(pids) <= {each.pid for each in psutil.Process(up.pid).children()}
        with grpc.insecure_channel(address) as channel:
            routing = Routing(EmbeddingServiceStub(channel).GetRouting(wire.GetRoutingRequest()))
        pipes = [stack.enter_context(child(_client, address))[1] for _ in range(clients)]
        for pipe in pipes:
            pipe.send((Point("wide", 1), 0.1, 0))
            receive(pipe, START_SECONDS)
            pipe.send(0.0)
            receive(pipe, START_SECONDS)
        began, before = time.perf_counter(), cpu_seconds(pids)
        time.sleep(2.0)
        idle = (cpu_seconds(pids) - before) / (time.perf_counter() - began)
        yield Service(shards, pids, pipes, routing, idle)
