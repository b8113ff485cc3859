"""This service, through its public client."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch

from benchmarks.data import TABLE, Data
from benchmarks.peers.base import Lookup, Peer, Server, service
from embedding_service import EmbeddingClient


class Service(Peer):
    """`embedding-service up`. `stored` is the table's dtype, and `dtype` what the client makes of it."""

    def __init__(self, stored: str, dtype: torch.dtype, shards: int = 1) -> None:
        short = {torch.float16: "fp16", torch.float32: "fp32"}[dtype]
        self.name = f"ours {stored}" + (f" as {short}" if short != stored else "")
        self.stored, self.dtype, self.shards = stored, dtype, shards

    @property
    def server_name(self) -> str:
        """One `up` serves tables of all dtypes."""
        return f"up with {self.shards} shards"

    @contextmanager
    def serve(self, data: Data, folder: Path) -> Iterator[Server]:
        """A controller and shards. All peers of one folder and number of shards share them."""
        log = folder / f"up-{self.shards}.log"
        with service(data.store, log, f"--shards={self.shards}") as (address, running):
            children = psutil.Process(running.pid).children(recursive=True)
            yield Server(address, [process.pid for process in children])

    @contextmanager
    def connect(self, data: Data, target: str) -> Iterator[Lookup]:
        """A client of its own."""
        name = f"{self.stored}/{TABLE}"
        with EmbeddingClient(target, timeout=30) as client:
            yield lambda ids: client.lookup(name, torch.from_numpy(ids), dtype=self.dtype)
