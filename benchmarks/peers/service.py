"""This service, through its public client."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch

from benchmarks.data import TABLE, Data
from benchmarks.peers.base import START_SECONDS, Lookup, Peer, Server, Unusable, service
from embedding_service import EmbeddingClient
from embedding_service.security.authority import URI, Authority


class Service(Peer):
    """`embedding-service up`. `stored` is the table's dtype, and `dtype` what the client makes of it."""

    def __init__(self, stored: str, dtype: torch.dtype, shards: int = 1, near: bool = False) -> None:
        short = {torch.float16: "fp16", torch.float32: "fp32"}[dtype]
        self.name = ("ours, near, " if near else "ours ") + stored + (f" as {short}" if short != stored else "")
        self.stored, self.dtype, self.shards, self.near = stored, dtype, shards, near

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
        with EmbeddingClient(target, timeout=30, near=self.near) as client:
            if self.near:
                come_near(client, name)
            yield lambda ids: client.lookup(name, torch.from_numpy(ids), dtype=self.dtype)


class Secured(Service):
    """The same behind TLS and rights, over the wire. The client shows a certificate, or a token."""

    def __init__(self, stored: str, token: bool, shards: int = 1) -> None:
        super().__init__(stored, torch.float16, shards)
        self.name = f"ours, TLS{' and token' if token else ''}, {stored}"
        self.token = token

    @property
    def server_name(self) -> str:
        """Another one than in plain text."""
        return f"{super().server_name}, secured"

    @contextmanager
    def serve(self, data: Data, folder: Path) -> Iterator[Server]:
        """See `Service`."""
        secure = folder / f"secure-{self.shards}"
        log = folder / f"up-{self.shards}-secured.log"
        with service(data.store, log, f"--shards={self.shards}", f"--secure={secure}") as (address, running):
            Authority.load(secure).issue(secure / "admin", [f"{URI}/admin"])
            children = psutil.Process(running.pid).children(recursive=True)
            yield Server(address, [process.pid for process in children])

    @contextmanager
    def connect(self, data: Data, target: str) -> Iterator[Lookup]:
        """See `Service`."""
        name = f"{self.stored}/{TABLE}"
        tls = data.folder / f"secure-{self.shards}" / ("client" if self.token else "admin")
        with EmbeddingClient(target, timeout=30, near=False, tls=tls) as client:
            yield lambda ids: client.lookup(name, torch.from_numpy(ids), dtype=self.dtype)


def come_near(client: EmbeddingClient, name: str) -> None:
    """Return when a lookup of any rows of table `name`, MODEL/TABLE, needs no wire. Raises Unusable."""
    deadline = time.monotonic() + START_SECONDS
    wanted, _, table = name.partition("/")
    [rows] = [model.tables[table][0] for model in client.models() if model.name == wanted]
    while True:
        wired = client.statistics.wired_rows
        client.lookup(name, torch.arange(0, rows, 64))
        if client.statistics.wired_rows == wired:
            return
        if time.monotonic() > deadline:
            raise Unusable(f"rows are not near: {client.statistics.shards}")
        time.sleep(0.1)
