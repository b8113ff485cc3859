"""Mooncake's EngramStore over TCP: a master, a process that owns the rows' segment, and clients that look up.

It keeps one float32 table for each head, and its answers are float32.
"""

from __future__ import annotations

import ctypes
import fcntl
import importlib.util
import os
import shutil
import socket
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.data import DIM, HEADS, Data, Ids
from benchmarks.peers.base import (
    START_SECONDS,
    Lookup,
    Peer,
    Server,
    Unusable,
    child,
    command,
    listening,
    receive,
    wait_for_end,
)

# Beside the rows: what the store needs for itself, and the most that is on its way at a time.
SPARE_BYTES = 256 << 20
BUFFER_BYTES = 128 << 20
# The master's, in a network of its own.
PORT = 50051
_CLONE_NEWNET, _SIOCSIFFLAGS, _IFF_UP = 0x40000000, 0x8914, 1
_libc = ctypes.CDLL(None, use_errno=True)


class Mooncake(Peer):
    """EngramStore, metadata P2PHANDSHAKE."""

    name = "Mooncake, TCP"

    @contextmanager
    def serve(self, data: Data, folder: Path) -> Iterator[Server]:
        """The master and the owner."""
        if not importlib.util.find_spec("mooncake"):
            raise Unusable("no mooncake: pip install -r requirements/bench.txt")
        with child(_own, data, folder) as (pid, pipe):
            yield Server(pid, [pid, receive(pipe, START_SECONDS)])

    @contextmanager
    def connect(self, data: Data, target: int) -> Iterator[Lookup]:
        """A store of its own that owns nothing."""
        with Path(f"/proc/{target}/ns/net").open() as namespace:
            _check_call(_libc.setns(namespace.fileno(), _CLONE_NEWNET))
        store, engram = _engram(data, 0)
        first_rows = data.first_rows

        def lookup(ids: Ids) -> Any:
            return engram.lookup(ids.reshape(1, -1, HEADS) - first_rows).reshape(-1, DIM)

        yield lookup
        store.close()


def _engram(data: Data, segment_bytes: int) -> tuple[Any, Any]:
    from mooncake import store as mooncake

    store = mooncake.MooncakeDistributedStore()
    if code := store.setup("127.0.0.1", "P2PHANDSHAKE", segment_bytes, BUFFER_BYTES, "tcp", "", f"127.0.0.1:{PORT}"):
        raise Unusable(f"Mooncake's store did not start: {code}")
    config = mooncake.EngramStoreConfig()
    config.table_vocab_sizes, config.embedding_dim = list(data.head_rows), DIM
    return store, mooncake.EngramStore(0, config, store)


def _own(pipe: Connection, data: Data, folder: Path) -> None:
    _enter_own_network()
    master = shutil.which("mooncake_master", path=str(Path(sys.executable).parent)) or "mooncake_master"
    with command([master, f"--rpc_port={PORT}"], folder / "mooncake.log", lambda: listening(PORT)) as running:
        store, engram = _engram(data, 4 * DIM * data.rows + SPARE_BYTES)
        engram.populate(np.split(data.table().astype(np.float32), data.first_rows[1:]))
        pipe.send(running.pid)
        wait_for_end(pipe)
        store.close()


def _enter_own_network() -> None:
    """A network namespace with a loopback interface only, because Mooncake listens on every interface."""
    _check_call(_libc.unshare(_CLONE_NEWNET))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, _SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", _IFF_UP))


def _check_call(code: int) -> None:
    if code:
        raise Unusable(f"no network namespace of its own, as only root may: {os.strerror(ctypes.get_errno())}")
