"""torch.distributed.rpc (TensorPipe): the owner of the rows, and callers that come and go."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import rpc

from benchmarks.data import Data
from benchmarks.peers.base import (
    START_SECONDS,
    Lookup,
    Peer,
    Server,
    Unusable,
    child,
    receive,
    wait_for_end,
)
from embedding_service.machine import free_port

OWNER = "owner"
# In the owner's process, the rows.
_rows: Tensor | None = None


class TorchRpc(Peer):
    """`rpc_sync` of an index_select.

    It goes over TCP as between machines. With `one_host`, TensorPipe copies tensors out of the other process's memory.
    """

    def __init__(self, one_host: bool = False) -> None:
        self.name = "torch RPC, one host" if one_host else "torch RPC"
        self.channels = ["cma", "basic"] if one_host else ["mpt_uv", "basic"]

    @contextmanager
    def serve(self, data: Data, folder: Path) -> Iterator[Server]:
        """One process with the rows."""
        if not rpc.is_available():
            raise Unusable("this torch has no RPC")
        port = free_port()
        with child(_serve, data, port, self.channels) as (pid, pipe):
            receive(pipe, START_SECONDS)
            yield Server(port, [pid])

    @contextmanager
    def connect(self, data: Data, target: int) -> Iterator[Lookup]:
        """The process joins the group, and all its threads share that."""
        if not rpc.api._is_current_rpc_agent_set():
            join(f"client-{os.getpid()}", None, target, self.channels)
        yield lambda ids: rpc.rpc_sync(OWNER, gather, args=(torch.from_numpy(ids),))


def gather(ids: Tensor) -> Tensor:
    """In the owner's process: float16 [n, dim] of ids int64 [n]."""
    assert _rows is not None
    return _rows.index_select(0, ids)


def join(name: str, rank: int | None, port: int, channels: list[str]) -> None:
    """Have this process in the group whose owner listens on a port. rank: None for one that comes and goes."""
    os.environ["TP_SOCKET_IFNAME"] = "lo"
    options: Any = rpc.TensorPipeRpcBackendOptions(
        init_method=f"tcp://127.0.0.1:{port}", rpc_timeout=60, _transports=["uv"], _channels=channels
    )
    rpc.init_rpc(name, rank=os.getpid() if rank is None else rank, rpc_backend_options=options)


def _serve(pipe: Connection, data: Data, port: int, channels: list[str]) -> None:
    global _rows
    _rows = data.tensor()
    join(OWNER, 0, port, channels)
    pipe.send("ready")
    wait_for_end(pipe)
    os._exit(0)  # a proper shutdown waits for callers that have gone
